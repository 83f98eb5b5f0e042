"""Codes and scales become the tensors of a stock 4-bit checkpoint, and back again.

Nothing in the format says how codes and scales were chosen, so any choice loads the same way. Stored is, for each
linear layer, one of 16 table values per weight and one scale per block of consecutive weights of the flattened matrix;
where the block size does not divide the inputs of a row, blocks run across rows. The sign of a scale is free: NF4's
table is not symmetric, so a negative scale is another table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from bitsandbytes import functional
from bitsandbytes.functional import QuantState

from quantize.formats.bitsandbytes import cpu_kernel
from quantize.formats.bitsandbytes.sizes import BLOCK, NESTED_BLOCK


def table(quant_type: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """The 16 values [16] of codes 0..15 of "nf4" or "fp4", float32, as the kernels have them built in."""
    values: torch.Tensor = functional.get_4bit_type(quant_type, device=device)
    return values.float()


class NotFinite(ValueError):
    """NaN or infinity among weights."""


@dataclass(frozen=True)
class ScaleGrid:
    """The scales that double quantization can store: `offset` + one of 256 dynamic values x the nested scale.

    `spans` [groups] are the nested scales, float32, one for each 256 consecutive blocks.
    """

    offset: float
    spans: torch.Tensor

    @classmethod
    def around(cls, scales: torch.Tensor, offset: float | None = None) -> ScaleGrid:
        """The grid that holds `scales` [..., blocks] as bitsandbytes chooses it: centred on their mean, unless said.

        Scales of either sign are better centred on zero, where the dynamic values lie on both sides alike.
        """
        blocks = scales.shape[-1]
        offset = float(scales.mean()) if offset is None else float(torch.tensor(offset, dtype=torch.float32))
        distance = (scales - offset).abs().view(-1, blocks).amax(0)
        groups = -(-blocks // NESTED_BLOCK)
        padded = torch.nn.functional.pad(distance, (0, groups * NESTED_BLOCK - blocks))
        return cls(offset, padded.view(groups, NESTED_BLOCK).amax(1))

    def codes(self, scales: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """The uint8 codes that come nearest to `scales`, which are those of the numbered `blocks` of the matrix."""
        span = self.spans[blocks // NESTED_BLOCK]
        relative = (scales - self.offset) / torch.where(span > 0, span, torch.ones_like(span))
        return torch.bucketize(relative, _dynamic_midpoints(scales.device), out_int32=True).to(torch.uint8)

    def values(self, codes: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """The float32 scales that `codes` stand for, to the bit as bitsandbytes computes them."""
        return _dynamic_map(codes.device)[codes.int()] * self.spans[blocks // NESTED_BLOCK] + self.offset

    def quantized(self, scales: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """What is left of `scales` after storing; the numbers `blocks` broadcast against them."""
        return self.values(self.codes(scales, blocks), blocks)


@dataclass(frozen=True)
class Packed:
    """A 4-bit matrix as it is stored: `codes` uint8 [rows, inputs], one scale per block in `stored_scales` [blocks].

    With a `grid` the scales are stored as its uint8 codes, without as float32. `dtype` is what the matrix
    dequantizes to.
    """

    codes: torch.Tensor
    stored_scales: torch.Tensor
    grid: ScaleGrid | None = None
    quant_type: str = "nf4"
    block: int = BLOCK
    dtype: torch.dtype = torch.float16

    @classmethod
    def build(
        cls,
        codes: torch.Tensor,
        scales: torch.Tensor,
        grid: ScaleGrid | None,
        quant_type: str,
        dtype: torch.dtype,
        block: int = BLOCK,
    ) -> Packed:
        """From `codes` [rows, inputs] and float32 `scales`, of any shape whose order is that of the blocks.

        Under a `grid` the scales become the nearest that it holds, so `codes` should have been chosen for those.
        """
        scales = scales.reshape(-1).float()
        stored = grid.codes(scales, _block_numbers(scales)) if grid else scales
        return cls(codes, stored, grid, quant_type, block, dtype)

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Packed:
        """The inverse of `tensors`."""
        state = QuantState.from_dict(
            {name.removeprefix("weight."): value for name, value in tensors.items() if name != "weight"},
            tensors["weight"].device,
        )
        pairs = tensors["weight"].view(-1)
        codes = torch.stack([pairs >> 4, pairs & 15], dim=1).view(-1)[: math.prod(state.shape)].view(state.shape)
        grid = ScaleGrid(state.offset.item(), state.state2.absmax) if state.nested else None
        return cls(codes, state.absmax, grid, state.quant_type, state.blocksize, state.dtype)

    @property
    def scales(self) -> torch.Tensor:
        """The float32 scales [blocks] that a loaded model works with."""
        return (
            self.grid.values(self.stored_scales, _block_numbers(self.stored_scales))
            if self.grid
            else self.stored_scales
        )

    def weight(self) -> torch.Tensor:
        """The float32 matrix [rows, inputs] that this stands for, before it is rounded to `dtype`."""
        values = table(self.quant_type, self.codes.device)[self.codes.int()]
        return values * expand_scales(self.scales, self.codes.shape, self.block)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds for a linear layer, by the names after the layer's own: `weight`, `weight.absmax`...

        `weight` is uint8 [pairs, 1], the first of each pair of codes in the upper half of the byte.
        """
        flat = self.codes.contiguous().view(-1)
        if len(flat) % 2:
            flat = torch.nn.functional.pad(flat, (0, 1))
        packed = (flat[::2] << 4 | flat[1::2]).unsqueeze(1)
        return {"weight": packed} | {
            f"weight.{name}": value for name, value in self.state().as_dict(packed=True).items()
        }

    def state(self) -> QuantState:
        """What bitsandbytes' own functions take beside the packed codes."""
        device, nested = self.codes.device, None
        if self.grid:
            nested = QuantState(
                absmax=self.grid.spans, code=_dynamic_map(device), blocksize=NESTED_BLOCK, dtype=torch.float32
            )
        return QuantState(
            absmax=self.stored_scales,
            shape=self.codes.shape,
            code=table(self.quant_type, device),
            blocksize=self.block,
            quant_type=self.quant_type,
            dtype=self.dtype,
            offset=torch.tensor(self.grid.offset, device=device) if self.grid else None,
            state2=nested,
        )


