"""Stopping early: bounds that hold, looks that follow from what is recorded, and how often a verdict is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from quantize.evidence import Estimate, LookPlan, WindowFigures
from quantize.grades import LIMITS
from quantize.parity import betting, sequential

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
losses = arrays.arrays(np.float64, st.integers(8, 60), elements=st.floats(0, 25.9))


@given(st.integers(8, 5000), st.integers(1, 5))
def test_all_looks_together_spend_each_attempts_share_of_the_error(windows: int, attempts: int) -> None:
    plan = sequential.plan(windows, "good", attempts=attempts)
    *early, last = sequential.stops(plan)
    assert last.error == plan.error == pytest.approx(sequential.ERROR / attempts)
    assert sum(stop.error for stop in early) == pytest.approx(plan.error if early else 0.0)
    assert {stop.early_error for stop in early} <= {plan.error / 2} and last.early_error is None
    counts = [stop.windows for stop in (*early, last)]
    assert counts == sorted(set(counts)) and counts[-1] == windows
    assert sequential.stops(LookPlan(windows, "good", True, plan.error)) == (last,)


@given(losses, st.floats(1e-4, 0.2))
def test_the_bound_lies_above_the_mean_and_grows_with_every_loss(values: np.ndarray, error: float) -> None:
    bound = float(betting.upper_bound(values, 26.0, error))
    assert values.mean() <= bound <= 26.0
    assert bound <= float(betting.upper_bound(values + 0.1, 26.1, error))
    assert float(betting.upper_bound(values, 26.0, error / 2)) >= bound
    assert float(betting.upper_bound(np.append(values, 27.0), 26.0, error)) == 26.0


@given(st.integers(1, 500), st.floats(1e-4, 0.2))
def test_without_any_loss_the_bound_is_the_exact_binomial_one(count: int, error: float) -> None:
    exact = stats.binomtest(0, count).proportion_ci(1 - error * 2, "exact").high
    assert float(betting.upper_bound(np.zeros(count), 1.0, error)) == pytest.approx(exact, rel=1e-9)
    assert sequential.missed_share(count, error) == pytest.approx(exact, rel=1e-9)


def test_the_interval_is_students_for_symmetric_values_and_leans_with_skewed_ones() -> None:
    symmetric = np.array([-2.0, -1.0, 0.0, 1.0, 2.0] * 4)
    plain = sequential.interval(symmetric, 0.05)
    assert plain.value == 0.0 and plain.high == pytest.approx(-plain.low)
    assert plain.high == pytest.approx(2.0930 * symmetric.std(ddof=1) / math.sqrt(20), rel=1e-4)
    skewed = sequential.interval(np.exp(symmetric), 0.05)
    assert skewed.high - skewed.value > 1.2 * (skewed.value - skewed.low)


@given(st.integers(0, 2**31), st.integers(8, 500), st.floats(1e-4, 0.2))
@settings(max_examples=20, deadline=None)
def test_the_interval_rests_on_scipys_quantile_and_skewness(seed: int, count: int, error: float) -> None:
    """Its fast formulas against scipy.stats, which checks more and takes 50 times as long."""
    values = np.random.default_rng(seed).gamma(1.0, 1.0, count)
    reach = float(stats.t.ppf(1 - error / 2, count - 1)) * values.std(ddof=1) / math.sqrt(count)
    interval = sequential.interval(values, error)
    assert interval.low <= values.mean() - reach * (1 - 1e-9) and interval.high >= values.mean() + reach * (1 - 1e-9)
    skewness = float(sequential._skewness(values))
    assert skewness == pytest.approx(float(stats.skew(values, bias=False)), rel=1e-9)


@given(st.integers(8, 500), st.floats(0, 10), st.floats(0, 1e-6))
def test_no_interval_is_narrower_than_so_few_windows_can_carry(count: int, mean: float, spread: float) -> None:
    """Windows that all say the same leave room for others, that were all missed and are twice as bad."""
    values = mean + spread * np.linspace(-1, 1, count)
    interval = sequential.interval(values, 0.05)
    least = (1 - 0.025 ** (1 / count)) * max(mean, sequential.SMALLEST_DEVIATION)
    assert interval.high - interval.value >= least * (1 - 1e-9)
    assert interval.value - interval.low >= least * (1 - 1e-9)


def test_certainty_needs_every_bound() -> None:
    inside, kld = Estimate(1.0, 0.99, 1.02), Estimate(0.02, 0.01, 0.05)
    passed, refused = sequential.is_passed, sequential.is_refused
    assert passed(inside, kld, "good") and not refused(inside, kld, "good")
    wide, divergent = Estimate(1.0, 0.99, 1.04), Estimate(0.05, 0.04, 0.07)
    for ratio, divergence in ((wide, kld), (inside, divergent), (Estimate(0.98, 0.96, 1.0), kld)):
        assert not passed(ratio, divergence, "good") and not refused(ratio, divergence, "good")
    assert refused(inside, Estimate(0.09, 0.07, 0.12), "good")
    assert refused(Estimate(0.8, 0.75, 0.9), kld, "good")


def figures(kld: np.ndarray, difference: np.ndarray | None = None) -> WindowFigures:
    return WindowFigures(
        tuple((np.zeros_like(kld) if difference is None else difference).tolist()), tuple(kld.tolist())
    )


def certain_after(kld: np.ndarray, required: str = "good", windows: int = 200) -> int:
    """The windows of the first look that is certain."""
    looks = sequential.looks(figures(kld), sequential.plan(windows, required))
    return next((look.windows for look in looks if look.certain), windows)


def test_looks_follow_from_the_figures_so_far() -> None:
    plan, limit = sequential.plan(200, "good"), LIMITS["good"][1]
    kld = np.random.default_rng(0).gamma(20.0, 0.2 * limit / 20.0, 200)
    looks = sequential.looks(figures(kld), plan)
    assert [look.windows for look in looks] == [stop.windows for stop in sequential.stops(plan)]
    for number, look in enumerate(looks, 1):
        assert sequential.looks(figures(kld[: look.windows]), plan) == looks[:number]
    assert 90 < certain_after(kld) < 150 and certain_after(3 * kld / 0.2) == sequential.FIRST_LOOK
    kld[5] = 30 * limit
    assert certain_after(kld) == 200


def test_an_early_pass_states_the_best_grade_that_it_leaves_no_doubt_about() -> None:
    kld = np.full(200, 0.1 * LIMITS["parity"][1])
    look = next(look for look in sequential.looks(figures(kld), sequential.plan(200, "good")) if look.certain)
    assert LIMITS["lossless"][1] < look.kld.high <= LIMITS["parity"][1]
    assert look.windows == certain_after(kld) >= certain_after(kld * 0.1) > 90


@given(losses, st.sampled_from(sorted(LIMITS)), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_an_early_pass_is_never_given_before_rare_bad_windows_are_excluded(
    values: np.ndarray, required: str, attempts: int
) -> None:
    """Whatever was seen: fewer windows than 2 % of bad ones need to show up pass nobody early."""
    plan = sequential.plan(200, required, attempts=attempts)
    for look in sequential.looks(figures(values * LIMITS[required][1] / 26), plan):
        assert not (look.certain and sequential.is_passed(look.perplexity_ratio, look.kld, required))


def mixture(share: float, factor: float) -> Draw:
    """A share of windows so much worse than the others, with the mean on the limit, which is 1."""
    return lambda random, shape: np.where(random.random(shape) < share, factor, 1.0) / (1 + share * (factor - 1))


ON_THE_LIMIT: dict[str, Draw] = {
    "2 % 51 times as bad": mixture(0.02, 51),
    "5 % 21 times as bad": mixture(0.05, 21),
    "10 % 11 times as bad": mixture(0.10, 11),
    "lognormal 1.5": lambda random, shape: random.lognormal(-1.125, 1.5, shape),
    "lognormal 0.6": lambda random, shape: random.lognormal(-0.18, 0.6, shape),
    "normal": lambda random, shape: random.normal(1.0, 0.3, shape),
}


def passed_at(values: np.ndarray, stop: sequential.Stop) -> np.ndarray:
    """Which rows of losses [runs, windows], in multiples of the limit, a look passes."""
    seen = values[:, : stop.windows]
    if stop.early_error is None:
        return np.asarray(sequential.bounds(seen, stop.error)[1] <= 1.0)
    return np.asarray(betting.upper_bound(seen, sequential.LARGEST_LOSS, stop.early_error) <= 1.0)


@pytest.mark.parametrize(("windows", "attempts"), [(204, 1), (512, 4)])
@pytest.mark.parametrize("kind", ON_THE_LIMIT)
def test_a_truth_on_the_limit_passes_in_five_percent_at_most(kind: str, windows: int, attempts: int) -> None:
    """All of four attempts together, where there are four, each as bad in windows of its own."""
    random, wrong = np.random.default_rng(0), np.zeros(1000, bool)
    stops = sequential.stops(sequential.plan(windows, "good", attempts=attempts))
    for _ in range(attempts):
        values = ON_THE_LIMIT[kind](random, (1000, windows))
        wrong |= np.logical_or.reduce([passed_at(values, stop) for stop in stops])
    assert wrong.mean() <= 0.05


def test_looking_at_plain_intervals_from_the_beginning_would_pass_rare_bad_windows() -> None:
    """What the bound is for: the same looks without it are wrong far more often."""
    values = ON_THE_LIMIT["2 % 51 times as bad"](np.random.default_rng(0), (500, 204))
    stops = sequential.stops(sequential.plan(204, "good"))
    plain = [sequential.bounds(values[:, : stop.windows], stop.error)[1] <= 1.0 for stop in stops]
    assert np.logical_or.reduce(plain).mean() > 0.3


def test_the_simulated_decision_is_the_look_s() -> None:
    random, limit = np.random.default_rng(1), LIMITS["good"][1]
    plan = sequential.plan(204, "good")
    values = 0.3 * random.lognormal(-0.125, 0.5, (20, 204))
    for row in values:
        rounded = np.array(sequential.rounded(row * limit))
        passing = [stop.windows for stop in sequential.stops(plan) if passed_at(row[None], stop)[0]]
        assert certain_after(rounded, windows=204) == passing[0]
