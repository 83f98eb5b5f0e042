"""Where bitsandbytes misreads a 4-bit matrix on a CPU, and the values that it really holds.

Its AVX-512 kernels take each row for a whole number of blocks, while blocks run on across rows; see
docs/bitsandbytes-cpu.md.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import CorruptModel
from quantize.formats import safetensors
from quantize.formats.bitsandbytes.modules import quantized_names
from quantize.formats.bitsandbytes.sizes import STATE
from quantize.formats.safetensors import Entry

if TYPE_CHECKING:
    import torch


def misreads(inputs: int, block: int) -> bool:
    """Whether CPUs with AVX-512 read rows of so many `inputs` with the scales of others; odd ones go another way."""
    return inputs % block != 0 and inputs % 2 == 0


@functools.cache
def misreads_here(inputs: int, block: int, quant_type: str) -> bool:
    """Whether this CPU does: the same codes as one row are one whole number of blocks, and read rightly."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    rows = torch.linspace(1.0, block, block)[:, None].expand(block, inputs).contiguous()
    read, right = (
        dequantize_4bit(*quantize_4bit(matrix, blocksize=block, quant_type=quant_type))
        for matrix in (rows, rows.view(1, -1))
    )
    return not torch.equal(read.view(-1), right.view(-1))


def misread_in_files(folder: Path) -> tuple[str, ...]:
    """Names of the modules of a checkpoint that some CPUs misread; none where its files cannot be read at all."""
    try:
        states = {
            name.partition(STATE)[0].removesuffix(".weight"): _state(entry)
            for file in safetensors.weight_files(folder)
            for name, entry in safetensors.entries(file).items()
            if STATE in name
        }
        return tuple(name for name, state in states.items() if misreads(state["shape"][-1], state["blocksize"]))
    except (CorruptModel, OSError, ValueError, LookupError, TypeError):
        return ()


def _state(entry: Entry) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(bytes(safetensors.read(entry, 0, entry.numel, pinned=False).tolist()))
    return state


def misread_in(model: Any) -> tuple[str, ...]:
    """Names of the 4-bit modules of a loaded `model` that are misread on this CPU."""
    return tuple(name for name in quantized_names(model) if is_misread(model.get_submodule(name)))


def is_misread(module: Any) -> bool:
    """Whether bitsandbytes misreads the weight of a quantized module where it lies."""
    state = getattr(module.weight, "quant_state", None)
    if state is None or module.weight.device.type != "cpu" or not misreads(state.shape[-1], state.blocksize):
        return False
    return misreads_here(state.shape[-1], state.blocksize, state.quant_type)


def values(module: Any) -> torch.Tensor:
    """The matrix [outputs, inputs] that a 4-bit module holds, in the type that it is stored for."""
    import torch

    from quantize.formats.bitsandbytes.packing import Packed

    state = module.weight.quant_state
    parts = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return Packed.of({"weight": module.weight.data.view(torch.uint8), **parts}).weight().to(state.dtype)


def replace_misread(model: Any) -> None:
    """Put linear modules in float32 in place of the misread ones of a `model` that was just loaded onto a CPU."""
    import torch

    for name in misread_in(model):
        module = model.get_submodule(name)
        with torch.device("meta"):
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        linear.weight = torch.nn.Parameter(values(module).float(), requires_grad=False)
        if module.bias is not None:
            linear.bias = module.bias
        model.set_submodule(name, linear)
