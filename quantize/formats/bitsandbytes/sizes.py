"""Which tensors a quantized matrix has in a file, of which types and shapes, and how many bytes that makes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantize.formats.safetensors import Slot
from quantize.records import Recipe

if TYPE_CHECKING:
    import torch

BLOCK = 64
"""Weights that share a scale, where nothing else is said."""
NESTED_BLOCK = 256
"""Scales that share one nested scale under double quantization; the kernels allow no other number."""
LEVELS, DYNAMIC_LEVELS = 16, 256
"""Values of a 4-bit code, and of the 8-bit code of a scale."""
STATE = ".quant_state.bitsandbytes__"
"""Between the name of a weight and that of its 4-bit type, in the name of its state."""
STATE_BYTES = 236
"""About the length of the state, which is JSON and known only once the scales are; nothing is written by this."""
ROW_SCALES, ROW_FORMAT = "SCB", "weight_format"
"""Beside the weight of an 8-bit module."""


@dataclass(frozen=True)
class MatrixFormat:
    """How quantized matrices are stored; all but `bits` is of 4-bit ones alone."""

    bits: int = 4
    quant_type: str = "nf4"
    double_quant: bool = True
    block: int = BLOCK

    @classmethod
    def of(cls, recipe: Recipe) -> MatrixFormat:
        return cls(recipe.bits, recipe.quant_type, recipe.double_quant)

    def __str__(self) -> str:
        if self.bits == 8:
            return "8-bit"
        return f"4-bit {self.quant_type}{' with double quantization' if self.double_quant else ''}"

    def state_names(self) -> list[str]:
        """What follows a 4-bit weight's name in the names of the tensors beside it."""
        nested = [".nested_absmax", ".nested_quant_map"] if self.double_quant else []
        return [".absmax", ".quant_map", *nested, f"{STATE}{self.quant_type}"]

    def slots(self, module: str, rows: int, inputs: int) -> list[Slot]:
        """Names, types and shapes of the tensors of a matrix [rows, inputs] of the module of that name."""
        import torch

        weight = f"{module}.weight"
        if self.bits == 8:
            return [
                Slot(weight, torch.int8, (rows, inputs)),
                Slot(f"{module}.{ROW_SCALES}", torch.float32, (rows,)),
                Slot(f"{module}.{ROW_FORMAT}", torch.uint8, ()),
            ]
        blocks = math.ceil(rows * inputs / self.block)
        scales = torch.uint8 if self.double_quant else torch.float32
        contents: list[tuple[torch.dtype, tuple[int, ...] | None]] = [(scales, (blocks,)), (torch.float32, (LEVELS,))]
        if self.double_quant:
            groups = math.ceil(blocks / NESTED_BLOCK)
            contents += [(torch.float32, (groups,)), (torch.float32, (DYNAMIC_LEVELS,))]
        contents.append((torch.uint8, None))
        beside = zip(self.state_names(), contents, strict=True)
        return [
            Slot(weight, torch.uint8, (math.ceil(rows * inputs / 2), 1)),
            *(Slot(f"{weight}{name}", dtype, shape) for name, (dtype, shape) in beside),
        ]

    def stored_bytes(self, rows: int, inputs: int) -> int:
        """About how many bytes the tensors of a matrix [rows, inputs] take in a file."""
        return sum(STATE_BYTES if slot.shape is None else slot.size for slot in self.slots("", rows, inputs))
