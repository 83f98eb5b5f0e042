"""How far 8-bit products take a model from itself, predicted matrix by matrix from gradients, and measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from quantize.formats.bitsandbytes import int8
from quantize.formats.bitsandbytes.modules import matrix
from quantize.formats.bitsandbytes.sizes import MatrixFormat
from quantize.logits import SlicedLogits
from quantize.methods.calibration import sampling
from quantize.methods.calibration.gradients import embeddings_with_gradients, go_back
from quantize.methods.outliers.choice import Choice, Sensitivity
from quantize.progress import Progress

HALF_BYTES = 2


def sensitivities(
    model: Any, names: Sequence[str], tokens: torch.Tensor, thresholds: Sequence[float], seed: int, progress: Progress
) -> dict[str, Sensitivity]:
    """Of the named matrices of `model`, on its device, from `tokens` [windows, length].

    With g the gradient of the loss of tokens drawn from the model's own prediction at a matrix's output, and d the
    error of that output, (g d)^2 / 2 summed over tokens is what the error adds to the KL divergence of the model, to
    the second order and in expectation.
    """
    device = next(model.parameters()).device
    meter, shares = _Meter(thresholds), sampling.shares(len(tokens), tokens.shape[1], seed)
    sliced = SlicedLogits.of(model, tokens[:1].to(device))
    with (
        meter.attached(model, names),
        embeddings_with_gradients(model),
        progress.task("measuring 8-bit products", len(tokens), "windows") as advance,
    ):
        for window, share in zip(torch.split(tokens, 1), torch.split(shares, 1), strict=True):
            go_back(sliced, window.to(device), share.to(device), False)
            advance(1)
    return {name: meter.result(name, matrix(model.get_submodule(name)).shape, tokens.numel()) for name in names}


class _Meter:
    """Adds up, in hooks of modules, what their errors do to the loss, and how many columns hold outliers."""

    def __init__(self, thresholds: Sequence[float]) -> None:
        self.thresholds = thresholds
        self.divergence: dict[tuple[str, float], float] = defaultdict(float)
        self.shares: dict[tuple[str, float], list[float]] = defaultdict(list)

    @contextmanager
    def attached(self, model: Any, names: Sequence[str]) -> Iterator[None]:
        """Watch the named modules."""
        hooks = [model.get_submodule(name).register_forward_hook(self._watch(name)) for name in names]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _watch(self, name: str) -> Callable[..., None]:
        def watch(module: Any, arguments: tuple[torch.Tensor, ...], output: Any) -> None:
            if arguments and output.requires_grad and output.numel():
                inputs = arguments[0].detach()
                output.register_hook(lambda gradient: self._add(name, module, inputs, gradient))

        return watch

    def _add(self, name: str, module: Any, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        with torch.no_grad():
            flat, weight = inputs.reshape(-1, inputs.shape[-1]).float(), matrix(module).float()
            rows, stored = gradient.reshape(-1, gradient.shape[-1]).float(), int8.stored(weight)
            by_inputs, by_weights = rows @ stored, ((rows @ (stored - weight)) * flat).sum(1)
            for threshold in self.thresholds:
                seen, columns = int8.read(flat, threshold)
                change = (by_inputs * (seen - flat)).sum(1) + by_weights
                self.divergence[name, threshold] += float(change.double().square().sum()) / 2
                self.shares[name, threshold].append(float(columns.float().mean()))

    def result(self, name: str, shape: tuple[int, ...], tokens: int) -> Sensitivity:
        rows, inputs = shape
        size, shares = MatrixFormat(bits=8).stored_bytes(rows, inputs), self.shares
        return Sensitivity(
            size=size,
            saved=max(1, HALF_BYTES * rows * inputs - size),
            products=rows * inputs,
            divergence={threshold: self.divergence[name, threshold] / tokens for threshold in self.thresholds},
            share={
                threshold: sum(shares[name, threshold]) / max(1, len(shares[name, threshold]))
                for threshold in self.thresholds
            },
        )


class Comparison:
    """The model as it is on `tokens` [windows, length], to compare it with itself in 8 bits."""

    def __init__(self, model: Any, names: Sequence[str], tokens: torch.Tensor) -> None:
        self.model, self.names = model, names
        self.windows = torch.split(tokens.to(next(model.parameters()).device), 1)
        with torch.inference_mode():
            self.sliced = SlicedLogits.of(model, self.windows[0])
            self.states = [self.sliced.states(window) for window in self.windows]

    def divergence(self, choice: Choice) -> float:
        """Mean KL divergence (nats a token) of the model with 8-bit products but where the `choice` has others."""
        kept, total, count = set(choice.half_precision), 0.0, 0
        with torch.inference_mode(), _in_8_bits(self.model, set(self.names) - kept, choice.threshold):
            for window, states in zip(self.windows, self.states, strict=True):
                changed = self.sliced.states(window)
                pairs = zip(self.sliced.slices(states, window), self.sliced.slices(changed, window), strict=True)
                for (_, truth), (_, guess) in pairs:
                    p, q = torch.log_softmax(truth.float(), -1), torch.log_softmax(guess.float(), -1)
                    total += float((p.exp() * (p - q)).sum())
                count += window.numel()
        return total / count


@contextmanager
def _in_8_bits(model: Any, names: set[str], threshold: float) -> Iterator[None]:
    """Within, the named modules of `model` compute what LLM.int8 does."""

    def product(module: Any, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        flat = arguments[0].reshape(-1, arguments[0].shape[-1]).float()
        seen, _ = int8.read(flat, threshold)
        bias = None if module.bias is None else module.bias.float()
        result = torch.nn.functional.linear(seen, int8.stored(matrix(module)), bias)
        return result.to(output.dtype).view_as(output)

    hooks = [model.get_submodule(name).register_forward_hook(product) for name in sorted(names)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
