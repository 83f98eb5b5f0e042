"""The linear modules of a model, which bitsandbytes can replace, and how they keep their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def matrix(module: Any) -> torch.Tensor:
    """A linear module's weight as [outputs, inputs]."""
    weight: torch.Tensor = module.weight.detach()
    return weight.T if is_transposed(module) else weight


def laid_out(module: Any, values: torch.Tensor) -> torch.Tensor:
    """The inverse of `matrix`, in the type of the module's weight."""
    return (values.T.contiguous() if is_transposed(module) else values).to(module.weight)


def is_transposed(module: Any) -> bool:
    """Whether a linear module keeps its weight as [inputs, outputs], as those of GPT-2 do."""
    return type(module).__name__ == "Conv1D"
