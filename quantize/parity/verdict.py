"""The gate: the worse end of an interval decides on the grade, never the point estimate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from quantize.errors import PackageError
from quantize.evidence import Check, Estimate, Evidence, Look, LookPlan, Pictures, Scores, Verdict
from quantize.grades import CHANGED, GRADES, IMPLAUSIBLE_RATIO, LIMITS, UNMEASURED, grade_at_least, grade_of
from quantize.parity import sequential

SMALLEST = 1e-12
"""Divergence (nats) below which there is none."""


def unmeasured(checks: Sequence[Check], required: str) -> Verdict:
    """The verdict on a candidate that was not to be measured: it never passes."""
    reasons = [f"{check.name}: {check.detail}" for check in checks if not check.passed]
    return Verdict(GRADES[-1] if reasons else UNMEASURED, required, False, (*reasons, "it was not measured"))


def judged(evidence: Evidence, required: str) -> Evidence:
    """The evidence with everything that follows from its recorded figures and the grade `required`.

    These are the looks, the two intervals that decide, and the verdict. Looks that were planned to settle another
    grade count where they pass it, and are taken anew otherwise. Evidence from before windows' figures were recorded
    keeps its looks and intervals. Raises PackageError where too few figures are recorded for a single look.
    """
    scores, plan, looks, framing = evidence.scores, evidence.look_plan, evidence.looks, evidence.chat_framing
    if scores is not None and plan is not None:
        scores, plan, looks = _rejudged(scores, plan, required)
    if framing is not None:
        framed, framed_plan, framed_looks = _rejudged(framing.scores, framing.look_plan, required)
        framing = dataclasses.replace(framing, scores=framed, look_plan=framed_plan, looks=framed_looks)
    pictures = evidence.pictures
    if pictures is not None:
        kld, same_top = sequential.of_pictures(pictures.figures, pictures.seed, 1.0 - evidence.confidence)
        pictures = dataclasses.replace(pictures, kld=kld, same_top=same_top)
    verdict = gate(evidence.checks, scores, required, framing.scores if framing else None, pictures)
    return dataclasses.replace(
        evidence,
        scores=scores,
        look_plan=plan,
        looks=looks,
        chat_framing=framing,
        pictures=pictures,
        verdict=verdict,
    )


def _rejudged(scores: Scores, plan: LookPlan, required: str) -> tuple[Scores, LookPlan, tuple[Look, ...]]:
    """Scores with the intervals of the last look, the plan, and the looks that follow from it and recorded figures."""
    looks = sequential.looks(scores.window_figures, plan)
    if looks and not sequential.is_passed(looks[-1].perplexity_ratio, looks[-1].kld, plan.required):
        plan = dataclasses.replace(plan, required=required)
        looks = sequential.looks(scores.window_figures, plan)
    if not looks:
        raise PackageError("the evidence has too few figures of windows for a verdict: measure the package again")
    kld = dataclasses.replace(scores.kld, mean=looks[-1].kld)
    return dataclasses.replace(scores, perplexity_ratio=looks[-1].perplexity_ratio, kld=kld), plan, looks


def gate(
    checks: Sequence[Check],
    scores: Scores | None,
    required: str,
    chat: Scores | None = None,
    pictures: Pictures | None = None,
) -> Verdict:
    """The verdict on a candidate that has to reach the grade `required`.

    In a `chat` and in answers about `pictures` as well, where those are scored.
    """
    reasons = [f"{check.name}: {check.detail}" for check in checks if not check.passed]
    if scores is None:
        return Verdict(GRADES[-1], required, False, tuple(reasons))
    grades = [_grade(scores)]
    reasons += _shortfalls(scores, required, "")
    if chat is not None:
        grades.append(_grade(chat))
        reasons += _shortfalls(chat, required, " in the chat template")
    if pictures is not None:
        grades.append(grade_of(1.0, 1.0, pictures.kld.high))
        reasons += _kld_shortfall(pictures.kld, required, " of answers about pictures")
    grade = max(grades, key=(*GRADES, CHANGED).index)
    return Verdict(
        GRADES[-1] if any(not check.passed for check in checks) else grade,
        required,
        not reasons and grade_at_least(grade, required),
        tuple(reasons),
    )


def headroom(evidence: Evidence, grade: str) -> float:
    """Times its divergence a candidate could diverge and be graded so: below 1 where it is not as good.

    0 where it is refused for another reason than how far it is from the original. Bounds from few windows count as they
    would be after all of them: a verdict that was certain early says little about how far it is from its limit.
    """
    if evidence.scores is None or any(not check.passed for check in evidence.checks):
        return 0.0
    framings = [(evidence.scores, evidence.looks, evidence.look_plan)]
    if evidence.chat_framing is not None:
        framing = evidence.chat_framing
        framings.append((framing.scores, framing.looks, framing.look_plan))
    if any(scores.perplexity_ratio.value < IMPLAUSIBLE_RATIO for scores, _, _ in framings):
        return 0.0
    ratio_limit, kld_limit = LIMITS[grade]
    klds = [_high(scores.kld.mean, _unread(looks, plan)) for scores, looks, plan in framings]
    ratios = [math.log(_high(scores.perplexity_ratio, _unread(looks, plan))) for scores, looks, plan in framings]
    if evidence.pictures is not None:
        klds.append(evidence.pictures.kld.high)
    return min(kld_limit / max(*klds, SMALLEST), math.log(ratio_limit) / max(*ratios, SMALLEST))


def _high(estimate: Estimate, share: float) -> float:
    """The upper bound with a share of its distance from the value."""
    return estimate.value + share * (estimate.high - estimate.value)


def _unread(looks: Sequence[Look], plan: LookPlan | None) -> float:
    """By how much an interval would shrink if all windows were read."""
    return math.sqrt(looks[-1].windows / plan.windows) if looks and plan else 1.0


def _grade(scores: Scores) -> str:
    """The grade of these scores; whose perplexity is not lower than the original's is no other model, but perhaps
    measured on too few windows to say so."""
    ratio, kld = scores.perplexity_ratio, scores.kld.mean
    low = max(ratio.low, IMPLAUSIBLE_RATIO) if ratio.value >= 1 else ratio.low
    return grade_of(low, ratio.high, kld.high)


def _shortfalls(scores: Scores, required: str, where: str) -> list[str]:
    """Why these scores do not reach the grade `required`."""
    ratio, kld = scores.perplexity_ratio, scores.kld.mean
    if _grade(scores) == CHANGED:
        return [
            f"perplexity ratio {ratio.value:.4f}{where} may lie below {IMPLAUSIBLE_RATIO}: this is another model, not "
            f"a quantized version of the original"
        ]
    limit, reasons = LIMITS[required][0], []
    if ratio.high > limit:
        reasons.append(f"perplexity ratio{where} up to {ratio.high:.4f}, {required} allows {limit}")
    reasons += _kld_shortfall(kld, required, where)
    if ratio.low < IMPLAUSIBLE_RATIO:
        reasons.append(
            f"perplexity ratio{where} from {ratio.low:.4f} on: too few windows to tell it from another model, below "
            f"{IMPLAUSIBLE_RATIO}"
        )
    return reasons


def _kld_shortfall(kld: Estimate, required: str, where: str) -> list[str]:
    limit = LIMITS[required][1]
    return [f"mean KLD{where} up to {kld.high:.4f}, {required} allows {limit}"] if kld.high > limit else []
