"""Rounding a block of columns in one launch on a GPU, where hundreds of small ones would take longer than the work."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 128
"""Targets that one program rounds side by side."""


@triton.jit  # type: ignore[untyped-decorator]
def _compensate(  # type: ignore[no-untyped-def]
    target,
    factor,
    scales,
    values,
    middles,
    places,
    errors,
    count,
    width: tl.constexpr,
    tile: tl.constexpr,
):
    lanes = tl.program_id(0) * tile + tl.arange(0, tile)
    inside = lanes < count
    columns = tl.arange(0, width)
    rest = tl.load(target + columns[:, None] * count + lanes[None, :], mask=inside[None, :], other=0.0)
    scale = tl.load(scales + lanes, mask=inside, other=0.0)
    inverse = tl.where(scale == 0, 0.0, 1.0 / tl.where(scale == 0, 1.0, scale))
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
        tl.store(places + column * count + lanes, place, mask=inside)
        tl.store(errors + column * count + lanes, error, mask=inside)


def compensate(
    target: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `rounding.compensate` does, for `target` [columns, n] whose columns are a power of two, `scales` [n]."""
    columns, count = target.shape
    places = torch.empty(target.shape, dtype=torch.int32, device=target.device)
    errors = torch.empty(target.shape, dtype=torch.float32, device=target.device)
    middles = (values[1:] + values[:-1]) / 2
    given = [tensor.contiguous() for tensor in (target, factor, scales, values, middles)]
    _compensate[(triton.cdiv(count, TILE),)](*given, places, errors, count, width=columns, tile=TILE)
    return places, errors
