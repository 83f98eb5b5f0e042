"""Learned rounding: gradients choose between two levels for each weight, one decoder layer at a time.

After codes and scales are chosen, each weight may keep its level or take the one on the other side of its original
value. A rounding variable v decides which: the weight rounds up to the other level where v > 1/2. It is learned with
Adam on calibration text, so that the outputs of the decoder layer, on the inputs that it gets in the quantized model,
come near those of the source's layer on the source's inputs. The choice is hard throughout, and gradients pass straight
through it (Bengio et al. 2013); that rounding can be learned at all is AdaRound's finding (Nagel et al. 2020).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from quantize.formats.bitsandbytes.modules import laid_out
from quantize.formats.bitsandbytes.packing import Packed, expand_scales, table
from quantize.methods.calibration.gradients import OutputGradient
from quantize.methods.calibration.layers import ActivationStream
from quantize.methods.calibration.resume import QuantizedLayer
from quantize.methods.rounding.gptq import Levels

MAX_MOVEMENT = 0.25
"""About how far a rounding variable can move in all steps together: the learning rate falls along a cosine to 0. It
begins at the weight's fraction of the way to the other level, less 1/2, so only weights whose error exceeds half a
step, as compensation leaves them, can round up."""
RELATIVE_EPSILON = 0.03
"""Adam's epsilon as a multiple of the gradients' initial root mean square: where gradients are small, variables
hardly move."""
TOKENS_A_STEP = 4096
"""Of calibration text, whose gradients are added up for one step."""
MAX_INITIAL_VALUE = 0.45
"""Of a rounding variable, so that each weight begins with the level that it has."""


@dataclass(frozen=True)
class RoundingVariables:
    """For each weight of a matrix [rows, inputs]: its `current` value, the `step` to the value of `other_codes`, and
    the learned `variables`, which take that step where they exceed 1/2."""

    current: torch.Tensor
    step: torch.Tensor
    other_codes: torch.Tensor
    variables: torch.Tensor

    @classmethod
    def of(cls, packed: Packed, original: torch.Tensor) -> RoundingVariables:
        levels = Levels.of(table(packed.quant_type, original.device))
        indices = levels.codes.argsort()[packed.codes.long()]
        scales = expand_scales(packed.scales, packed.codes.shape, packed.block)
        current = levels.values[indices] * scales
        direction = torch.where((original > current) == (scales > 0), 1, -1)
        last = len(levels.values) - 1
        neighbours = (indices + direction).clamp(0, last)
        duplicate = levels.values[neighbours] == levels.values[indices]  # FP4 has two zeros
        neighbours = torch.where(duplicate, neighbours + direction, neighbours).clamp(0, last)
        step = levels.values[neighbours] * scales - current
        fraction = ((original - current) / torch.where(step == 0, 1.0, step)).clamp(0, 1)
        variables = (fraction - 0.5).clamp(max=MAX_INITIAL_VALUE).requires_grad_(True)
        return cls(current, step, levels.codes[neighbours], variables)

    @property
    def round_up(self) -> torch.Tensor:
        """Which weights take the other level, bool [rows, inputs]."""
        return self.variables.detach() > 0.5

    def values(self) -> torch.Tensor:
        """The matrix as it is rounded, with the gradient of `variables` themselves."""
        return self.current + self.step * (self.round_up.float() + self.variables - self.variables.detach())

    def packed(self, before: Packed) -> Packed:
        return dataclasses.replace(before, codes=torch.where(self.round_up, self.other_codes, before.codes))


@dataclass(frozen=True)
class Objective:
    """What a decoder layer shall come near: `targets`, the outputs of the source's layer, one for each micro-batch.

    `originals` are its float matrices by name. An output error e counts as e A e^T, with the Hessian A of
    `output_gradient`, or without one as its square.
    """

    targets: list[torch.Tensor]
    originals: Mapping[str, torch.Tensor]
    output_gradient: OutputGradient | None


def learn(
    stream: ActivationStream,
    index: int,
    quantized: Mapping[str, QuantizedLayer],
    objective: Objective,
    epochs: int,
    advance: Callable[[int], None],
) -> dict[str, QuantizedLayer]:
    """The `quantized` matrices of a decoder layer, with other codes where those lower the error of its outputs.

    `stream` stands in front of the layer, which computes with the quantized matrices. What was learned is returned only
    if its error on the calibration text is smaller.
    """
    device, targets = stream.device, objective.targets
    rounding = {
        name: RoundingVariables.of(layer.packed, objective.originals[name].float()) for name, layer in quantized.items()
    }
    coupling = objective.output_gradient.hessian if objective.output_gradient else None
    output_hessian = None if coupling is None else coupling.to(device)
    decoder_layer = stream.decoder.layers[index]
    variables = [matrix.variables for matrix in rounding.values()]

    def rounded() -> dict[str, torch.Tensor]:
        return {
            f"{name}.weight": laid_out(decoder_layer.get_submodule(name), matrix.values())
            for name, matrix in rounding.items()
        }

    def output_error(part: int, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        error = stream.output(index, part, weights).float() - targets[part].to(device).float()
        return (error * (error if output_hessian is None else error @ output_hessian)).mean()

    def total_error() -> float:
        with torch.no_grad():
            weights = rounded()
            return sum(float(output_error(part, weights)) for part in range(len(targets)))

    def gradients(parts: Sequence[int]) -> tuple[torch.Tensor | None, ...]:
        with torch.enable_grad():
            weights = rounded()
            leaves = {name: weight.detach().requires_grad_(True) for name, weight in weights.items()}
            for part in parts:
                torch.autograd.backward(output_error(part, leaves) * (loss_scale / len(parts)))
            used = [name for name, leaf in leaves.items() if leaf.grad is not None]
            ends, grads = [weights[name] for name in used], [leaves[name].grad for name in used]
            return torch.autograd.grad(ends, variables, grads, allow_unused=True)

    before = total_error()
    mean = before / len(targets)
    loss_scale = math.sqrt(targets[0].numel()) / mean if mean > 0 else 0.0  # half precision loses smaller gradients
    steps = list(_steps(targets))
    gradient_size = _root_mean_square(gradients(steps[0]))
    if not 0 < gradient_size < math.inf:
        advance(epochs)
        return dict(quantized)
    count = epochs * len(steps)
    optimizer = torch.optim.Adam(variables, 2 * MAX_MOVEMENT / count, eps=RELATIVE_EPSILON * gradient_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
    for _ in range(epochs):
        for parts in steps:
            for variable, gradient in zip(variables, gradients(parts), strict=True):
                variable.grad = gradient
            optimizer.step()
            schedule.step()
        advance(1)
    if total_error() < before:
        return {
            name: dataclasses.replace(layer, packed=rounding[name].packed(layer.packed))
            for name, layer in quantized.items()
        }
    return dict(quantized)


def _steps(targets: Sequence[torch.Tensor]) -> Iterator[range]:
    """Numbers of the micro-batches whose gradients make one step: together about TOKENS_A_STEP."""
    tokens = targets[0].shape[0] * targets[0].shape[1]
    size = math.gcd(len(targets), max(1, TOKENS_A_STEP // tokens))
    return (range(first, first + size) for first in range(0, len(targets), size))


def _root_mean_square(gradients: Sequence[torch.Tensor | None]) -> float:
    every = [gradient for gradient in gradients if gradient is not None]
    squares = sum(float(gradient.square().sum(dtype=torch.float64)) for gradient in every)
    return math.sqrt(squares / max(1, sum(gradient.numel() for gradient in every)))
