"""Grades and the gate: the unfavourable end of an interval decides, never the point estimate."""

from __future__ import annotations

from collections.abc import Sequence

from quantize.records import GRADES, UNMEASURED, Check, Scores, Verdict, grade_at_least

LIMITS = {"lossless": (1.005, 0.006), "parity": (1.01, 0.02), "good": (1.03, 0.06), "degraded": (1.05, 0.10)}
"""Per grade the largest perplexity ratio and the largest mean KLD (nats)."""
IMPLAUSIBLE_RATIO = 0.97
"""A candidate whose ratio may lie below it is not a better copy but another model."""
CHANGED = "changed"


def grade_of(ratio_low: float, ratio_high: float, kld_high: float) -> str:
    """The best grade whose limits both unfavourable bounds keep; `changed` when the ratio is too good."""
    if ratio_low < IMPLAUSIBLE_RATIO:
        return CHANGED
    for grade, (ratio_limit, kld_limit) in LIMITS.items():
        if ratio_high <= ratio_limit and kld_high <= kld_limit:
            return grade
    return GRADES[-1]


def unmeasured(checks: Sequence[Check], required: str) -> Verdict:
    """The verdict on a candidate that nobody wanted to be measured: it never passes."""
    reasons = [f"{check.name}: {check.detail}" for check in checks if not check.passed]
    return Verdict(GRADES[-1] if reasons else UNMEASURED, required, False, (*reasons, "it was not measured"))


def judge(checks: Sequence[Check], scores: Scores | None, required: str) -> Verdict:
    """The verdict on a candidate that has to reach the grade `required`."""
    reasons = [f"{check.name}: {check.detail}" for check in checks if not check.passed]
    if scores is None:
        return Verdict(GRADES[-1], required, False, tuple(reasons))
    ratio, kld = scores.perplexity_ratio, scores.kld.mean
    grade = grade_of(ratio.low, ratio.high, kld.high)
    if grade == CHANGED:
        reasons.append(
            f"perplexity ratio {ratio.value:.4f} may lie below {IMPLAUSIBLE_RATIO}: this is another model, not a copy"
        )
    elif not grade_at_least(grade, required):
        ratio_limit, kld_limit = LIMITS[required]
        if ratio.high > ratio_limit:
            reasons.append(f"perplexity ratio up to {ratio.high:.4f}, {required} allows {ratio_limit}")
        if kld.high > kld_limit:
            reasons.append(f"mean KLD up to {kld.high:.4f}, {required} allows {kld_limit}")
    return Verdict(
        GRADES[-1] if any(not check.passed for check in checks) else grade,
        required,
        not reasons and grade_at_least(grade, required),
        tuple(reasons),
    )
