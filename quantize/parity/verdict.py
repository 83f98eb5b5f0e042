"""The gate: the worse end of an interval decides on the grade, never the point estimate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from quantize.errors import PackageError
from quantize.evidence import Check, Evidence, Scores, Verdict
from quantize.grades import CHANGED, GRADES, IMPLAUSIBLE_RATIO, LIMITS, UNMEASURED, grade_at_least, grade_of
from quantize.parity import sequential


def unmeasured(checks: Sequence[Check], required: str) -> Verdict:
    """The verdict on a candidate that was not to be measured: it never passes."""
    reasons = [f"{check.name}: {check.detail}" for check in checks if not check.passed]
    return Verdict(GRADES[-1] if reasons else UNMEASURED, required, False, (*reasons, "it was not measured"))


def judged(evidence: Evidence, required: str) -> Evidence:
    """The evidence with everything that follows from its recorded figures and the grade `required`.

    These are the looks, the two intervals that decide, and the verdict. Evidence from before windows' figures were
    recorded keeps its looks and intervals. Raises PackageError where too few figures are recorded for a single look.
    """
    scores, looks = evidence.scores, evidence.looks
    if scores is not None and evidence.look_plan is not None:
        looks = sequential.looks(scores.window_figures, evidence.look_plan, required)
        if not looks:
            raise PackageError("the evidence has too few figures of windows for a verdict: measure the package again")
        kld = dataclasses.replace(scores.kld, mean=looks[-1].kld)
        scores = dataclasses.replace(scores, perplexity_ratio=looks[-1].perplexity_ratio, kld=kld)
    verdict = gate(evidence.checks, scores, required)
    return dataclasses.replace(evidence, scores=scores, looks=looks, verdict=verdict)


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
