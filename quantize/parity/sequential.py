"""When to stop: windows come in random order, so scoring ends as soon as the verdict is certain.

The total error of 5 % is divided among the looks: half of it evenly over the early ones, half for the last. By the
union bound all looks' intervals then hold at once with at least 95 %, however many looks there are and whatever made
scoring stop (Bonferroni-type alpha spending, after Lan and DeMets 1983).

One look's interval is the hull of two: Student's, and Hall's (1992), which corrects for skewness. Window means of
divergences are skewed to the right, and Student's interval alone would then pass bad models too often; a simulation
in tests/parity/test_sequential.py shows the error rates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quantize.evidence import Estimate, Look
from quantize.grades import IMPLAUSIBLE_RATIO, LIMITS
from quantize.parity.scoring import TokenScores
from quantize.parity.statistics import exponential

if TYPE_CHECKING:
    from numpy.typing import NDArray

FIRST_LOOK = 16
GROWTH = 1.5
ERROR = 0.05
EARLY_SHARE = 0.5


@dataclass(frozen=True)
class Stop:
    """A number of windows after which to look, and the error that its intervals may have."""

    windows: int
    error: float


def plan(windows: int, *, full: bool = False) -> tuple[Stop, ...]:
    """After how many of `windows` windows to look; the last look, the only one when `full`, is at all of them."""
    if full:
        return (Stop(windows, ERROR),)
    early: list[int] = []
    count = FIRST_LOOK
    while count < windows:
        early.append(count)
        count = math.ceil(count * GROWTH)
    spent = EARLY_SHARE * ERROR if early else 0.0
    return (*(Stop(count, spent / len(early)) for count in early), Stop(windows, ERROR - spent))


def look(tokens: TokenScores, stop: Stop, required: str) -> Look:
    """The intervals of `tokens`, the scores up to `stop`, and whether they settle the verdict."""
    difference = tokens.nll_candidate - tokens.nll_reference
    log_ratio = interval(difference.mean(axis=1), stop.error)
    kld = interval(np.maximum(tokens.kld, 0.0).mean(axis=1), stop.error)
    ratio = exponential(log_ratio)
    return Look(stop.windows, stop.error, ratio, kld, is_certain(ratio, kld, required))


def interval(means: NDArray[np.float64], error: float) -> Estimate:
    """Mean of window means [count] with its interval of level 1 - `error`."""
    from scipy import special

    count, mean = len(means), float(means.mean())
    standard_error = float(means.std(ddof=1)) / math.sqrt(count)
    if standard_error <= 1e-15 * max(1.0, abs(mean)):
        return Estimate(mean, mean, mean)
    quantile = float(special.stdtrit(count - 1, 1 - error / 2))
    skewness = _skewness(means) / math.sqrt(count)
    halls = [mean - standard_error * _halls_inverse(sign * quantile, skewness) for sign in (-1, 1)]
    margin = standard_error * quantile
    return Estimate(mean, min(mean - margin, *halls), max(mean + margin, *halls))


def is_certain(ratio: Estimate, kld: Estimate, required: str) -> bool:
    """Whether these intervals leave only one verdict on the required grade: passed or refused."""
    ratio_limit, kld_limit = LIMITS[required]
    passed = ratio.low >= IMPLAUSIBLE_RATIO and ratio.high <= ratio_limit and kld.high <= kld_limit
    refused = ratio.low > ratio_limit or kld.low > kld_limit or ratio.high < IMPLAUSIBLE_RATIO
    return passed or refused


def _skewness(values: NDArray[np.float64]) -> float:
    """The adjusted Fisher-Pearson coefficient of at least three values."""
    count, deviations = len(values), values - values.mean()
    coefficient = float((deviations**3).mean() / (deviations**2).mean() ** 1.5)
    return coefficient * math.sqrt(count * (count - 1)) / (count - 2)


def _halls_inverse(quantile: float, skewness: float) -> float:
    """The studentized mean whose skewness-corrected value is `quantile`; `skewness` is that of the sample / sqrt(n).

    Hall's cubic g(t) = t + a t^2 / 3 + a^2 t^3 / 27 + a / 6 with a = `skewness`, inverted in closed form.
    """
    if abs(skewness) < 1e-9:
        return quantile
    return float(3 / skewness * (np.cbrt(1 + skewness * (quantile - skewness / 6)) - 1))
