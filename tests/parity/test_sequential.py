"""Stopping early: looks that spend the error once, and a simulation of how often a verdict is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from quantize.evidence import Estimate
from quantize.parity import sequential


@given(st.integers(8, 5000))
def test_all_looks_together_spend_the_error_once(windows: int) -> None:
    looks = sequential.plan(windows)
    assert sum(look.error for look in looks) == pytest.approx(sequential.ERROR)
    counts = [look.windows for look in looks]
    assert counts == sorted(set(counts)) and counts[-1] == windows


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
    found = sequential.interval(values, error)
    assert found.low <= values.mean() - reach * (1 - 1e-9) and found.high >= values.mean() + reach * (1 - 1e-9)
    assert sequential._skewness(values) == pytest.approx(float(stats.skew(values, bias=False)), rel=1e-9)


def test_certainty_needs_every_bound() -> None:
    inside, kld = Estimate(1.0, 0.99, 1.02), Estimate(0.02, 0.01, 0.05)
    assert sequential.is_certain(inside, kld, "good")
    assert not sequential.is_certain(Estimate(1.0, 0.99, 1.04), kld, "good")
    assert not sequential.is_certain(inside, Estimate(0.05, 0.04, 0.07), "good")
    assert sequential.is_certain(inside, Estimate(0.09, 0.07, 0.12), "good")
    assert sequential.is_certain(Estimate(0.8, 0.75, 0.9), kld, "good")
    assert not sequential.is_certain(Estimate(0.98, 0.96, 1.0), kld, "good")


Draw = Callable[[np.random.Generator, int], np.ndarray]
KINDS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda random, count: random.normal(0.0, 1.0, count), 0.0),
    "skewed": (lambda random, count: random.lognormal(0.0, 0.3, count), math.exp(0.045)),
    "very skewed": (lambda random, count: random.lognormal(0.0, 0.6, count), math.exp(0.18)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_looking_again_and_again_keeps_the_error(kind: str) -> None:
    """The truth lies exactly on the limit, where a verdict is hardest: at most 5 % of runs may decide wrongly."""
    draw, truth = KINDS[kind]
    random, trials, wrong = np.random.default_rng(0), 600, 0
    for _ in range(trials):
        values = draw(random, 200)
        for look in sequential.plan(200):
            found = sequential.interval(values[: look.windows], look.error)
            if not found.low <= truth <= found.high:
                wrong += 1
                break
    assert wrong / trials <= 0.05


def test_one_fixed_level_at_every_look_would_not_keep_it() -> None:
    """What the spending is for: plain 95 % intervals, looked at as often, are wrong far more often."""
    random, wrong = np.random.default_rng(0), 0
    for _ in range(300):
        values = random.normal(0.0, 1.0, 200)
        found = [sequential.interval(values[: look.windows], 0.05) for look in sequential.plan(200)]
        wrong += any(not one.low <= 0.0 <= one.high for one in found)
    assert wrong / 300 > 0.10
