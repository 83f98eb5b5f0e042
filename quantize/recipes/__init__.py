"""How weights become 4-bit: one module a recipe, and only here is bitsandbytes imported."""

from __future__ import annotations

from pathlib import Path

from quantize.progress import Progress
from quantize.records import Checkout, Quantized, Recipe


def quantize(checkout: Checkout, output: Path, recipe: Recipe, device: str, progress: Progress) -> Quantized:
    """Write quantized weights and their config of `checkout` into the folder `output`.

    Raises CorruptModel (NaN, damage), UnsupportedModel (nothing to quantize), DeviceError or StorageError.
    """
    from quantize.recipes import stock

    return stock.quantize(checkout, output, recipe, device, progress)


def works_on(device: str) -> bool:
    """Whether bitsandbytes quantizes to 4 bits on `device` and gets nearly the same values back."""
    import torch
    from bitsandbytes import functional

    weights = torch.randn(64, 64, device=device)
    restored = functional.dequantize_4bit(*functional.quantize_4bit(weights, quant_type="nf4"))
    return bool((restored - weights).norm() < 0.2 * weights.norm())
