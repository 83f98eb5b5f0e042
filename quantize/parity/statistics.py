"""Token scores become estimates with intervals: windows are the unit, since tokens in one are correlated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from quantize.evidence import Distribution, Estimate, Histogram, Scores
from quantize.parity.scoring import TokenScores

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESAMPLES = 9999
ERROR = 0.05
BATCH_VALUES = 4_000_000
"""Resampled values that are held at a time: 32 MB."""
KLD_PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p99.9": 99.9}
DELTA_P_PERCENTILES = {"p1": 1.0, "p5": 5.0, "p25": 25.0, "p50": 50.0, "p75": 75.0, "p95": 95.0, "p99": 99.0}
POSITION_BINS = 16
LARGEST_LOG = 50.0
HISTOGRAM_EDGES = tuple(float(edge) for edge in np.round(np.logspace(-7, 1, 49), 12))


def summarize(tokens: TokenScores, seed: int, error: float = ERROR) -> Scores:
    """All the protocol's statistics of `tokens`, with intervals of level 1 - `error` for this very sample."""
    kld = np.maximum(tokens.kld, 0.0)
    reference, candidate, difference, divergence, same_top, delta_p, squared = mean_estimates(
        [
            tokens.nll_reference,
            tokens.nll_candidate,
            tokens.nll_candidate - tokens.nll_reference,
            kld,
            tokens.same_top,
            tokens.delta_p,
            tokens.delta_p**2,
        ],
        seed,
        error,
    )
    return Scores(
        reference_perplexity=exponential(reference),
        candidate_perplexity=exponential(candidate),
        perplexity_ratio=exponential(difference),
        kld=_distribution(kld, KLD_PERCENTILES, divergence),
        same_top=same_top,
        delta_p=_distribution(tokens.delta_p, DELTA_P_PERCENTILES, delta_p),
        delta_p_rms=_root(squared),
        kld_histogram=_histogram(kld),
        kld_by_position=tuple(float(part.mean()) for part in _stretches(kld)),
    )


def mean_estimates(columns: Sequence[NDArray[np.generic]], seed: int, error: float = ERROR) -> list[Estimate]:
    """Means of `columns`, each [windows, tokens], with intervals by a bias-corrected bootstrap over windows.

    Every window has equally many tokens, so the mean of window means is the mean of tokens. Resampling windows of
    token-wise differences is what makes the comparison paired, and all columns are resampled alike. BCa interval
    after Efron (1987), by scipy.
    """
    from scipy.stats import bootstrap

    means = np.stack([column.astype(np.float64).mean(axis=1) for column in columns])
    middle = means.mean(axis=1)
    low, high = middle.copy(), middle.copy()
    varies = np.ptp(means, axis=1) > 1e-12 * np.maximum(1.0, np.abs(middle))
    if varies.any():
        interval = bootstrap(
            (means[varies],),
            np.mean,
            n_resamples=RESAMPLES,
            batch=max(1, BATCH_VALUES // means[varies].size),
            confidence_level=1 - error,
            method="BCa",
            axis=-1,
            rng=np.random.default_rng(seed),
        ).confidence_interval
        low[varies], high[varies] = interval.low, interval.high
    return [Estimate(*map(float, bounds)) for bounds in zip(middle, low, high, strict=True)]


def exponential(estimate: Estimate) -> Estimate:
    """exp of an estimate in nats, capped at exp(`LARGEST_LOG`): beyond that a model is broken in any case."""
    values = (estimate.value, estimate.low, estimate.high)
    return Estimate(*(float(np.exp(min(value, LARGEST_LOG))) for value in values))


def _root(estimate: Estimate) -> Estimate:
    return Estimate(*(float(np.sqrt(max(value, 0.0))) for value in (estimate.value, estimate.low, estimate.high)))


def _distribution(values: NDArray[np.float64], percentiles: dict[str, float], mean: Estimate) -> Distribution:
    return Distribution(
        mean=mean,
        percentiles={name: float(np.percentile(values, level)) for name, level in percentiles.items()},
        minimum=float(values.min()),
        maximum=float(values.max()),
    )


def _histogram(values: NDArray[np.float64]) -> Histogram:
    clipped = np.clip(values, HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    counts, _ = np.histogram(clipped, bins=np.asarray(HISTOGRAM_EDGES))
    return Histogram(HISTOGRAM_EDGES, tuple(int(count) for count in counts))


def _stretches(values: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    return np.array_split(values, min(POSITION_BINS, values.shape[1]), axis=1)
