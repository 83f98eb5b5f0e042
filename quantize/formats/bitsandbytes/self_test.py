"""Whether bitsandbytes works on a device."""

from __future__ import annotations


def works_on(device: str) -> bool:
    """Whether bitsandbytes quantizes to 4 bits on `device` and gets nearly the same values back."""
    import torch
    from bitsandbytes import functional

    weights = torch.randn(64, 64, device=device)
    restored = functional.dequantize_4bit(*functional.quantize_4bit(weights, quant_type="nf4"))
    return bool((restored - weights).norm() < 0.2 * weights.norm())
