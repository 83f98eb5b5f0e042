"""Two published ways to state a perplexity, so that a model's numbers can be compared with papers.

Neither counts for the verdict. Each reads the whole text once with one model, in segments of which only the last
tokens are scored.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from quantize.parity import scoring
from quantize.parity.corpus import Corpus
from quantize.parity.windows import Encoder

STRIDE = 512
SLIDING = ("sliding window perplexity",)
HARNESS = ("word perplexity", "byte perplexity", "bits per byte")


@dataclass(frozen=True)
class Segment:
    """Tokens of which the model reads all but the last and is scored on the last `scored`."""

    tokens: Sequence[int]
    scored: int


@dataclass(frozen=True)
class Reading:
    """One standard perplexity's segments of a text, and how their nll sums (nats) become the figures that it names."""

    method: str
    segments: tuple[Segment, ...]
    names: tuple[str, ...]
    figures: Callable[[Sequence[float]], tuple[float, ...]]


def readings(corpus: Corpus, tokenizer: Any, context: int) -> tuple[Reading, ...]:
    """Both standard perplexities for a model that reads `context` tokens."""
    return sliding_window(corpus, tokenizer, context, min(STRIDE, context // 2)), harness(corpus, tokenizer, context)


def sliding_window(corpus: Corpus, tokenizer: Any, context: int, stride: int) -> Reading:
    """Overlapping windows, each scored on what the ones before it did not score.

    As the Hugging Face guide to the perplexity of fixed-length models does it: exp of the windows' mean nll, weighted
    with one less than the tokens that each counts as its own. What the tokenizer puts before a text, which the guide
    shows to the model in the first window only, stands before each.
    """
    encoder = Encoder.of(tokenizer)
    ids, prefix = encoder.ids(corpus.text), encoder.prefix
    room = context - len(prefix)
    ends = [*itertools.takewhile(lambda end: end < len(ids), range(room, len(ids), stride)), len(ids)]
    own = [end - earlier for earlier, end in zip([-min(1, len(prefix)), *ends], ends, strict=False)]
    begins = [index * stride for index in range(len(ends))]
    segments = [
        Segment([*prefix, *ids[begin:end]], min(count, end - begin - (0 if prefix else 1)))
        for begin, end, count in zip(begins, ends, own, strict=True)
    ]

    def figures(sums: Sequence[float]) -> tuple[float, ...]:
        means = [total / max(1, segment.scored) for total, segment in zip(sums, segments, strict=True)]
        weighted = sum(mean * (count - 1) for mean, count in zip(means, own, strict=True))
        return (_exponential(weighted / max(1, sum(count - 1 for count in own))),)

    return Reading(
        f"sliding window of {context} tokens, stride {stride}{_behind(prefix)}", tuple(segments), SLIDING, figures
    )


def harness(corpus: Corpus, tokenizer: Any, context: int) -> Reading:
    """Every document on its own in disjoint windows, and its nll spread over the words and bytes of the raw text.

    As lm-evaluation-harness does it for its task wikitext, version 2: the first window follows a start token, each
    further one the last token of the window before, and a shorter last window is filled with context. What the
    tokenizer puts before a text takes the place of the start token, and stands before each window.
    """
    encoder = Encoder.of(tokenizer)
    starts = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    first = encoder.prefix or tuple(starts[:1])
    documents = corpus.documents()
    segments = tuple(
        segment
        for document in documents
        for segment in _disjoint(encoder.ids(document.text), first, encoder.prefix, context)
    )
    words, size = sum(document.words for document in documents), sum(document.bytes for document in documents)

    def figures(sums: Sequence[float]) -> tuple[float, ...]:
        total = math.fsum(sums)
        return _exponential(total / words), _exponential(total / size), total / size / math.log(2)

    return Reading(
        f"lm-evaluation-harness, windows of {context} tokens{_behind(encoder.prefix)}", segments, HARNESS, figures
    )


def figures(
    model: Any, readings: Sequence[Reading], device: str, advance: Callable[[int], None] = lambda amount: None
) -> list[float]:
    """The perplexities of `model` by each reading, in the order of their names."""
    return [
        figure for reading in readings for figure in reading.figures(nll_sums(model, reading.segments, device, advance))
    ]


def nll_sums(model: Any, segments: Sequence[Segment], device: str, advance: Callable[[int], None]) -> list[float]:
    """Nats of each segment's scored tokens under `model`; segments of equal length are read together."""
    import torch

    vocabulary, sums = scoring.vocabulary_of(model), []
    with torch.inference_mode():
        for length, group in itertools.groupby(segments, key=lambda segment: len(segment.tokens)):
            for batch in _batches(list(group), scoring.batch_of(length * vocabulary, device)):
                tokens = torch.tensor([segment.tokens for segment in batch], device=device)
                nll = scoring.nll(model(tokens[:, :-1]).logits, tokens[:, 1:])
                sums += [float(row[len(row) - segment.scored :].sum()) for row, segment in zip(nll, batch, strict=True)]
                advance(len(batch))
    return sums


def _disjoint(tokens: list[int], first: tuple[int, ...], further: tuple[int, ...], context: int) -> Iterator[Segment]:
    """Segments that score each of `tokens` once, as many at a time as the model reads with `context` tokens.

    The `first` segment and each of the `further` ones begin with tokens that are not scored; without any, the first
    of `tokens` is not.
    """
    begin, lead, known = (0, first, 0) if first else (1, first, 1)
    while begin < len(tokens):
        room = context + 1 - len(lead)
        end = min(begin + room - known, len(tokens))
        yield Segment([*lead, *tokens[max(0, end - room) : end]], end - begin)
        begin, lead, known = end, further, 1


def _exponential(nats: float) -> float:
    """exp, and infinity where no number is as large: a text without spaces is one word of many tokens."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def _behind(prefix: tuple[int, ...]) -> str:
    return f", each after the tokenizer's {len(prefix)} leading tokens" if prefix else ""


def _batches(segments: list[Segment], size: int) -> Iterator[list[Segment]]:
    return (segments[start : start + size] for start in range(0, len(segments), size))
