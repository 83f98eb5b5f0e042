"""An upper bound of a mean that holds after every window at once, for losses that have a largest value.

A gambler who doubts that the mean is m or more stakes on each window x as much as the largest value B lets them, and
holds the product of (B - x) / (B - m) after all windows. Where the mean is m or more, this capital is expected never to
grow, so it ever reaches 1 / error with at most the probability `error` (Ville 1939). Every m at which it has is
excluded: those above B - G error^(1/n), with G the geometric mean of B - x over n windows. This is the betting
confidence sequence of Waudby-Smith and Ramdas (2024) with the largest constant stake; where all windows are alike it is
the exact binomial bound on windows of value B that n windows can all have missed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def upper_bound(values: NDArray[np.float64], largest: float, error: float) -> Any:
    """The bound, with level 1 - `error` over all counts together, on the means of `values` [..., count].

    `largest` is the largest value that a window can have: a larger one counts as `largest`, and leaves no bound below.
    """
    rest = largest - np.minimum(values, largest)
    with np.errstate(divide="ignore"):
        logarithm = np.log(rest).mean(axis=-1)
    return largest - np.exp(logarithm + np.log(error) / values.shape[-1])