def nearest(weight: torch.Tensor, quant_type: str, double_quant: bool, block: int = BLOCK) -> Packed:
    """`weight` [rows, inputs] as stock bitsandbytes rounds it: to the nearest code under scale = absmax."""
    return Packed.of(nearest_tensors(weight, quant_type, double_quant, block))


def nearest_tensors(
    weight: torch.Tensor, quant_type: str, double_quant: bool, block: int = BLOCK
) -> dict[str, torch.Tensor]:
    """The same as `Packed.tensors`, to the bit what bitsandbytes makes of `weight`; on a CPU several times faster.

    Raises NotFinite where a weight is NaN or infinite.
    """
    weight = weight.contiguous()
    if weight.is_cpu and weight.numel() % block == 0:
        packed, state = _nearest_on_cpu(weight, quant_type, double_quant, block)
    elif not bool(weight.isfinite().all()):
        raise NotFinite
    else:
        packed, state = functional.quantize_4bit(
            weight, blocksize=block, compress_statistics=double_quant, quant_type=quant_type
        )
    return {"weight": packed} | {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}


def _nearest_on_cpu(
    weight: torch.Tensor, quant_type: str, double_quant: bool, block: int
) -> tuple[torch.Tensor, QuantState]:
    code = table(quant_type)
    packed, scales = cpu_kernel.quantize(weight, code, block)
    if not bool(scales.isfinite().all()):
        raise NotFinite
    state = QuantState(
        absmax=scales, shape=weight.shape, code=code, blocksize=block, quant_type=quant_type, dtype=weight.dtype
    )
    if double_quant:
        state.offset, state.nested = scales.mean(), True
        state.absmax, state.state2 = functional.quantize_blockwise(scales - state.offset, blocksize=NESTED_BLOCK)
    return packed, state


def expand_scales(scales: torch.Tensor, shape: tuple[int, ...] | torch.Size, block: int = BLOCK) -> torch.Tensor:
    """`scales` [blocks] at each weight of a matrix of `shape`, also where blocks run across rows."""
    return scales.repeat_interleave(block)[: math.prod(shape)].view(shape)


def _block_numbers(scales: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(scales), device=scales.device)


@cache
def _dynamic_map(device: torch.device) -> torch.Tensor:
    """The 256 sorted values in [-1, 1] of an 8-bit scale: finer near zero."""
    values: torch.Tensor = functional.create_dynamic_map()
    return values.to(device)


@cache
def _dynamic_midpoints(device: torch.device) -> torch.Tensor:
    values = _dynamic_map(device)
    return (values[1:] + values[:-1]) / 2
