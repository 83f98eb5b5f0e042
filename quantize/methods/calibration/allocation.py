"""Allocation of a size budget: block size 32, or half precision, for the matrices where extra bytes help most."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantize.formats.bitsandbytes import packing
from quantize.formats.bitsandbytes.modules import laid_out, matrix
from quantize.formats.bitsandbytes.sizes import BLOCK, MatrixFormat
from quantize.logits import SlicedLogits
from quantize.progress import Progress
from quantize.records import Recipe

HALF_PRECISION = 0
"""In place of a block size: the matrix is kept in half precision."""
SMALL_BLOCK = 32
SMALL_BLOCK_DIVERGENCE = 0.85
"""Divergence of calibrated blocks of 32 as a fraction of that of 64, as measured on a trained model (docs/accuracy.md).
Rounded to nearest, blocks of 32 diverge more although their weights err less, so that it cannot be measured there."""
WINDOWS = 8
"""Of calibration text, on which the sensitivity of each matrix is measured."""


@dataclass(frozen=True)
class StorageOption:
    """One way to store a matrix: its block size or HALF_PRECISION, its bytes and its divergence (nats)."""

    block: int
    size: int
    divergence: float


def allocate(
    model: Any,
    names: list[str],
    tokens: torch.Tensor,
    recipe: Recipe,
    size_budget: float,
    dtype: str,
    device: str,
    progress: Progress,
) -> dict[str, int]:
    """The block size, or HALF_PRECISION, of each matrix of `model` (on the device).

    Files take at most `size_budget` times the bytes of plain 4-bit ones.
    """
    matrices = {name: model.get_submodule(name) for name in names}

    def rounded(module: Any) -> torch.Tensor:
        weight = matrix(module).to(getattr(torch, dtype))
        return laid_out(module, packing.nearest(weight, recipe.quant_type, recipe.double_quant).weight())

    costs = divergences(model, tokens, device, matrices, rounded, progress)
    offers = {
        name: _storage_options(matrix(module), costs[name], recipe.double_quant) for name, module in matrices.items()
    }
    weights = sum(module.weight.numel() for module in matrices.values())
    plain = 2 * (model.num_parameters() - weights) + sum(options[0].size for options in offers.values())
    return spend(offers, (size_budget - 1) * plain)


def _storage_options(weight: torch.Tensor, divergence: float, double_quant: bool) -> list[StorageOption]:
    """The ways to store a matrix whose plain form costs this `divergence`; the plain form comes first."""
    rows, inputs = weight.shape
    shares = {BLOCK: 1.0, SMALL_BLOCK: SMALL_BLOCK_DIVERGENCE, HALF_PRECISION: 0.0}
    if inputs % SMALL_BLOCK:  # blocks that run across rows are rounded to nearest
        del shares[SMALL_BLOCK]
    return [
        StorageOption(block, stored_bytes(rows, inputs, block, double_quant), share * divergence)
        for block, share in shares.items()
    ]


def stored_bytes(rows: int, inputs: int, block: int, double_quant: bool) -> int:
    """The bytes of a matrix in a file."""
    if block == HALF_PRECISION:
        return 2 * rows * inputs
    return MatrixFormat(double_quant=double_quant, block=block).stored_bytes(rows, inputs)


def divergences(
    model: Any,
    tokens: torch.Tensor,
    device: str,
    matrices: Mapping[str, Any],
    rounded: Callable[[Any], torch.Tensor],
    progress: Progress,
) -> dict[str, float]:
    """Mean KLD (nats a token) of the model with one of its `matrices` rounded to nearest, for each of them.

    `rounded` gives a module's weight after that. `tokens` are [windows, length].
    """
    windows = tokens[:WINDOWS]
    totals = dict.fromkeys(matrices, 0.0)
    sliced = SlicedLogits.of(model, windows.to(device))
    with (
        torch.inference_mode(),
        progress.task("measuring sensitivities", len(windows) * len(totals), "matrices") as advance,
    ):
        for window in torch.split(windows.to(device), 1):
            states = sliced.states(window)
            for name, module in matrices.items():
                original = module.weight.data
                module.weight.data = rounded(module)
                totals[name] += _divergence(sliced, states, window) / len(windows)
                module.weight.data = original
                advance(1)
    return totals


def spend(offers: Mapping[str, list[StorageOption]], extra: float) -> dict[str, int]:
    """The block size, or HALF_PRECISION, of each matrix that saves most divergence with at most `extra` bytes.

    Each list of `offers` begins with the plain form. The step that saves most for its bytes is always taken
    next, until none fits, which is the optimum but for the last step, as options are taken along their convex hull.
    """
    chosen = {name: options[0] for name, options in offers.items()}
    while True:
        steps = [
            (_gain(chosen[name], option), name, option)
            for name, options in offers.items()
            for option in options
            if chosen[name].size < option.size <= chosen[name].size + extra
        ]
        gain, name, option = max(steps, key=lambda step: step[0], default=(0.0, "", None))
        if option is None or gain <= 0:
            return {name: option.block for name, option in chosen.items()}
        extra -= option.size - chosen[name].size
        chosen[name] = option


def _gain(now: StorageOption, then: StorageOption) -> float:
    return (now.divergence - then.divergence) / (then.size - now.size)


def _divergence(sliced: SlicedLogits, states: torch.Tensor, window: torch.Tensor) -> float:
    """Mean KLD on one `window` [1, length] of the model as it is now from itself when it had these last `states`."""
    total = 0.0
    changed = sliced.slices(sliced.states(window), window)
    for (_, original), (_, other) in zip(sliced.slices(states, window), changed, strict=True):
        truth, guess = torch.log_softmax(original.float(), -1), torch.log_softmax(other.float(), -1)
        total += float((truth.exp() * (truth - guess)).sum())
    return total / window.shape[1]
