"""Drawing tokens."""

from __future__ import annotations

import torch


def draw(chances: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token [rows] for each row of `chances` [rows, vocabulary], int64.

    One random number a row, where `torch.multinomial` takes one for every token of the vocabulary.
    """
    reached = chances.cumsum(-1)
    aim = torch.rand(len(chances), 1, generator=generator, device=chances.device) * reached[:, -1:]
    return torch.searchsorted(reached, aim, right=True)[:, 0].clamp(max=chances.shape[1] - 1)
