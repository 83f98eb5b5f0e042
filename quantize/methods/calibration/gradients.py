"""How much the model's loss feels an error in each output of a module, from gradients on calibration text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from quantize.methods.calibration.layers import autocast
from quantize.methods.calibration.sampling import draw
from quantize.methods.rounding.gptq import Moments
from quantize.progress import Progress

MOST_ENERGY = 10_000.0
"""Times the median: no token, such as the first one of a text, may count for all the others."""


@dataclass(frozen=True)
class Gradient:
    """At the outputs of a matrix or a block: the second `moments` [outputs, outputs] of the loss's gradient, and its
    `energy`, the squared length at each calibration token [tokens], with mean 1."""

    energy: torch.Tensor
    moments: torch.Tensor


def gradients(
    model: Any,
    names: list[str],
    tokens: torch.Tensor,
    device: str,
    batch: int,
    fast: bool,
    seed: int,
    progress: Progress,
) -> dict[str, Gradient]:
    """For each named module of `model` on the device, from the loss at tokens drawn from the model's own prediction.

    With those the moments are the Fisher information's, the curvature of the KL divergence, whatever text comes next.
    """
    watch = _Watch(model, names, device)
    embedding = model.get_input_embeddings().weight.requires_grad_(True)
    generator = torch.Generator(device).manual_seed(seed)
    parts = [part for part in torch.split(tokens, batch) if len(part) == batch]
    with progress.task("reading gradients", len(parts) * batch, "windows") as advance:
        for part in parts:
            with torch.enable_grad():
                with autocast(device, fast):
                    logits = model(part.to(device), use_cache=False).logits
                logits = logits.float().flatten(0, 1)
                drawn = draw(torch.softmax(logits.detach(), -1), generator)
                loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
                torch.autograd.backward(loss)
            embedding.grad = None
            advance(batch)
    embedding.requires_grad_(False)
    return watch.result()


class _Watch:
    """Gathers what flows back into each module's outputs."""

    def __init__(self, model: Any, names: list[str], device: str) -> None:
        self.energy: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        self.moments: dict[str, Moments] = {}
        self.device = device
        self.hooks = [model.get_submodule(name).register_full_backward_hook(self._keeper(name)) for name in names]

    def result(self) -> dict[str, Gradient]:
        for hook in self.hooks:
            hook.remove()
        found = {name: self._gradient(name) for name in self.energy}
        return {name: one for name, one in found.items() if one is not None}

    def _gradient(self, name: str) -> Gradient | None:
        """Scaled to a mean of 1; None where the loss does not feel the matrix, or not in numbers."""
        if name not in self.moments:
            return None
        moments = self.moments[name].mean.cpu()
        size = float(moments.diagonal().mean())
        if not 0 < size < float("inf"):
            return None
        energy = torch.cat(self.energy[name])
        energy = energy.clamp(max=MOST_ENERGY * float(energy.median()))
        return Gradient(energy / energy.mean().clamp(min=1e-30), moments / size)

    def _keeper(self, name: str) -> Callable[..., None]:
        def keep(_: Any, __: Any, slopes: tuple[torch.Tensor, ...]) -> None:
            flat = slopes[0].reshape(-1, slopes[0].shape[-1]).float()
            self.energy[name].append(flat.square().sum(1).cpu())
            if name not in self.moments:
                self.moments[name] = Moments(flat.shape[1], self.device)
            self.moments[name].add(flat)

        return keep
