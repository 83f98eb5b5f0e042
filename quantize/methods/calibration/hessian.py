"""The Hessian of a layer's inputs, and their covariance, gathered over calibration text."""

from __future__ import annotations

import torch

from quantize.methods.rounding.gptq import HessianAccumulator


class CenteredHessianAccumulator:
    """The Hessian of a module's inputs, summed around a point near their mean, so that float32 keeps small variances.

    Inputs x give the mean of x x^T as `hessian` and that of (x - mean) (x - mean)^T as `covariance`.
    """

    def __init__(self, inputs: int, device: str) -> None:
        self._center, self._offset_sum = torch.zeros(inputs, device=device), torch.zeros(inputs, device=device)
        self._centered = HessianAccumulator(inputs, device)

    @property
    def weight(self) -> float:
        """The sum of the weights of all tokens."""
        return self._centered.weight

    def add(self, inputs: torch.Tensor, token_weights: torch.Tensor | None) -> None:
        """Add `inputs` [tokens, inputs], weighted by `token_weights` [tokens] where there are any."""
        if not self.weight:
            self._center = inputs.mean(0)
        offsets = inputs - self._center
        self._centered.add(offsets, token_weights)
        self._offset_sum += offsets.sum(0) if token_weights is None else token_weights @ offsets

    @property
    def mean(self) -> torch.Tensor:
        """The weighted mean [inputs] of the inputs."""
        return self._center + self._offset_sum / self.weight

    @property
    def covariance(self) -> torch.Tensor:
        offset = self._offset_sum / self.weight
        return self._centered.mean - torch.outer(offset, offset)

    @property
    def hessian(self) -> torch.Tensor:
        return self.covariance + torch.outer(self.mean, self.mean)
