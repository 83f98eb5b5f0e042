"""The scale on which a quantized model is graded, and the limits of each grade."""

from __future__ import annotations

GRADES = ("lossless", "parity", "good", "degraded", "failed")
"""From best to worst; CHANGED stands outside the order."""
PASSING_GRADES = GRADES[:-1]
"""What may be required of a package."""
CHANGED = "changed"
"""Implausibly good: another model, not a copy."""
UNMEASURED = "unmeasured"
"""In place of a grade, where somebody asked for no measurement."""
LIMITS = {"lossless": (1.005, 0.006), "parity": (1.01, 0.02), "good": (1.03, 0.06), "degraded": (1.05, 0.10)}
"""Per grade the largest perplexity ratio and the largest mean KLD (nats)."""
IMPLAUSIBLE_RATIO = 0.97
"""A candidate whose ratio may lie below it is not a better copy but another model."""


def grade_of(ratio_low: float, ratio_high: float, kld_high: float) -> str:
    """The best grade whose limits both unfavourable bounds keep; `changed` when the ratio is too good."""
    if ratio_low < IMPLAUSIBLE_RATIO:
        return CHANGED
    for grade, (ratio_limit, kld_limit) in LIMITS.items():
        if ratio_high <= ratio_limit and kld_high <= kld_limit:
            return grade
    return GRADES[-1]


def grade_at_least(grade: str, required: str) -> bool:
    """Whether `grade` is as good as `required`; a model graded `changed` never is."""
    return grade in GRADES and GRADES.index(grade) <= GRADES.index(required)
