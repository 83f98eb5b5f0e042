"""The gate: the worse end of an interval decides on the grade, never the point estimate."""

from __future__ import annotations

from collections.abc import Sequence

from quantize.evidence import Check, Scores, Verdict
from quantize.grades import CHANGED, GRADES, IMPLAUSIBLE_RATIO, LIMITS, UNMEASURED, grade_at_least, grade_of


def unmeasured(checks: Sequence[Check], required: str) -> Verdict:
    """The verdict on a candidate that was not to be measured: it never passes."""
    reasons = [f"{check.name}: {check.detail}" for check in checks if not check.passed]
    return Verdict(GRADES[-1] if reasons else UNMEASURED, required, False, (*reasons, "it was not measured"))


def gate(checks: Sequence[Check], scores: Scores | None, required: str) -> Verdict:
    """The verdict on a candidate that has to reach the grade `required`."""
    reasons = [f"{check.name}: {check.detail}" for check in checks if not check.passed]
    if scores is None:
        return Verdict(GRADES[-1], required, False, tuple(reasons))
    ratio, kld = scores.perplexity_ratio, scores.kld.mean
    grade = grade_of(ratio.low, ratio.high, kld.high)
    if grade == CHANGED:
        reasons.append(
            f"perplexity ratio {ratio.value:.4f} may lie below {IMPLAUSIBLE_RATIO}: this is another model, not a "
            f"quantized version of the original"
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
