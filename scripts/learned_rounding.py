"""An experiment for docs/accuracy.md: rounding learned by the whole model's divergence instead of layer by layer.

The rounding variables are those of quantize/methods/rounding/learned_rounding.py; here all matrices learn at once on
the KLD to the float model, which needs the whole model and its gradients in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quantize.formats.bitsandbytes.modules import laid_out, matrix
from quantize.formats.bitsandbytes.packing import Packed
from quantize.methods.rounding.learned_rounding import RoundingVariables

BATCH = 8


def on_divergence(
    reference: Any, candidate: Any, packed: Mapping[str, Packed], text: torch.Tensor, epochs: int, rate: float
) -> None:
    """Learn all matrices of `candidate` (float) at once on the KLD to `reference`, in `epochs` over `text`."""
    device = next(candidate.parameters()).device
    learned = {
        name: RoundingVariables.of(layer, matrix(reference.get_submodule(name))) for name, layer in packed.items()
    }
    parts = list(torch.split(text, BATCH)) * epochs
    optimizer = torch.optim.Adam([rounding.variables for rounding in learned.values()], rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(parts))
    for part in parts:
        tokens = part.to(device)
        with torch.no_grad():
            truth = torch.log_softmax(reference(tokens).logits, -1)
        weights = {
            f"{name}.weight": laid_out(candidate.get_submodule(name), rounding.values())
            for name, rounding in learned.items()
        }
        guess = torch.log_softmax(torch.func.functional_call(candidate, weights, (tokens,)).logits, -1)
        optimizer.zero_grad()
        torch.autograd.backward((truth.exp() * (truth - guess)).sum(-1).mean())
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        for name, rounding in learned.items():
            module = candidate.get_submodule(name)
            module.weight.data = laid_out(module, rounding.values())
