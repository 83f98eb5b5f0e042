"""A matrix rounded by GPTQ onto codes and scales that the stock file can store."""

from __future__ import annotations

from dataclasses import replace

import torch

from quantize.formats.bitsandbytes import packing
from quantize.formats.bitsandbytes.packing import Packed, ScaleGrid
from quantize.methods.rounding.gptq import GptqOptions, Levels, round_compensated, unquantized


def compensated(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    quant_type: str,
    double_quant: bool,
    dtype: torch.dtype,
    options: GptqOptions | None = None,
    output_hessian: torch.Tensor | None = None,
) -> Packed:
    """`weight` [rows, inputs] rounded by `gptq.round_compensated` onto scales that can be stored.

    Where blocks would run across rows it is rounded to nearest: a scale that belongs to two rows cannot be chosen with
    the codes of one. FP4's table is symmetric, so that its scales stay positive and their grid finer.
    """
    options = options or GptqOptions()
    if weight.shape[1] % options.block:
        return packing.nearest(weight.to(dtype), quant_type, double_quant, options.block)
    levels, grid = Levels.of(packing.table(quant_type, weight.device)), None
    options = replace(options, signed=options.signed and quant_type == "nf4")
    if double_quant:
        largest = weight.float().reshape(-1, options.block).abs().amax(1)
        candidates = torch.stack([largest * min(options.scale_grid), largest * max(options.scale_grid)])
        grid = ScaleGrid.around(candidates, 0.0 if options.signed else None)
    rounded = round_compensated(
        weight, hessian, levels, grid.quantized if grid else unquantized, options, output_hessian
    )
    return Packed.build(rounded.codes, rounded.scales, grid, quant_type, dtype, options.block)
