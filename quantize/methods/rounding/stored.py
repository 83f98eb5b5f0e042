"""A matrix rounded by GPTQ onto codes and scales that the stock file can store."""

from __future__ import annotations

from dataclasses import replace

import torch

from quantize.formats.bitsandbytes import packing
from quantize.formats.bitsandbytes.packing import Packed, ScaleGrid
from quantize.methods.rounding.gptq import Levels, Search, keep, round_compensated


def compensated(
    weight: torch.Tensor,
    moments: torch.Tensor,
    quant_type: str,
    double_quant: bool,
    dtype: torch.dtype,
    search: Search | None = None,
    output_moments: torch.Tensor | None = None,
) -> Packed:
    """`weight` [rows, inputs] rounded by `gptq.round_compensated` onto scales that can be stored.

    Where blocks would run across rows it is rounded to nearest: a scale that belongs to two rows cannot be chosen with
    the codes of one. FP4's table is symmetric, so that its scales stay positive and their grid finer.
    """
    search = search or Search()
    if weight.shape[1] % search.block:
        return packing.nearest(weight.to(dtype), quant_type, double_quant, search.block)
    levels, grid = Levels.of(packing.table(quant_type, weight.device)), None
    search = replace(search, signed=search.signed and quant_type == "nf4")
    if double_quant:
        largest = weight.float().reshape(-1, search.block).abs().amax(1)
        reach = torch.stack([largest * min(search.factors), largest * max(search.factors)])
        grid = ScaleGrid.around(reach, 0.0 if search.signed else None)
    rounded = round_compensated(weight, moments, levels, grid.quantized if grid else keep, search, output_moments)
    return Packed.build(rounded.codes, rounded.scales, grid, quant_type, dtype, search.block)
