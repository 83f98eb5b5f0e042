"""Output Hessians and token weights: gradients of the loss at the outputs of modules, on calibration text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from quantize.methods.calibration.layers import autocast
from quantize.methods.calibration.sampling import draw
from quantize.methods.rounding.gptq import HessianAccumulator
from quantize.progress import Progress

MAX_TOKEN_WEIGHT = 10_000.0
"""Times the median: no token, such as the first one of a text, may count for all the others."""


@dataclass(frozen=True)
class OutputGradient:
    """Of the loss, at the outputs of a matrix or a decoder layer.

    `hessian` [outputs, outputs] is the second moment of the gradient, with a mean diagonal of 1;
    `token_weights` [tokens] are its squared norms at the calibration tokens, with mean 1.
    """

    token_weights: torch.Tensor
    hessian: torch.Tensor


def output_gradients(
    model: Any,
    names: list[str],
    tokens: torch.Tensor,
    device: str,
    batch: int,
    bfloat16: bool,
    seed: int,
    progress: Progress,
) -> dict[str, OutputGradient]:
    """For each named module of `model` on the device, from the loss at tokens drawn from the model's own prediction.

    With those the Hessians are the Fisher information, the curvature of the KL divergence, whatever text comes next.
    """
    hooks = _GradientHooks(model, names, device)
    embedding = model.get_input_embeddings().weight.requires_grad_(True)
    generator = torch.Generator(device).manual_seed(seed)
    parts = [part for part in torch.split(tokens, batch) if len(part) == batch]
    with progress.task("reading gradients", len(parts) * batch, "windows") as advance:
        for part in parts:
            with torch.enable_grad():
                with autocast(device, bfloat16):
                    logits = model(part.to(device), use_cache=False).logits
                logits = logits.float().flatten(0, 1)
                drawn = draw(torch.softmax(logits.detach(), -1), generator)
                loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
                torch.autograd.backward(loss)
            embedding.grad = None
            advance(batch)
    embedding.requires_grad_(False)
    return hooks.result()


class _GradientHooks:
    """Backward hooks that gather the gradients at each module's outputs."""

    def __init__(self, model: Any, names: list[str], device: str) -> None:
        self.squared_norms: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        self.hessians: dict[str, HessianAccumulator] = {}
        self.device = device
        self.hooks = [model.get_submodule(name).register_full_backward_hook(self._hook(name)) for name in names]

    def result(self) -> dict[str, OutputGradient]:
        for hook in self.hooks:
            hook.remove()
        gradients_by_name = {name: self._gradient(name) for name in self.squared_norms}
        return {name: gradient for name, gradient in gradients_by_name.items() if gradient is not None}

    def _gradient(self, name: str) -> OutputGradient | None:
        """Scaled to a mean of 1; None where the gradient is zero or not finite."""
        if name not in self.hessians:
            return None
        hessian = self.hessians[name].mean.cpu()
        size = float(hessian.diagonal().mean())
        if not 0 < size < float("inf"):
            return None
        token_weights = torch.cat(self.squared_norms[name])
        token_weights = token_weights.clamp(max=MAX_TOKEN_WEIGHT * float(token_weights.median()))
        return OutputGradient(token_weights / token_weights.mean().clamp(min=1e-30), hessian / size)

    def _hook(self, name: str) -> Callable[..., None]:
        def accumulate(_: Any, __: Any, gradients: tuple[torch.Tensor, ...]) -> None:
            flat = gradients[0].reshape(-1, gradients[0].shape[-1]).float()
            self.squared_norms[name].append(flat.square().sum(1).cpu())
            if name not in self.hessians:
                self.hessians[name] = HessianAccumulator(flat.shape[1], self.device)
            self.hessians[name].add(flat)

        return accumulate
