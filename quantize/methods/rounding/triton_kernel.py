"""Rounding a block of columns in one launch on a GPU, where hundreds of small ones would take longer than the work."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE, WARPS = 64, 2
"""Targets that one program rounds side by side, and what it does so with."""


@triton.jit  # type: ignore[untyped-decorator]
def _compensate(  # type: ignore[no-untyped-def]
    target,
    factor,
    scales,
    values,
    midpoints,
    indices,
    errors,
    error_sums,
    count,
    width: tl.constexpr,
    tile: tl.constexpr,
    only_sums: tl.constexpr,
):
    lanes = tl.program_id(0) * tile + tl.arange(0, tile)
    candidate = tl.program_id(1) * count + lanes
    inside = lanes < count
    columns = tl.arange(0, width)
    rest = tl.load(target + columns[:, None] * count + lanes[None, :], mask=inside[None, :], other=0.0)
    scale = tl.load(scales + candidate, mask=inside, other=0.0)
    inverse = tl.where(scale == 0, 0.0, 1.0 / tl.where(scale == 0, 1.0, scale))
    error_sum = tl.zeros([tile], tl.float32)
    for column in range(width):
        target_column = tl.sum(tl.where((columns == column)[:, None], rest, 0.0), 0)
        relative = target_column * inverse
        index = tl.zeros([tile], tl.int32)
        for level in tl.static_range(15):
            index += (relative > tl.load(midpoints + level)).to(tl.int32)
        value = tl.load(values + index)
        error = (target_column - value * scale) / tl.load(factor + column * width + column)
        later = tl.where(columns > column, tl.load(factor + column * width + columns), 0.0)
        rest -= later[:, None] * error[None, :]
        error_sum += error * error
        if not only_sums:
            tl.store(indices + column * count + lanes, index, mask=inside)
            tl.store(errors + column * count + lanes, error, mask=inside)
    tl.store(error_sums + candidate, error_sum, mask=inside)


def compensate(
    target: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, values: torch.Tensor, midpoints: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `gptq.compensate` does, for `target` [columns, n] whose columns are a power of two, `scales` [n]."""
    indices = torch.empty(target.shape, dtype=torch.int32, device=target.device)
    errors = torch.empty(target.shape, dtype=torch.float32, device=target.device)
    _launch(target, factor, scales[None], values, midpoints, indices, errors, only_sums=False)
    return indices, errors


def squared_errors(
    target: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, values: torch.Tensor, midpoints: torch.Tensor
) -> torch.Tensor:
    """The sums of squared errors [tries, n] that `compensate` would leave under each of `scales` [tries, n]."""
    return _launch(target, factor, scales, values, midpoints, target, target, only_sums=True)


def _launch(
    target: torch.Tensor,
    factor: torch.Tensor,
    scales: torch.Tensor,
    values: torch.Tensor,
    midpoints: torch.Tensor,
    indices: torch.Tensor,
    errors: torch.Tensor,
    *,
    only_sums: bool,
) -> torch.Tensor:
    columns, count = target.shape
    sums = torch.empty(scales.shape, dtype=torch.float32, device=target.device)
    inputs = [tensor.contiguous() for tensor in (target, factor, scales, values, midpoints)]
    grid = (triton.cdiv(count, TILE), len(scales))
    _compensate[grid](
        *inputs, indices, errors, sums, count, width=columns, tile=TILE, only_sums=only_sums, num_warps=WARPS
    )
    return sums
