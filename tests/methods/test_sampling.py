"""Drawing tokens: as often as their chances say, and never one that has none."""

from __future__ import annotations

import torch

from quantize.methods.calibration.sampling import draw, shares


def test_tokens_come_as_often_as_their_chances_say() -> None:
    """By a chi-squared statistic of four degrees of freedom, whose 99.9 % quantile is 18.5."""
    chances = torch.tensor([0.0, 0.5, 0.25, 0.0, 0.125, 0.1, 0.025, 0.0])
    drawn = draw(chances.expand(20_000, 8), shares(1, 20_000, 5)[0])
    counts, expected = torch.bincount(drawn, minlength=8), 20_000 * chances
    assert not counts[chances == 0].any()
    assert ((counts - expected)[chances > 0].square() / expected[chances > 0]).sum() < 18.5


def test_each_row_is_drawn_from_its_own_chances() -> None:
    assert draw(torch.eye(50)[torch.arange(49, -1, -1)], shares(1, 50, 0)[0]).tolist() == [*range(49, -1, -1)]
