"""Both models continue the same prompts: greedily, sampled with the same seed, by prefill and with the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from quantize import devices
from quantize.evidence import Generation, Sample
from quantize.parity.models import Pair

if TYPE_CHECKING:
    import torch

TEMPERATURE, TOP_K, TOP_P = 1.0, 50, 0.95
REPETITION_GRAM = 4


def prompts() -> tuple[str, ...]:
    """The built-in prompts, one a line."""
    text = resources.files("quantize.parity").joinpath("prompts.txt").read_text("utf-8")
    return tuple(line for line in text.splitlines() if line)


@dataclass(frozen=True)
class _Continuation:
    """How one model continues one prompt, in tokens: greedily, and sampled under the seed."""

    greedy: list[int]
    sampled: list[int]


def compare(pair: Pair, new_tokens: int, seed: int, advance: Callable[[int], None]) -> Generation:
    """Continue every prompt by up to `new_tokens` tokens with both models and compare.

    One model does all its work before the other begins, and `advance` is called with the number of prompts done.
    """
    with devices.steady_attention():
        return _compare(pair, new_tokens, seed, advance)


def _compare(pair: Pair, new_tokens: int, seed: int, advance: Callable[[int], None]) -> Generation:
    encoded = [_encode(pair, prompt) for prompt in prompts()]
    limit = max(1, min(new_tokens, pair.context - max(ids.shape[1] for ids in encoded)))
    references = _continue_both(pair, pair.reference, encoded, limit, seed, advance)
    candidates = _continue_both(pair, pair.candidate, encoded, limit, seed, advance)
    texts = [reference.greedy for reference in references]
    prefill = [_prefill_agreement(pair.candidate, ids, text) for ids, text in zip(encoded, texts, strict=True)]
    cached = _cached_agreement(pair, pair.candidate, encoded, texts)
    samples = _samples(pair, encoded, references, candidates)
    return Generation(
        new_tokens=new_tokens,
        seed=seed,
        temperature=TEMPERATURE,
        top_k=TOP_K,
        top_p=TOP_P,
        identical_at_16=share_identical(samples, 16),
        identical_at_32=share_identical(samples, 32),
        prefill_agreement=_mean(prefill),
        cached_agreement=_mean(cached),
        reference_repetition=_mean([repetition(reference.greedy) for reference in references]),
        candidate_repetition=_mean([repetition(candidate.greedy) for candidate in candidates]),
        samples=samples,
    )


def _samples(
    pair: Pair,
    encoded: list[torch.Tensor],
    references: list[_Continuation],
    candidates: list[_Continuation],
) -> tuple[Sample, ...]:
    return tuple(
        Sample(
            prompt=prompt,
            reference_greedy=_text(pair, reference.greedy),
            candidate_greedy=_text(pair, candidate.greedy),
            first_divergence=first_divergence(reference.greedy, candidate.greedy),
            reference_sampled=_text(pair, reference.sampled),
            candidate_sampled=_text(pair, candidate.sampled),
            reference_sampled_nll=_nll(pair.reference, ids, reference.sampled),
            candidate_sampled_nll=_nll(pair.reference, ids, candidate.sampled),
        )
        for prompt, ids, reference, candidate in zip(prompts(), encoded, references, candidates, strict=True)
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
    ids: torch.Tensor = pair.tokenizer(prompt, return_tensors="pt", add_special_tokens=True).input_ids
    return ids.to(pair.device)


def _continue_both(
    pair: Pair, model: Any, encoded: list[torch.Tensor], limit: int, seed: int, advance: Callable[[int], None]
) -> list[_Continuation]:
    greedy, sampled = (_continue(pair, model, encoded, limit, choice) for choice in (None, seed))
    advance(len(encoded))
    return [_Continuation(*texts) for texts in zip(greedy, sampled, strict=True)]


def _continue(
    pair: Pair,
    model: Any,
    encoded: list[torch.Tensor],
    limit: int,
    seed: int | None,
    forcing: _TeacherForcing | None = None,
) -> list[list[int]]:
    """New tokens after each of `encoded` [1, length], side by side and one at a time with the cache.

    Greedy without a seed. Each text ends with its first end-of-text token, if it has one.
    """
    import torch
    from transformers import GenerationConfig, set_seed

    sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K, "top_p": TOP_P}
    eos = pair.tokenizer.eos_token_id
    config = GenerationConfig(
        max_new_tokens=limit,
        eos_token_id=eos,
        pad_token_id=eos or 0,
        **({"do_sample": False} if seed is None else sampling),
    )
    longest = max(ids.shape[1] for ids in encoded)
    padded = [torch.nn.functional.pad(ids, (longest - ids.shape[1], 0), value=eos or 0) for ids in encoded]
    masks = [torch.nn.functional.pad(torch.ones_like(ids), (longest - ids.shape[1], 0)) for ids in encoded]
    if seed is not None:
        set_seed(seed)
    with torch.inference_mode():
        output = model.generate(
            torch.cat(padded),
            attention_mask=torch.cat(masks),
            generation_config=config,
            logits_processor=[forcing] if forcing else [],
        )
    return [_until(row[longest:].tolist(), eos) for row in output]


def _until(tokens: list[int], eos: int | None) -> list[int]:
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


class _TeacherForcing:
    """A logits processor that makes a model write given texts, and records its own top token at each position."""

    def __init__(self, texts: list[list[int]], start: int) -> None:
        self.texts, self.start = texts, start
        self.tops: list[list[int]] = [[] for _ in texts]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        position = input_ids.shape[1] - self.start
        forced = torch.full_like(scores, -torch.inf)
        for row, (text, top) in enumerate(zip(self.texts, scores.argmax(-1).tolist(), strict=True)):
            if position < len(text):
                self.tops[row].append(top)
            forced[row, text[position] if position < len(text) else top] = 0.0
        return forced


def _prefill_agreement(model: Any, ids: torch.Tensor, continuation: list[int]) -> float:
    import torch

    with torch.inference_mode():
        logits = model(_joined(ids, continuation)).logits[0, ids.shape[1] - 1 : -1]
    return _mean([float(top == right) for top, right in zip(logits.argmax(-1).tolist(), continuation, strict=True)])


def _cached_agreement(pair: Pair, model: Any, encoded: list[torch.Tensor], texts: list[list[int]]) -> list[float]:
    forcing = _TeacherForcing(texts, max(ids.shape[1] for ids in encoded))
    _continue(pair, model, encoded, max(1, *map(len, texts)), None, forcing)
    return [
        _mean([float(top == right) for top, right in zip(tops, text, strict=True)])
        for tops, text in zip(forcing.tops, texts, strict=True)
    ]


def _nll(model: Any, ids: torch.Tensor, continuation: list[int]) -> float:
    """Mean nats per token of `continuation` after `ids` under `model`."""
    import torch

    if not continuation:
        return 0.0
    with torch.inference_mode():
        logits = model(_joined(ids, continuation)).logits[0, ids.shape[1] - 1 : -1].float()
    targets = torch.tensor(continuation, device=logits.device)
    return float(torch.nn.functional.cross_entropy(logits, targets))


def _joined(ids: torch.Tensor, continuation: list[int]) -> torch.Tensor:
    import torch

    return torch.cat([ids, torch.tensor([continuation], device=ids.device)], dim=1)


def share_identical(samples: tuple[Sample, ...], length: int) -> float:
    """Share of the samples whose greedy texts agree in their first `length` tokens."""
    return _mean([float(sample.first_divergence is None or sample.first_divergence >= length) for sample in samples])


def _text(pair: Pair, tokens: list[int]) -> str:
    return str(pair.tokenizer.decode(tokens, skip_special_tokens=True))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 1.0
