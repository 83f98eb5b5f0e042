"""Both models continue the same prompts: greedily, sampled with the same seed, by prefill and with the cache."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import TYPE_CHECKING, Any

from quantize.parity.loading import Pair
from quantize.records import Generation, Sample

if TYPE_CHECKING:
    import torch

TEMPERATURE, TOP_K, TOP_P = 1.0, 50, 0.95
REPETITION_GRAM = 4


def prompts() -> tuple[str, ...]:
    """The built-in prompts, one a line."""
    text = resources.files("quantize.parity").joinpath("prompts.txt").read_text("utf-8")
    return tuple(line for line in text.splitlines() if line)


def compare(pair: Pair, new_tokens: int, seed: int, advance: Callable[[int], None]) -> Generation:
    """Continue every prompt by up to `new_tokens` tokens with both models and compare."""
    rows = []
    for prompt in prompts():
        rows.append(_compare_prompt(pair, prompt, new_tokens, seed))
        advance(1)
    samples = tuple(sample for sample, _ in rows)
    agreements = [agreement for _, agreement in rows]
    return Generation(
        new_tokens=new_tokens,
        seed=seed,
        temperature=TEMPERATURE,
        top_k=TOP_K,
        top_p=TOP_P,
        identical_at_16=_identical(samples, 16),
        identical_at_32=_identical(samples, 32),
        prefill_agreement=_mean([agreement["prefill"] for agreement in agreements]),
        cached_agreement=_mean([agreement["cached"] for agreement in agreements]),
        reference_repetition=_mean([agreement["reference_repetition"] for agreement in agreements]),
        candidate_repetition=_mean([agreement["candidate_repetition"] for agreement in agreements]),
        samples=samples,
    )


def repetition(tokens: list[int], size: int = REPETITION_GRAM) -> float:
    """Share of `size`-grams that occurred before in `tokens`: 0 for a text without repeats."""
    grams = [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def first_divergence(left: list[int], right: list[int]) -> int | None:
    """Tokens that agree before the first that does not; None when both are equal."""
    for position, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return position
    return None if len(left) == len(right) else min(len(left), len(right))


def _compare_prompt(pair: Pair, prompt: str, new_tokens: int, seed: int) -> tuple[Sample, dict[str, float]]:
    ids = pair.tokenizer(prompt, return_tensors="pt", add_special_tokens=True).input_ids.to(pair.device)
    limit = max(1, min(new_tokens, pair.context - ids.shape[1]))
    greedy = [_continue(pair, model, ids, limit, None) for model in (pair.reference, pair.candidate)]
    sampled = [_continue(pair, model, ids, limit, seed) for model in (pair.reference, pair.candidate)]
    sample = Sample(
        prompt=prompt,
        reference_greedy=_text(pair, greedy[0]),
        candidate_greedy=_text(pair, greedy[1]),
        first_divergence=first_divergence(greedy[0], greedy[1]),
        reference_sampled=_text(pair, sampled[0]),
        candidate_sampled=_text(pair, sampled[1]),
        reference_sampled_nll=_nll(pair.reference, ids, sampled[0]),
        candidate_sampled_nll=_nll(pair.reference, ids, sampled[1]),
    )
    agreement = {
        "prefill": _prefill_agreement(pair.candidate, ids, greedy[0]),
        "cached": _cached_agreement(pair.candidate, ids, greedy[0]),
        "reference_repetition": repetition(greedy[0]),
        "candidate_repetition": repetition(greedy[1]),
    }
    return sample, agreement


def _continue(pair: Pair, model: Any, ids: torch.Tensor, limit: int, seed: int | None) -> list[int]:
    """New tokens after `ids` [1, length], decoded one at a time with the cache; greedy without a seed."""
    import torch
    from transformers import GenerationConfig, set_seed

    sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K, "top_p": TOP_P}
    ends = pair.tokenizer.eos_token_id
    config = GenerationConfig(
        max_new_tokens=limit,
        eos_token_id=ends,
        pad_token_id=ends,
        **({"do_sample": False} if seed is None else sampling),
    )
    if seed is not None:
        set_seed(seed)
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return [int(token) for token in output[0, ids.shape[1] :]]


def _prefill_agreement(model: Any, ids: torch.Tensor, continuation: list[int]) -> float:
    import torch

    with torch.inference_mode():
        logits = model(_joined(ids, continuation)).logits[0, ids.shape[1] - 1 : -1]
    return _mean([float(top == right) for top, right in zip(logits.argmax(-1).tolist(), continuation, strict=True)])


def _cached_agreement(model: Any, ids: torch.Tensor, continuation: list[int]) -> float:
    import torch

    agreed = []
    with torch.inference_mode():
        state = model(ids, use_cache=True)
        for token in continuation:
            agreed.append(float(int(state.logits[0, -1].argmax()) == token))
            following = torch.tensor([[token]], device=ids.device)
            state = model(following, past_key_values=state.past_key_values, use_cache=True)
    return _mean(agreed)


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


def _identical(samples: tuple[Sample, ...], length: int) -> float:
    return _mean([float(sample.first_divergence is None or sample.first_divergence >= length) for sample in samples])


def _text(pair: Pair, tokens: list[int]) -> str:
    return str(pair.tokenizer.decode(tokens, skip_special_tokens=True))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 1.0
