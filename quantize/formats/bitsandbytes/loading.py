"""Loaded checkpoints: computing in float32 over the stored weights, and how far those are from their source's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from quantize import devices
from quantize.formats.bitsandbytes import cpu_reading
from quantize.formats.bitsandbytes.modules import (
    QUANTIZED_CLASSES,
    holds_codes,
    linear_names,
    matrix,
    quantized_names,
)

if TYPE_CHECKING:
    import torch


def upcast(model: Any) -> None:
    """Let a model that was just loaded onto the CPU compute in float32, over exactly the weights that it stores.

    Kernels of bitsandbytes for CPUs unpack a matrix anew for every call, and some round activations and scales to
    bfloat16. Here 4-bit matrices are unpacked once by transformers, where memory allows, and only products and sums
    are done in more digits: every value stays the stored one. What they misread is unpacked here.
    """
    import torch

    cpu_reading.replace_misread(model)
    if getattr(model, "is_loaded_in_4bit", False) and 4 * model.num_parameters() <= devices.usable_memory("cpu"):
        model.dequantize(dtype=torch.float32)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
        if type(module).__name__ == QUANTIZED_CLASSES[4]:
            module.compute_dtype, module.support_avx512bf16_for_cpu = torch.float32, False


def dequantized(module: Any) -> torch.Tensor:
    """The float32 matrix [outputs, inputs] that a quantized module holds."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    if cpu_reading.is_misread(module):
        return cpu_reading.values(module).float()
    weight: torch.Tensor = dequantize_bnb_weight(module.weight, state=getattr(module, "state", None))
    return weight.float()


def weight_errors(reference: Any, candidate: Any) -> dict[str, float]:
    """Relative RMS error of every quantized module: |dequantized - source| / |source|, Frobenius norms."""
    from accelerate.utils import align_module_device

    originals = {name: reference.get_submodule(name) for name in linear_names(reference)}
    errors = {}
    for name in quantized_names(candidate):
        module = candidate.get_submodule(name)
        if name not in originals or not holds_codes(module):
            continue
        stored = dequantized(module)
        with align_module_device(originals[name]):  # an offloaded weight comes to memory for this
            source = matrix(originals[name]).to(stored.device).float()
        distance = (stored - source).norm() if stored.shape == source.shape else math.inf
        errors[name] = float(distance / source.norm().clamp_min(1e-30))
    return errors
