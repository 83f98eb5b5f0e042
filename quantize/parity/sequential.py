"""When to stop: windows come in random order, so scoring ends as soon as the verdict is certain.

A model *passes early* by a bound that holds at all early looks at once and knows that windows may be rare and bad: a
betting confidence sequence (quantize/parity/betting.py) on losses of at most `LARGEST_LOSS` times their limit. It is
*refused early* by plain intervals, whose looks share the error evenly (Bonferroni). At the last look, the only one that
is not early, plain intervals of 95 % decide. So a wrong verdict of either kind has at most half of `ERROR` early and
half at the end, and several attempts on the same windows share that.

A plain interval is the hull of three: Student's; Hall's (1992), which corrects for skewness; and one for the windows
that so few can all have missed. docs/parity.md compares stopping rules by simulation (scripts/stopping_rules.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quantize.evidence import Estimate, Look, LookPlan, PictureFigures, WindowFigures
from quantize.grades import IMPLAUSIBLE_RATIO, LIMITS, PASSING_GRADES
from quantize.parity.betting import upper_bound
from quantize.parity.scoring import TokenScores
from quantize.parity.statistics import exponential, mean_estimates

if TYPE_CHECKING:
    from numpy.typing import NDArray

FIRST_LOOK = 16
GROWTH = 1.1
ERROR = 0.05
LARGEST_LOSS = 26.0
"""The most that one window may lose, in multiples of the limit: so that 2 % of windows 51 times as bad are covered."""
WORSE = 2.0
"""How many times as far off the mean as the worst window seen, on the same side, those may lie that were missed."""
SMALLEST_DEVIATION = 0.005
"""By how much a window that was not seen may always deviate (nats): what the best grade allows on average."""
DIGITS = 9
"""Significant digits of recorded window figures, which are the ones that are judged."""


@dataclass(frozen=True)
class Stop:
    """A number of windows after which to look, and the `error` of its plain intervals.

    `early_error` is that of the bounds by which all early looks may pass a model, at one side; None at the last look.
    """

    windows: int
    error: float
    early_error: float | None = None


def plan(windows: int, required: str, *, full: bool = False, attempts: int = 1) -> LookPlan:
    """Up to how many windows one of `attempts` attempts on the same windows is scored, and its share of the error."""
    return LookPlan(windows, required, full, ERROR / attempts)


def stops(planned: LookPlan) -> tuple[Stop, ...]:
    """After how many windows to look; the last look, the only one of a full plan, is at all of them."""
    early: list[int] = []
    count = FIRST_LOOK
    while count < planned.windows and not planned.full:
        early.append(count)
        count = math.ceil(count * GROWTH)
    return (
        *(Stop(count, planned.error / len(early), planned.error / 2) for count in early),
        Stop(planned.windows, planned.error),
    )


def figures_of(tokens: TokenScores) -> WindowFigures:
    """What is recorded of every scored window, and judged."""
    difference = (tokens.nll_candidate - tokens.nll_reference).mean(axis=1)
    return WindowFigures(rounded(difference), rounded(np.maximum(tokens.kld, 0.0).mean(axis=1)))


def looks(figures: WindowFigures, planned: LookPlan) -> tuple[Look, ...]:
    """The looks of a plan at the figures of the windows scored so far.

    A pure function of what the evidence records: measuring stops when the last of them is certain, and whoever doubts
    a verdict can repeat it.
    """
    count = len(figures.kld)
    return tuple(look(figures, stop, planned.required) for stop in stops(planned) if stop.windows <= count)


def look(figures: WindowFigures, stop: Stop, required: str) -> Look:
    """The intervals of the first `stop.windows` windows, and whether they settle the verdict.

    Where they pass a model early, they are those of the best grade that they leave no doubt about.
    """
    difference = np.array(figures.nll_difference[: stop.windows])
    divergence = np.array(figures.kld[: stop.windows])
    ratio, kld = interval(difference, stop.error), interval(divergence, stop.error)
    refused = is_refused(exponential(ratio), kld, required)
    if stop.early_error is not None and not refused:
        low = -_early_bound(-difference, -math.log(IMPLAUSIBLE_RATIO), stop.early_error)
        for grade in PASSING_GRADES[: PASSING_GRADES.index(required) + 1]:
            ratio_limit, kld_limit = LIMITS[grade]
            ratio = Estimate(ratio.value, low, _early_bound(difference, math.log(ratio_limit), stop.early_error))
            kld = Estimate(kld.value, kld.low, _early_bound(divergence, kld_limit, stop.early_error))
            if is_passed(exponential(ratio), kld, grade):
                break
    kld = Estimate(kld.value, max(kld.low, 0.0), kld.high)
    certain = refused or is_passed(exponential(ratio), kld, required)
    return Look(stop.windows, stop.error, exponential(ratio), kld, certain)


def interval(means: NDArray[np.float64], error: float) -> Estimate:
    """Mean of window means [count] with its plain interval of level 1 - `error`."""
    low, high = bounds(means, error)
    return Estimate(float(means.mean()), float(low), float(high))


def of_pictures(figures: PictureFigures, seed: int, error: float) -> tuple[Estimate, Estimate]:
    """Mean KLD and share of equal most likely tokens with intervals of level 1 - `error` over pictures.

    All of them are scored before the only look, so nothing is to be corrected for having stopped.
    """
    kld = interval(np.array(figures.kld), error)
    (same_top,) = mean_estimates([np.array(figures.same_top)[:, None]], seed, error)
    return Estimate(kld.value, max(kld.low, 0.0), kld.high), same_top


def bounds(means: NDArray[np.float64], error: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both ends [...] of the plain interval of level 1 - `error` around the means of `means` [..., count]."""
    from scipy import special

    count, mean = means.shape[-1], means.mean(axis=-1)
    standard_error = means.std(axis=-1, ddof=1) / math.sqrt(count)
    quantile = float(special.stdtrit(count - 1, 1 - error / 2))
    skewness = _skewness(means) / math.sqrt(count)
    students = standard_error * quantile
    halls = [standard_error * _halls_inverse(sign * quantile, skewness) for sign in (-1, 1)]
    missed = missed_share(count, error / 2)
    below = missed * _deviation(mean, mean - means.min(axis=-1))
    above = missed * _deviation(mean, means.max(axis=-1) - mean)
    low = mean - np.maximum.reduce([students, halls[1], below])
    return low, mean + np.maximum.reduce([students, -halls[0], above])


