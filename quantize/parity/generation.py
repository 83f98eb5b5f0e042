"""Both models continue the same prompts, greedily and by sampling, and read what the original wrote."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from quantize import devices
from quantize.evidence import Check, Generation, Sample
from quantize.parity import framing, generation_checks, scoring
from quantize.parity.decoding import TEMPERATURE, TOP_K, TOP_P, CannotGenerate, Decoder, NotFinite
from quantize.parity.models import Pair

if TYPE_CHECKING:
    import torch

REPETITION_GRAM = 4
HALF_PRECISION = ("float16", "bfloat16")


def prompts(chat: bool) -> tuple[str, ...]:
    """The built-in beginnings of texts, or questions for chat models."""
    name = "questions.txt" if chat else "prompts.txt"
    text = resources.files("quantize.parity").joinpath(name).read_text("utf-8")
    return tuple(line for line in text.splitlines() if line)


@dataclass(frozen=True)
class Generated:
    """What generating gave: the record, None where a model cannot generate, and the checks that decide."""

    record: Generation | None
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class _Reading:
    """How a model reads a text token by token with its cache.

    `shift` is the mean KLD (nats) from reading at once, `noise` that between reading at once in float32 and in half
    precision. Agreements are shares of the text's tokens that the model thinks most likely. `ends` are the
    probabilities of an end at each token.
    """

    shift: float
    noise: float
    agreement_at_once: float
    agreement_cached: float
    ends: tuple[float, ...]


@dataclass(frozen=True)
class _Performance:
    """What a model does with every prompt, in tokens: its texts, and how it reads the original's greedy ones."""

    greedy: list[list[int]]
    sampled: list[list[int]]
    readings: list[_Reading]


def compare(pair: Pair, new_tokens: int, seed: int, advance: Callable[[int], None]) -> Generated:
    """Continue every prompt by up to `new_tokens` tokens with both models and compare.

    One model does all its work before the other begins, and `advance` is called with the number of prompts done.
    """
    encoded = [_encode(pair, prompt) for prompt in prompts(pair.chat)]
    limit = max(1, min(new_tokens, pair.context - max(ids.shape[1] for ids in encoded)))
    of_original = True
    with devices.steady_attention():
        try:
            decoder = Decoder.suiting(pair.reference, encoded, pair.ends)
            original = _perform(pair, pair.reference, decoder, encoded, limit, seed)
            advance(len(encoded))
            of_original = False
            candidate = _perform(pair, pair.candidate, decoder, encoded, limit, seed, original.greedy)
            advance(len(encoded))
        except (CannotGenerate, NotFinite) as failure:
            return Generated(None, (generation_checks.failure_check(failure, of_original),))
        record = _record(pair, encoded, original, candidate, new_tokens, seed)
    return Generated(record, _checks(decoder, original, candidate))


def _perform(
    pair: Pair,
    model: Any,
    decoder: Decoder,
    encoded: Sequence[torch.Tensor],
    limit: int,
    seed: int,
    texts: list[list[int]] | None = None,
) -> _Performance:
    """All that a model has to do; `texts` are the original's, which the original itself has yet to write."""
    greedy, sampled = (decoder.write(model, encoded, limit, choice) for choice in (None, seed))
    read = texts or greedy
    logits = decoder.read(model, encoded, read)
    readings = [_reading(pair, model, decoder.ends, *parts) for parts in zip(encoded, read, logits, strict=True)]
    return _Performance(greedy, sampled, readings)


def _reading(
    pair: Pair, model: Any, ends: tuple[int, ...], ids: torch.Tensor, text: list[int], cached: torch.Tensor
) -> _Reading:
    at_once = _at_once(model, ids, text)
    if not bool(cached.isfinite().all() and at_once.isfinite().all()):
        raise NotFinite
    return _Reading(
        shift=scoring.mean_kld(at_once, cached),
        noise=_half_precision_noise(pair, model, ids, text, at_once),
        agreement_at_once=_agreement(at_once, text),
        agreement_cached=_agreement(cached, text),
        ends=tuple(cached.softmax(-1)[:, list(ends)].sum(-1).tolist()),
    )


def _half_precision_noise(pair: Pair, model: Any, ids: torch.Tensor, text: list[int], at_once: torch.Tensor) -> float:
    """What the candidate's own type does to a model in float32; nothing where the candidate computes in float32."""
    import torch

    if pair.candidate_dtype not in HALF_PRECISION:
        return 0.0
    with torch.autocast(torch.device(pair.device).type, dtype=getattr(torch, pair.candidate_dtype)):
        noise = scoring.mean_kld(at_once, _at_once(model, ids, text))
    return noise if math.isfinite(noise) else 0.0


