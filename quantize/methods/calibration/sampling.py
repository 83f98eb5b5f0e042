"""Drawing tokens."""

from __future__ import annotations

import torch


def shares(windows: int, length: int, seed: int) -> torch.Tensor:
    """Random numbers in 0..1, float [windows, length]: one for each token to be drawn.

    All are made beforehand and on the CPU, so what is drawn depends neither on how many windows run side by side nor on
    the device.
    """
    return torch.rand(windows, length, generator=torch.Generator().manual_seed(seed))


def draw(chances: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """One token [rows] for each row of `chances` [rows, vocabulary], int64, by one random number `share` [rows] each.

    `torch.multinomial` would take a number for every token of the vocabulary.
    """
    reached = chances.cumsum(-1)
    aim = share.to(chances.device)[:, None] * reached[:, -1:]
    return torch.searchsorted(reached, aim, right=True)[:, 0].clamp(max=chances.shape[1] - 1)
