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
    middles,
    places,
    errors,
    changes,
    count,
    width: tl.constexpr,
    tile: tl.constexpr,
    only_changes: tl.constexpr,
):
    lanes = tl.program_id(0) * tile + tl.arange(0, tile)
    tried = tl.program_id(1) * count + lanes
    inside = lanes < count
    columns = tl.arange(0, width)
    rest = tl.load(target + columns[:, None] * count + lanes[None, :], mask=inside[None, :], other=0.0)
    scale = tl.load(scales + tried, mask=inside, other=0.0)
    inverse = tl.where(scale == 0, 0.0, 1.0 / tl.where(scale == 0, 1.0, scale))
    change = tl.zeros([tile], tl.float32)
    for column in range(width):
        wanted = tl.sum(tl.where((columns == column)[:, None], rest, 0.0), 0)
        relative = wanted * inverse
        place = tl.zeros([tile], tl.int32)
        for level in tl.static_range(15):
            place += (relative > tl.load(middles + level)).to(tl.int32)
        value = tl.load(values + place)
        error = (wanted - value * scale) / tl.load(factor + column * width + column)
        later = tl.where(columns > column, tl.load(factor + column * width + columns), 0.0)
        rest -= later[:, None] * error[None, :]
        change += error * error
        if not only_changes:
            tl.store(places + column * count + lanes, place, mask=inside)
            tl.store(errors + column * count + lanes, error, mask=inside)
    tl.store(changes + tried, change, mask=inside)


def compensate(
    target: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, values: torch.Tensor, middles: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `rounding.compensate` does, for `target` [columns, n] whose columns are a power of two, `scales` [n]."""
    places = torch.empty(target.shape, dtype=torch.int32, device=target.device)
    errors = torch.empty(target.shape, dtype=torch.float32, device=target.device)
    _launch(target, factor, scales[None], values, middles, places, errors, only_changes=False)
    return places, errors


def changes(
    target: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, values: torch.Tensor, middles: torch.Tensor
) -> torch.Tensor:
    """The sums of squared errors [tries, n] that `compensate` would leave under each of `scales` [tries, n]."""
    return _launch(target, factor, scales, values, middles, target, target, only_changes=True)


def _launch(
    target: torch.Tensor,
    factor: torch.Tensor,
    scales: torch.Tensor,
    values: torch.Tensor,
    middles: torch.Tensor,
    places: torch.Tensor,
    errors: torch.Tensor,
    *,
    only_changes: bool,
) -> torch.Tensor:
    columns, count = target.shape
    found = torch.empty(scales.shape, dtype=torch.float32, device=target.device)
    given = [tensor.contiguous() for tensor in (target, factor, scales, values, middles)]
    grid = (triton.cdiv(count, TILE), len(scales))
    _compensate[grid](
        *given, places, errors, found, count, width=columns, tile=TILE, only_changes=only_changes, num_warps=WARPS
    )
    return found