def missed_share(count: int, error: float) -> float:
    """The share of windows, all of one kind, of which `count` random ones hold none with the probability `error`."""
    return float(1.0 - error ** (1.0 / count))


def is_passed(ratio: Estimate, kld: Estimate, required: str) -> bool:
    """Whether these intervals leave nothing but a model that has the required grade."""
    ratio_limit, kld_limit = LIMITS[required]
    return ratio.low >= IMPLAUSIBLE_RATIO and ratio.high <= ratio_limit and kld.high <= kld_limit


def is_refused(ratio: Estimate, kld: Estimate, required: str) -> bool:
    """Whether these intervals leave nothing but a model that lacks the required grade."""
    ratio_limit, kld_limit = LIMITS[required]
    return ratio.low > ratio_limit or kld.low > kld_limit or ratio.high < IMPLAUSIBLE_RATIO


def _early_bound(values: NDArray[np.float64], limit: float, error: float) -> float:
    """The upper end of an early look, which knows of bad windows that are rare."""
    return float(upper_bound(values, LARGEST_LOSS * limit, error))


def _deviation(means: NDArray[np.float64], worst: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far off the mean [...] a window that was missed is taken to lie, where the `worst` one seen lies so far."""
    return np.asarray(np.maximum.reduce([WORSE * worst, np.abs(means), np.full_like(means, SMALLEST_DEVIATION)]))


def _skewness(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The adjusted Fisher-Pearson coefficient of at least three values [..., count]; 0 where they are all alike."""
    count, deviations = values.shape[-1], values - values.mean(axis=-1, keepdims=True)
    variance = (deviations**2).mean(axis=-1)
    alike = variance <= 1e-30 * np.maximum(1.0, values.mean(axis=-1) ** 2)
    third = (deviations**3).mean(axis=-1) / np.where(alike, 1.0, variance) ** 1.5
    adjusted = third * (math.sqrt(count * (count - 1)) / (count - 2))
    return np.where(alike, 0.0, adjusted)


def _halls_inverse(quantile: float, skewness: NDArray[np.float64]) -> NDArray[np.float64]:
    """The studentized mean whose skewness-corrected value is `quantile`; `skewness` is that of the sample / sqrt(n).

    Hall's cubic g(t) = t + a t^2 / 3 + a^2 t^3 / 27 + a / 6 with a = `skewness`, inverted in closed form.
    """
    straight = np.abs(skewness) < 1e-9
    slope = np.where(straight, 1.0, skewness)
    bent = 3 / slope * (np.cbrt(1 + slope * (quantile - slope / 6)) - 1)
    return np.where(straight, quantile, bent)


def rounded(values: Iterable[float]) -> tuple[float, ...]:
    """Figures as they are recorded."""
    return tuple(float(f"{value:.{DIGITS}g}") for value in values)
