"""The threshold of outliers, and the matrices that stay in half precision, that take fewest bytes for a divergence."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from quantize.formats.bitsandbytes.config import STOCK_THRESHOLD

THRESHOLDS = (STOCK_THRESHOLD, 5.0, 4.0, 3.0, 2.5, 2.0, 1.5, 1.25, 1.0)
"""The first is that of stock transformers."""
MAX_SHARE = 0.125
"""Of the products of a window, that may be in half precision: they take longer than those in 8 bits."""
MAX_GROWTH = 0.15
"""Share of the bytes of all 8-bit matrices by which files may grow."""


@dataclass(frozen=True)
class Sensitivity:
    """A matrix in 8 bits: its bytes, the bytes `saved` over half precision, and its number of `products` for a token.

    Of each threshold the `divergence` (nats a token) that the matrix alone causes, and the `share` of its products that
    are in half precision.
    """

    size: int
    saved: int
    products: int
    divergence: Mapping[float, float]
    share: Mapping[float, float]


@dataclass(frozen=True)
class Choice:
    """A threshold, and names of matrices in half precision, with the divergence (nats a token) that all others cause.

    Files grow by `growth` bytes, and a `share` of the products of 8-bit matrices is in half precision.
    """

    threshold: float
    half_precision: tuple[str, ...]
    divergence: float
    growth: int
    share: float


def choose(matrices: Mapping[str, Sensitivity], thresholds: Collection[float], target: float) -> Choice:
    """What reaches the divergence `target` with fewest bytes; among equals the largest threshold.

    Where nothing does within the limits of this module, what diverges least within them. The largest of the
    `thresholds` is allowed whatever its share.
    """
    choices = [_at(matrices, threshold, target) for threshold in sorted(thresholds, reverse=True)]
    allowed = [choice for choice in choices[1:] if choice.share <= MAX_SHARE]
    return min([choices[0], *allowed], key=lambda choice: (max(choice.divergence, target), choice.growth))


def _at(matrices: Mapping[str, Sensitivity], threshold: float, target: float) -> Choice:
    """With this threshold: the matrices that save most divergence for their bytes, until the target or a limit."""
    left = sum(matrix.divergence[threshold] for matrix in matrices.values())
    room, growth, kept = MAX_GROWTH * sum(matrix.size for matrix in matrices.values()), 0, []
    ordered = sorted(matrices, key=lambda name: -matrices[name].divergence[threshold] / matrices[name].saved)
    for name in ordered:
        if left <= target:
            break
        if growth + matrices[name].saved <= room:
            kept.append(name)
            growth += matrices[name].saved
            left -= matrices[name].divergence[threshold]
    chosen = set(kept)
    return Choice(
        threshold,
        tuple(name for name in matrices if name in chosen),
        left,
        growth,
        _share({name: matrix for name, matrix in matrices.items() if name not in chosen}, threshold),
    )


def _share(matrices: Mapping[str, Sensitivity], threshold: float) -> float:
    products = sum(matrix.products for matrix in matrices.values())
    outlying = sum(matrix.products * matrix.share[threshold] for matrix in matrices.values())
    return outlying / max(1, products)
