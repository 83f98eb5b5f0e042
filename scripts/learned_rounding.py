"""Rounding learned by gradients, after the calibrated recipe: two objectives, tried for docs/accuracy.md.

Each weight may take the level that it has, or the one on the other side of its original value. Which of the two is
learned on the calibration text with Adam, so that what is written is still a stock file of the same size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantize.recipes.blocks import Blocks, Stream, laid_out, matrix
from quantize.recipes.packing import Packed, expand_scales, table

BATCH = 8


@dataclass(frozen=True)
class Choice:
    """For each weight of a matrix: its value `now`, `step` to the value of the other level, and the learned `push`,
    which takes that step where it is beyond 1/2."""

    now: torch.Tensor
    step: torch.Tensor
    push: torch.Tensor

    @classmethod
    def of(cls, packed: Packed, original: torch.Tensor) -> Choice:
        """`push` begins where the original lies between the two levels, less 1/2: the nearer the middle, the sooner."""
        values = table(packed.quant_type, original.device).sort().values
        scales = expand_scales(packed.scales, packed.codes.shape, packed.block)
        now = packed.weight()
        places = torch.searchsorted(values, (now / scales.where(scales != 0, 1.0)).clamp(-1, 1) - 1e-4)
        up = (original > now) == (scales > 0)
        other = values[torch.where(up, places + 1, places - 1).clamp(0, 15)] * scales
        step = other - now
        way = ((original - now) / step.where(step != 0, 1.0)).clamp(0, 1)
        return cls(now, step, (way - 0.5).clamp(-0.5, 0.45).requires_grad_(True))

    def hard(self) -> torch.Tensor:
        return self.now + self.step * (self.push > 0.5)

    def straight(self) -> torch.Tensor:
        """The values of `hard`, with the gradient of `push` itself."""
        return self.now + self.step * ((self.push > 0.5).float() + self.push - self.push.detach())


def choices(reference: Any, packed: Mapping[str, Packed]) -> dict[str, Choice]:
    return {name: Choice.of(one, matrix(reference.get_submodule(name))) for name, one in packed.items()}


def on_divergence(
    reference: Any, candidate: Any, packed: Mapping[str, Packed], text: torch.Tensor, epochs: int, rate: float
) -> None:
    """Learn all matrices of `candidate` (float) at once on the KLD to `reference`, in `epochs` over `text`."""
    device = next(candidate.parameters()).device
    learned = choices(reference, packed)
    parts = list(torch.split(text, BATCH)) * epochs
    optimizer = torch.optim.Adam([one.push for one in learned.values()], rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(parts))
    for part in parts:
        tokens = part.to(device)
        with torch.no_grad():
            truth = torch.log_softmax(reference(tokens).logits, -1)
        weights = {f"{name}.weight": _laid_out(candidate, name, one.straight()) for name, one in learned.items()}
        guess = torch.log_softmax(torch.func.functional_call(candidate, weights, (tokens,)).logits, -1)
        optimizer.zero_grad()
        torch.autograd.backward((truth.exp() * (truth - guess)).sum(-1).mean())
        optimizer.step()
        schedule.step()
    _settle(candidate, learned)


def on_block_outputs(
    reference: Any, candidate: Any, packed: Mapping[str, Packed], text: torch.Tensor, epochs: int, rate: float
) -> None:
    """Learn block after block on the squared error of its output, the inputs being the quantized model's."""
    device = str(next(candidate.parameters()).device)
    learned = choices(reference, packed)
    streams = [Stream(model, Blocks.of(model, packed), text, device, BATCH, False) for model in (reference, candidate)]
    source, copy = streams
    for index, layer in enumerate(copy.blocks.layers):
        begin = f"{copy.blocks.name(index)}."
        own = {name.removeprefix(begin): one for name, one in learned.items() if name.startswith(begin)}
        inputs = list(copy.hidden)
        layer.to(device)
        source.blocks.layers[index].to(device)
        source.advance(index)
        arguments, named = copy.calls[index]
        steps = list(zip(inputs, source.hidden, strict=True)) * epochs
        optimizer = torch.optim.Adam([one.push for one in own.values()], rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
        for hidden, wanted in steps:
            weights = {f"{name}.weight": _laid_out(layer, name, one.straight()) for name, one in own.items()}
            answer = torch.func.functional_call(layer, weights, (hidden.to(device), *arguments), named)
            answer = answer[0] if isinstance(answer, tuple) else answer
            optimizer.zero_grad()
            torch.autograd.backward((answer - wanted.to(device)).square().mean())
            optimizer.step()
            schedule.step()
        _settle(layer, own)
        copy.advance(index)


def _laid_out(model: Any, name: str, values: torch.Tensor) -> torch.Tensor:
    return laid_out(model.get_submodule(name), values)


def _settle(model: Any, learned: Mapping[str, Choice]) -> None:
    with torch.no_grad():
        for name, one in learned.items():
            model.get_submodule(name).weight.data = _laid_out(model, name, one.hard())