def _checks(decoder: Decoder, original: _Performance, candidate: _Performance) -> tuple[Check, ...]:
    pairs = list(zip(original.readings, candidate.readings, strict=True))
    noise = max(_mean([max(reading.shift, reading.noise) for reading in original.readings]), 0.0)
    repetitions = [
        (repetition(left), repetition(right))
        for left, right in (
            *zip(original.greedy, candidate.greedy, strict=True),
            *zip(original.sampled, candidate.sampled, strict=True),
        )
    ]
    ended = [text[-1] in decoder.ends for text in original.greedy]
    stopping = [(left.ends[-1], right.ends[-1]) for (left, right), end in zip(pairs, ended, strict=True) if end]
    going_on = [
        (_no_end(left.ends, end), _no_end(right.ends, end)) for (left, right), end in zip(pairs, ended, strict=True)
    ]
    return (
        generation_checks.generation_check(len(original.greedy)),
        generation_checks.decoding_check(
            _mean([reading.shift for reading in candidate.readings]),
            noise,
            _mean([reading.agreement_cached for reading in candidate.readings]),
            decoder.cache_failure,
        ),
        generation_checks.repetition_check(repetitions),
        generation_checks.ends_check(stopping, going_on if decoder.ends else []),
    )


def _no_end(ends: tuple[float, ...], ended: bool) -> float:
    """The probability not to end within a text, or before its own end."""
    return math.prod(1.0 - end for end in (ends[:-1] if ended else ends))


def _record(
    pair: Pair,
    encoded: Sequence[torch.Tensor],
    original: _Performance,
    candidate: _Performance,
    new_tokens: int,
    seed: int,
) -> Generation:
    samples = tuple(
        Sample(
            prompt=prompt,
            reference_greedy=_text(pair, original.greedy[index]),
            candidate_greedy=_text(pair, candidate.greedy[index]),
            first_divergence=first_divergence(original.greedy[index], candidate.greedy[index]),
            reference_sampled=_text(pair, original.sampled[index]),
            candidate_sampled=_text(pair, candidate.sampled[index]),
            reference_sampled_nll=_nll(pair.reference, encoded[index], original.sampled[index]),
            candidate_sampled_nll=_nll(pair.reference, encoded[index], candidate.sampled[index]),
        )
        for index, prompt in enumerate(prompts(pair.chat))
    )
    return Generation(
        new_tokens=new_tokens,
        seed=seed,
        temperature=TEMPERATURE,
        top_k=TOP_K,
        top_p=TOP_P,
        identical_at_16=share_identical(samples, 16),
        identical_at_32=share_identical(samples, 32),
        prefill_agreement=_mean([reading.agreement_at_once for reading in candidate.readings]),
        cached_agreement=_mean([reading.agreement_cached for reading in candidate.readings]),
        reference_repetition=_mean([repetition(text) for text in original.greedy]),
        candidate_repetition=_mean([repetition(text) for text in candidate.greedy]),
        samples=samples,
    )


def repetition(tokens: list[int], size: int = REPETITION_GRAM) -> float:
    """Share of `size`-grams that occurred before in `tokens`: 0 for a text without repeats."""
    grams = [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def first_divergence(left: list[int], right: list[int]) -> int | None:
    """Tokens that agree before the first that does not; None when both are equal."""
    for position, (token, other) in enumerate(zip(left, right, strict=False)):
        if token != other:
            return position
    return None if len(left) == len(right) else min(len(left), len(right))


def _encode(pair: Pair, prompt: str) -> torch.Tensor:
    """A prompt's ids [1, length], with room for an answer in the model's context."""
    import torch

    ids = framing.prompt(pair.tokenizer, prompt, pair.chat)
    return torch.tensor([ids[: pair.context - 1]], device=pair.device)


def _at_once(model: Any, ids: torch.Tensor, text: list[int]) -> torch.Tensor:
    """Logits [tokens, vocabulary] for each token of `text` after `ids`, float32."""
    import torch

    joined = torch.cat([ids, torch.tensor([text], device=ids.device)], dim=1)
    with torch.inference_mode():
        logits: torch.Tensor = model(joined).logits[0, ids.shape[1] - 1 : -1]
    return logits.float().to(ids.device)


def _agreement(logits: torch.Tensor, text: list[int]) -> float:
    return _mean([float(top == token) for top, token in zip(logits.argmax(-1).tolist(), text, strict=True)])


def _nll(model: Any, ids: torch.Tensor, text: list[int]) -> float:
    """Mean nats per token of `text` after `ids` under `model`."""
    import torch

    targets = torch.tensor(text, device=ids.device)
    return float(torch.nn.functional.cross_entropy(_at_once(model, ids, text), targets))


def share_identical(samples: tuple[Sample, ...], length: int) -> float:
    """Share of the samples whose greedy texts agree in their first `length` tokens."""
    return _mean([float(sample.first_divergence is None or sample.first_divergence >= length) for sample in samples])


def _text(pair: Pair, tokens: list[int]) -> str:
    return str(pair.tokenizer.decode(tokens, skip_special_tokens=True))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 1.0
