"""Infinities that mean something: limits that limit nothing, as those of audio towers, and masks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def are_bounds(values: torch.Tensor) -> bool:
    """Whether a tensor, or a part of one, is made of infinities and zeros alone: damage leaves other numbers beside."""
    infinite = values.isinf()
    return bool(infinite.any()) and bool((infinite | (values == 0)).all())
