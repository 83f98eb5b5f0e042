"""Generated text decides: a cache that lies, loops and ends that are missed are refused, and noise is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantize import source
from quantize.evidence import Check
from quantize.parity import framing, generation, generation_checks
from quantize.parity.models import Pair, load_tokenizer
from quantize.progress import Silent
from tests.conftest import POCKET

Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Ids [batch, length] and logits [batch, length, vocabulary] -> other logits."""
SHARES = st.floats(0.0, 1.0)
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|answer|>{% endif %}"
)


@pytest.fixture(scope="module")
def loaded(finished: Path) -> Iterator[Pair]:
    checkout = source.fetch(str(POCKET), revision=None, trust_remote_code=False, progress=Silent())
    tokenizer = load_tokenizer(POCKET, False)
    with Pair(checkout, finished, "cpu", trust=False, tokenizer=tokenizer, alone=False) as pair:
        pair.upcast()
        yield pair


@pytest.fixture
def pair(loaded: Pair) -> Iterator[Pair]:
    """The pocket model and its package, which a test may change."""
    yield loaded
    for model in (loaded.reference, loaded.candidate):
        model._forward_hooks.clear()
        model._forward_hooks_with_kwargs.clear()


def change(model: Any, logits: Change) -> None:
    """Let a model say something else from now on."""

    def hook(module: Any, arguments: Any, options: Any, output: Any) -> Any:
        ids = options["input_ids"] if "input_ids" in options else arguments[0]
        output.logits = logits(ids[:, -output.logits.shape[1] :], output.logits)
        return output

    model.register_forward_hook(hook, with_kwargs=True)


def checked(pair: Pair, new_tokens: int = 16) -> dict[str, Check]:
    generated = generation.compare(pair, new_tokens, 0, lambda amount: None)
    return {check.name: check for check in generated.checks}


def failed(pair: Pair, new_tokens: int = 16) -> set[str]:
    return {name for name, check in checked(pair, new_tokens).items() if not check.passed}


def test_an_honest_package_passes_every_check(pair: Pair) -> None:
    checks = checked(pair)
    assert list(checks) == ["generation", "cached decoding", "repetition", "end of text"]
    assert all(check.passed for check in checks.values()), checks


def test_a_kernel_that_errs_on_single_tokens_is_found(pair: Pair) -> None:
    """Reading windows at once shows nothing of it."""
    change(pair.candidate, lambda ids, logits: logits.roll(1, -1) if logits.shape[1] == 1 else logits)
    assert "cached decoding" in failed(pair)


@pytest.mark.slow
def test_the_originals_own_cache_is_not_held_against_a_package(pair: Pair) -> None:
    for model in (pair.reference, pair.candidate):
        change(model, lambda ids, logits: logits.roll(1, -1) if logits.shape[1] == 1 else logits)
    check = checked(pair)["cached decoding"]
    assert check.passed and "too noisy for a limit" in check.detail


@pytest.mark.slow
def test_a_model_that_loops_is_found(pair: Pair) -> None:
    def the_same_again(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits.scatter_add(-1, ids[..., None], torch.full_like(logits[..., :1], 60.0))

    change(pair.candidate, the_same_again)
    assert "repetition" in failed(pair)


def an_end_after(shift: float) -> Change:
    """An end of text after about every seventh token, likely by `shift`."""

    def add(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        logits[..., 0] = torch.where(ids % 7 == 3, logits.amax(-1) + shift, logits[..., 0] - 60.0)
        return logits

    return add


@pytest.mark.slow
def test_an_answer_that_runs_on_is_found(pair: Pair) -> None:
    change(pair.reference, an_end_after(3.0))
    change(pair.candidate, an_end_after(2.5))
    check = checked(pair, 32)["end of text"]
    assert check.passed and "texts end; there" in check.detail
    change(pair.candidate, an_end_after(-3.0))
    assert failed(pair, 32) == {"end of text"}


@pytest.mark.slow
def test_a_text_that_ends_too_early_is_found(pair: Pair) -> None:
    change(pair.candidate, an_end_after(9.0))
    assert "end of text" in failed(pair, 32)


def test_overflow_while_generating_is_a_verdict(pair: Pair) -> None:
    change(pair.candidate, lambda ids, logits: logits * torch.inf if logits.shape[1] == 1 else logits)
    assert failed(pair) == {"generation"}


def test_a_candidate_that_cannot_generate_is_a_verdict(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair.candidate, "generate", lambda *_, **__: 1 / 0)
    assert failed(pair) == {"generation"}
    monkeypatch.setattr(pair.reference, "generate", lambda *_, **__: 1 / 0)
    assert failed(pair) == set()


@given(st.lists(SHARES, min_size=2, max_size=12))
def test_the_same_repetition_always_passes(shares: list[float]) -> None:
    assert generation_checks.repetition_check([(share, share) for share in shares]).passed


def test_few_loops_more_are_noise_and_many_are_not() -> None:
    noise = [(0.1, 0.6), (0.7, 0.2), (0.0, 0.4), (0.5, 0.5), (0.3, 0.1), (0.2, 0.3)]
    assert generation_checks.repetition_check(noise * 2).passed
    assert not generation_checks.repetition_check([(left, 0.98) for left, _ in noise] * 2).passed


@given(st.lists(SHARES, min_size=1, max_size=12), st.floats(0.0, 0.2))
def test_ends_that_are_nearly_as_likely_pass(shares: list[float], less: float) -> None:
    pairs = [(share, max(0.0, share - less)) for share in shares]
    assert generation_checks.ends_check(pairs, [(1.0, 1.0)] * len(pairs)).passed


def test_without_ends_there_is_nothing_to_compare() -> None:
    assert generation_checks.ends_check([], []).detail.startswith("nothing to compare")


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(POCKET, tmp_path / "chat"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [7, 0, 999999]}))
    return folder


def test_chat_models_are_asked_through_their_template_and_stop_on_their_list(chat_model: Path, finished: Path) -> None:
    checkout = source.fetch(str(chat_model), revision=None, trust_remote_code=False, progress=Silent())
    tokenizer = load_tokenizer(chat_model, False)
    with Pair(checkout, finished, "cpu", trust=False, tokenizer=tokenizer, alone=False) as pair:
        assert pair.chat and pair.ends == (0, 7)
    assert tokenizer.decode(framing.turn(tokenizer, "Why?")) == "<|user|>Why?<|answer|>"
    assert generation.prompts(chat=True) != generation.prompts(chat=False)


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[7].content }}", "{% if %}", ""])
def test_a_template_that_takes_no_message_is_none(template: str) -> None:
    tokenizer = load_tokenizer(POCKET, False)
    tokenizer.chat_template = template
    assert not framing.has_template(tokenizer)
