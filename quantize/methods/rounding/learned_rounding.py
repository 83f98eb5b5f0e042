"""Rounding learned by gradients, a block of the model at a time, after codes and scales are chosen.

Each weight may take the level that it has, or the one on the other side of its original value. Which of the two is
learned with Adam on the calibration text: what a block answers to the inputs that it gets in the quantized model shall
be what the source's block answers to the source's. The choice is hard throughout, and gradients pass straight through
it (Bengio et al. 2013); that rounding can be learned at all is AdaRound's finding (Nagel et al. 2020).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from quantize.formats.bitsandbytes.modules import laid_out
from quantize.formats.bitsandbytes.packing import Packed, expand_scales, table
from quantize.methods.calibration.gradients import Gradient
from quantize.methods.calibration.layers import Stream
from quantize.methods.calibration.resume import QuantizedLayer
from quantize.methods.rounding.gptq import Levels

REACH = 0.25
"""About how far a `push` can move in all steps together: their rate falls along a cosine to 0. It begins half below the
way to the other level, so only weights that compensation put on the farther side can come back."""
CALM = 0.03
"""Times the slopes' size at the beginning, what Adam adds to each one's: where one is small, `push` hardly moves."""
EAGER = 0.45
"""What `push` begins with at most, so that each weight begins with the level that it has."""


@dataclass(frozen=True)
class Choice:
    """For each weight of a matrix [rows, inputs]: its value `now`, `step` to the value of the `other` code, and the
    learned `push`, which takes that step where it is beyond 1/2."""

    now: torch.Tensor
    step: torch.Tensor
    other: torch.Tensor
    push: torch.Tensor

    @classmethod
    def of(cls, packed: Packed, original: torch.Tensor) -> Choice:
        levels = Levels.of(table(packed.quant_type, original.device))
        places = levels.codes.argsort()[packed.codes.long()]
        scales = expand_scales(packed.scales, packed.codes.shape, packed.block)
        now = levels.values[places] * scales
        onward = torch.where((original > now) == (scales > 0), 1, -1)
        last = len(levels.values) - 1
        beside = (places + onward).clamp(0, last)
        twin = levels.values[beside] == levels.values[places]  # FP4 has two zeros
        beside = torch.where(twin, beside + onward, beside).clamp(0, last)
        step = levels.values[beside] * scales - now
        way = ((original - now) / torch.where(step == 0, 1.0, step)).clamp(0, 1)
        return cls(now, step, levels.codes[beside], (way - 0.5).clamp(max=EAGER).requires_grad_(True))

    @property
    def taken(self) -> torch.Tensor:
        return self.push.detach() > 0.5

    def values(self) -> torch.Tensor:
        """The matrix as it is chosen now, with the gradient of `push` itself."""
        return self.now + self.step * (self.taken.float() + self.push - self.push.detach())

    def packed(self, before: Packed) -> Packed:
        return dataclasses.replace(before, codes=torch.where(self.taken, self.other, before.codes))


def learn(
    stream: Stream,
    index: int,
    wanted: list[torch.Tensor],
    originals: Mapping[str, torch.Tensor],
    found: Mapping[str, QuantizedLayer],
    felt: Gradient | None,
    epochs: int,
    advance: Callable[[int], None],
) -> dict[str, QuantizedLayer]:
    """What was `found` for the matrices of a block, with other codes where that brings its answers nearer to `wanted`.

    `stream` stands in front of the block, which computes with what was found; `wanted` are the source's answers, one
    for each part of the stream; `originals` the float matrices. An error counts by the moments of the loss's gradient
    at the block's output, where there are any. Of what was found and what was learned the better is returned, measured
    on the same text.
    """
    device = stream.device
    choices = {name: Choice.of(one.packed, originals[name].float()) for name, one in found.items()}
    metric = felt.moments.to(device) if felt else None
    layer = stream.blocks.layers[index]

    def change(part: int, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        weights = {f"{name}.weight": laid_out(layer.get_submodule(name), one) for name, one in values.items()}
        off = stream.answer(index, part, weights).float() - wanted[part].to(device).float()
        return (off * (off if metric is None else off @ metric)).mean()

    def whole() -> float:
        with torch.no_grad():
            values = {name: one.values() for name, one in choices.items()}
            return sum(float(change(part, values)) for part in range(len(wanted)))

    pushes = [one.push for one in choices.values()]

    def slopes(part: int) -> tuple[torch.Tensor | None, ...]:
        with torch.enable_grad():
            loss = change(part, {name: one.values() for name, one in choices.items()}) * scale
            return torch.autograd.grad(loss, pushes, allow_unused=True)

    before = whole()
    mean = before / len(wanted)
    scale = math.sqrt(wanted[0].numel()) / mean if mean > 0 else 0.0  # half precision would lose smaller slopes
    steps, size = epochs * len(wanted), _size(slopes(0))
    if not 0 < size < math.inf:
        advance(epochs)
        return dict(found)
    optimizer = torch.optim.Adam(pushes, 2 * REACH / steps, eps=CALM * size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for part in range(len(wanted)):
            for push, slope in zip(pushes, slopes(part), strict=True):
                push.grad = slope
            optimizer.step()
            schedule.step()
        advance(1)
    if whole() < before:
        return {name: dataclasses.replace(one, packed=choices[name].packed(one.packed)) for name, one in found.items()}
    return dict(found)


def _size(slopes: tuple[torch.Tensor | None, ...]) -> float:
    """The root of their mean square."""
    every = torch.cat([slope.flatten() for slope in slopes if slope is not None])
    return float(every.square().mean().sqrt())
