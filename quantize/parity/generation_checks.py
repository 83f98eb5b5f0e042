"""What generated text must be for a package to pass: read alike with and without the cache, no loops, the same ends.

Limits come from noise. Where they cannot be told from it, the check says so and passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from quantize.evidence import Check
from quantize.parity.decoding import CannotGenerate, NotFinite

DECODING, REPETITION, ENDS, GENERATION = "cached decoding", "repetition", "end of text", "generation"
DECODING_FLOOR, DECODING_CEILING = 0.001, 0.1
"""Mean KLD (nats): what is never held against a package, and what even the grade degraded does not allow."""
NOISE_FACTOR = 10.0
REPETITION_EXCESS = 0.1
REPETITION_ERROR = 0.001
"""Of a package that repeats itself no more than the original does, the chance to be refused for it."""
ENDS_EXCESS, ENDS_EXCESS_OF_ONE = 0.25, 0.5
"""Probability by which ends may be missed on average over many texts, and what is added for a single one."""


def failure_check(failure: CannotGenerate | NotFinite, of_original: bool) -> Check:
    """For a model that generates nothing: a package is not to blame where its original does not either."""
    if isinstance(failure, NotFinite):
        whose = "the original's" if of_original else "this model's"
        return Check(GENERATION, False, f"{whose} logits hold NaN or infinity: try another --compute-dtype")
    if of_original:
        return Check(GENERATION, True, f"nothing to compare: the original's own generate fails ({failure})")
    return Check(GENERATION, False, f"the original generates text, and here generate fails ({failure})")


def generation_check(count: int) -> Check:
    """Both models went on after `count` prompts without NaN or infinity."""
    return Check(GENERATION, True, f"both models continue {count} prompts, with finite logits throughout")


def decoding_check(shift: float, noise: float, agreement: float, cache_failure: str) -> Check:
    """Whether the candidate says the same token by token with its cache as reading at once.

    `shift` is the mean KLD between the two, in nats, along the original's own text; `noise` that of the original, from
    the same cause or from half precision; `agreement` how often the most likely token is the original's. A
    `cache_failure` of the original leaves nothing to compare.
    """
    if cache_failure:
        return Check(
            DECODING, True, f"nothing to compare: the original's generate fails with a cache ({cache_failure})"
        )
    limit = max(DECODING_FLOOR, NOISE_FACTOR * noise)
    detail = (
        f"mean KLD {shift:.6f} nats between reading at once and token by token with the cache, along the original's "
        f"text (limit {limit:.4f}); {agreement:.1%} of the most likely tokens are the original's"
    )
    if limit > DECODING_CEILING:
        return Check(DECODING, True, f"{detail}. The original itself is too noisy for a limit (mean KLD {noise:.4f})")
    return Check(DECODING, shift <= limit, detail)


def repetition_check(pairs: Sequence[tuple[float, float]]) -> Check:
    """Whether the candidate repeats itself more than the original does.

    `pairs` are the shares of repeated 4-grams in the original's and the candidate's continuation of the same prompt.
    The excess counts that is left at the lower end of Student's interval over prompts.
    """
    from scipy import special

    count = len(pairs)
    means = [sum(side) / count for side in zip(*pairs, strict=True)]
    excess = means[1] - means[0]
    variance = sum((right - left - excess) ** 2 for left, right in pairs) / max(1, count - 1)
    quantile = float(special.stdtrit(max(1, count - 1), 1 - REPETITION_ERROR))
    certain = excess - quantile * math.sqrt(variance / count)
    detail = (
        f"{means[1]:.1%} of the 4-grams of its texts are repeats, {means[0]:.1%} of the original's (in excess for "
        f"certain: {max(0.0, certain):.1%}, limit {REPETITION_EXCESS:.0%})"
    )
    return Check(REPETITION, certain <= REPETITION_EXCESS, detail)


def ends_check(stopping: Sequence[tuple[float, float]], going_on: Sequence[tuple[float, float]]) -> Check:
    """Whether the candidate stops where the original stops, and nowhere before.

    Both hold probabilities of the original and of the candidate, along the original's texts: to end where it ended, and
    not to end before.
    """
    if not going_on:
        return Check(ENDS, True, "nothing to compare: no token is said to end a text")
    missed, early = _shortfall(stopping), _shortfall(going_on)
    detail = (
        f"{len(stopping)} of the original's {len(going_on)} texts end; there this model ends {_against(stopping)}, and "
        f"it does not end before {_against(going_on)}"
        if stopping
        else f"none of the original's {len(going_on)} texts ends; this model goes on {_against(going_on)}"
    )
    return Check(ENDS, missed <= _limit(stopping) and early <= _limit(going_on), detail)


def _shortfall(pairs: Sequence[tuple[float, float]]) -> float:
    return sum(left - right for left, right in pairs) / len(pairs) if pairs else 0.0


def _limit(pairs: Sequence[tuple[float, float]]) -> float:
    return ENDS_EXCESS + ENDS_EXCESS_OF_ONE / max(1, len(pairs))


def _against(pairs: Sequence[tuple[float, float]]) -> str:
    left, right = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
    return f"with probability {right:.2f} (the original: {left:.2f}, up to {_limit(pairs):.2f} less is allowed)"
