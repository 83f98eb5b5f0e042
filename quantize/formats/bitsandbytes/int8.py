"""What LLM.int8 multiplies: rows of weights and of inputs in 8 bits, but columns with outliers in half precision."""

from __future__ import annotations

import torch
from bitsandbytes import functional

LARGEST = 127
"""The largest code; each row has a scale by which its largest value gets that."""


def stored(weight: torch.Tensor) -> torch.Tensor:
    """The float32 matrix [outputs, inputs] that is left of `weight` in 8 bits."""
    codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
    values: torch.Tensor = codes.float() * (scales.float() / LARGEST)[:, None]
    return values


def read(inputs: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What a product reads of `inputs` [tokens, inputs], and which columns [inputs] stay in half precision for it.

    Those are the columns in which a token reaches the `threshold`; rows of all others are rounded to 8 bits.
    """
    outlying = inputs.abs() >= threshold
    columns = outlying.any(0)
    rest = inputs.masked_fill(outlying, 0)
    steps = rest.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    return torch.where(columns, inputs, (rest / steps).round() * steps), columns
