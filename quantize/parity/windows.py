"""A text is cut into windows of tokens, drawn in a seeded order, each behind what the tokenizer puts before a text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantize.errors import CorpusError
from quantize.evidence import CorpusRecord
from quantize.parity.corpus import Corpus

if TYPE_CHECKING:
    import torch

FEWEST_WINDOWS = 8
"""With fewer windows that differ, an interval over them says nothing."""
RUN_TOKENS = 16
"""Tokens in a row by which windows are compared."""
LARGEST_REPEAT = 0.5
"""The share of its runs that a window may have in common with windows that were drawn before."""
SAMPLES = ("x", "7", "The end", "\u00c4hre", "\u4e2d\u6587", "(a)")
"""Texts that begin with different tokens, so that what their encodings share is no part of them."""


@dataclass(frozen=True)
class Encoder:
    """A tokenizer's tokens for a text alone, and those that it puts before every text, which models are trained to see.

    `inseparable` of the latter it does not leave out when asked to.
    """

    tokenizer: Any
    prefix: tuple[int, ...]
    inseparable: int

    @classmethod
    def of(cls, tokenizer: Any) -> Encoder:
        whole = _shared(tokenizer(text).input_ids for text in SAMPLES)
        bare = _shared(tokenizer(text, add_special_tokens=False).input_ids for text in SAMPLES)
        special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
        inseparable = len([*itertools.takewhile(lambda token: token in special, bare)])
        return cls(tokenizer, whole[: len(whole) - len(bare) + inseparable], inseparable)

    def ids(self, text: str) -> list[int]:
        """The tokens of `text`, without any before it."""
        encoded = self.tokenizer(text, add_special_tokens=False, verbose=False, return_attention_mask=False)
        return list(encoded.input_ids[self.inseparable :])


def draw(
    corpus: Corpus, tokenizer: Any, window: int, most: int, seed: int, frame: tuple[int, ...] | None = None
) -> tuple[torch.Tensor, CorpusRecord]:
    """Whole windows [count, window] of token ids in a seeded random order, at most `most`, and their record.

    Windows that repeat others count once. Each begins with all that the tokenizer puts before a text, or with the
    tokens of a `frame` instead. Raises CorpusError where fewer than `FEWEST_WINDOWS` are left.
    """
    import torch

    encoder = Encoder.of(tokenizer)
    ids = torch.tensor(encoder.ids(corpus.text), dtype=torch.long)
    before = encoder.prefix if frame is None else frame
    text_window = window - len(before)
    if text_window < 2:
        raise CorpusError(
            f"a window of {window} tokens leaves no room behind the {len(before)} that the tokenizer puts before a "
            f"text: use a larger --window"
        )
    count = len(ids) // text_window
    texts = ids[: count * text_window].view(count, text_window)
    order, repeated = _distinct(texts, torch.randperm(count, generator=torch.Generator().manual_seed(seed)), most)
    if len(order) < FEWEST_WINDOWS:
        but = f", of which {repeated} repeat others" if repeated else ""
        raise CorpusError(
            f"corpus {corpus.name} has {len(ids)} tokens, which makes {count} windows of {window}{but}: "
            f"at least {FEWEST_WINDOWS} that differ are needed; use a longer text or a smaller --window"
        )
    record = CorpusRecord(
        name=corpus.name,
        dataset=corpus.dataset,
        sha256=corpus.sha256,
        characters=len(corpus.text),
        tokens=len(ids),
        window=window,
        windows=count,
        scored=len(order),
        repeated=repeated,
        prefix=len(before),
    )
    prefix = torch.tensor(before, dtype=torch.long).expand(len(order), -1)
    return torch.cat([prefix, texts[order]], dim=1), record


def _distinct(texts: torch.Tensor, order: torch.Tensor, most: int) -> tuple[torch.Tensor, int]:
    """The first `most` of `order` whose windows say something new, and how many were passed over.

    A window repeats others when they hold more than `LARGEST_REPEAT` of its runs of `RUN_TOKENS` tokens, at whatever
    offset: a text that repeats itself does so at its own period, not at that of the windows.
    """
    import torch

    length = min(RUN_TOKENS, texts.shape[1])
    factors = torch.randint(-(2**63), 2**63 - 1, (length,), generator=torch.Generator().manual_seed(0)) | 1
    seen: set[int] = set()
    kept: list[int] = []
    repeated = 0
    for index in order.tolist():
        runs = set((texts[index].unfold(0, length, 1) * factors).sum(-1).tolist())
        if len(runs & seen) > LARGEST_REPEAT * len(runs):
            repeated += 1
            continue
        seen |= runs
        kept.append(index)
        if len(kept) == most:
            break
    return torch.tensor(kept, dtype=torch.long), repeated


def _shared(encodings: Iterable[list[int]]) -> tuple[int, ...]:
    """The tokens with which all `encodings` begin."""
    ranks = zip(*encodings, strict=False)
    return tuple(rank[0] for rank in itertools.takewhile(lambda rank: len(set(rank)) == 1, ranks))
