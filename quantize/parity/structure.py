"""Is the package what its recipe says? What is no matter of the format: code, ties, tokenizer, arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantize.evidence import Check
from quantize.formats import remote_code
from quantize.formats.bitsandbytes import checks
from quantize.formats.bitsandbytes.config import ExpectedConfig
from quantize.formats.ties import is_tied
from quantize.parity.models import load_tokenizer
from quantize.records import Checkout

ARITHMETIC_LIMIT = 0.001
"""Mean KLD in nats, a sixth of what the grade lossless allows."""
TOKENIZER_SAMPLE = (
    "Plain words, numbers 3.14159 and 1,000,000; CamelCase, snake_case.\n\tdef f(x): return x**2  # code\n"
    "Ünïcödé, 中文字, 日本語, العربية, emoji 🙂👩‍👩‍👧, a  b   c, <|endoftext|> <s> </s>"
)


def same_code(checkout: Checkout, candidate: Path) -> bool:
    """Whether the candidate brings and names no other code than the source's, which alone was trusted."""
    source, own = checkout.folder, f"{checkout.source.repo_id}--"
    named = {name.removeprefix(own) for name in remote_code.classes(candidate)}
    return named <= remote_code.classes(source) and all(
        (source / path.relative_to(candidate)).is_file()
        and (source / path.relative_to(candidate)).read_bytes() == path.read_bytes()
        for path in candidate.rglob("*.py")
    )


def check_models(reference: Any, candidate: Any, folder: Path, expected: ExpectedConfig) -> list[Check]:
    """What the reloaded model shows: modules, ties, size."""
    return [
        checks.module_check(reference, candidate, expected),
        tie_check(reference, candidate),
        checks.size_check(reference, candidate, folder, expected),
    ]


def tie_check(reference: Any, candidate: Any) -> Check:
    """Whether the candidate's head is its embeddings exactly where the reference's is."""
    tied = [is_tied(model) for model in (reference, candidate)]
    words = ["tied" if state else "separate" for state in tied]
    return Check("ties", tied[0] == tied[1], f"head and embeddings: {words[0]} in the source, {words[1]} here")


def arithmetic_check(at_once: float, one_by_one: float) -> Check:
    """Whether float32 sums of the stored weights say what the package's own type and kernels say.

    Both are mean KLDs in nats: of windows that are read at once, and of one that is read token by token with the
    cache, for which the package may have another kernel.
    """
    detail = (
        f"mean KLD {at_once:.6f} (read at once) and {one_by_one:.6f} (one token at a time) between the package's own "
        f"arithmetic on this CPU and float32 sums, which are used from here on (limit {ARITHMETIC_LIMIT})"
    )
    return Check("arithmetic", max(at_once, one_by_one) <= ARITHMETIC_LIMIT, detail)


def tokenizer_check(source: Any, folder: Path, trust_remote_code: bool) -> Check:
    """Whether the folder's tokenizer is the `source`'s."""
    try:
        own = load_tokenizer(folder, trust_remote_code)
    except Exception as error:  # noqa: BLE001 - tokenizers raises bare ones
        return Check("tokenizer", False, f"does not load: {(str(error) or type(error).__name__).splitlines()[0]}")
    if own.get_vocab() != source.get_vocab():
        return Check("tokenizer", False, "another vocabulary than the source's")
    same = own(TOKENIZER_SAMPLE).input_ids == source(TOKENIZER_SAMPLE).input_ids
    detail = "same vocabulary, same ids for a mixed sample" if same else "other ids than the source's"
    return Check("tokenizer", same, detail)
