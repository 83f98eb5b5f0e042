"""Compensated rounding never loses to nearest rounding, always lies on the stored grid, and repeats itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.formats.bitsandbytes import packing
from quantize.formats.bitsandbytes.packing import Packed, ScaleGrid
from quantize.methods.rounding import gptq
from quantize.methods.rounding.gptq import Levels, Moments, Rounded, Search

SHAPES = st.tuples(st.integers(1, 24), st.sampled_from([64, 128, 192]))


def layer(seed: int, shape: tuple[int, int], tokens: int, dead: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and the moments of correlated inputs, some of which may never fire."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = shape
    inputs = torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)
    if dead:
        inputs[:, ::5] = 0
    moments = Moments(width)
    moments.add(inputs)
    return torch.randn(rows, width, generator=generator) / 20, moments.mean


def grid_of(weight: torch.Tensor, levels: Levels, signed: bool) -> ScaleGrid:
    scales = gptq.round_nearest(weight, levels).scales.reshape(-1)
    return ScaleGrid.around(scales * 1.1, 0.0 if signed else None)


def change_of(weight: torch.Tensor, packed: Packed, moments: torch.Tensor) -> torch.Tensor:
    return gptq.output_change(weight - packed.weight(), moments)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 999),
    SHAPES,
    st.sampled_from([3, 300]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["nf4", "fp4"]),
)
def test_no_row_comes_out_worse_than_by_nearest_rounding(
    seed: int, shape: tuple[int, int], tokens: int, dead: bool, signed: bool, quant_type: str
) -> None:
    weight, moments = layer(seed, shape, tokens, dead)
    levels = Levels.of(packing.table(quant_type))
    grid = grid_of(weight, levels, signed)
    plain = gptq.round_nearest(weight, levels, grid.quantized)
    nearest = Packed.build(plain.codes, plain.scales, grid, quant_type, torch.float32)
    found = gptq.round_compensated(weight, moments, levels, grid.quantized, Search(signed=signed, sweeps=1))
    packed = Packed.build(found.codes, found.scales, grid, quant_type, torch.float32)
    change = change_of(weight, packed, moments)
    assert bool((change <= change_of(weight, nearest, moments) * (1 + 1e-4) + 1e-9).all())
    assert torch.allclose(change, found.change, rtol=1e-3, atol=1e-7)


def loss_of(weight: torch.Tensor, found: Rounded, moments: torch.Tensor, gradient: torch.Tensor) -> float:
    error = weight - Packed.build(found.codes, found.scales, None, "nf4", torch.float32).weight()
    return float(torch.trace(gradient @ error @ moments @ error.T))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), SHAPES, st.integers(1, 9))
def test_with_the_gradients_moments_the_loss_grows_no_more_than_by_nearest_rounding(
    seed: int, shape: tuple[int, int], group: int
) -> None:
    weight, moments = layer(seed, shape, 300, dead=False)
    _, gradient = layer(seed + 1, (1, shape[0]), 300, dead=False)
    levels = Levels.of(packing.table("nf4"))
    found = gptq.round_compensated(weight, moments, levels, search=Search(group=group), output_moments=gradient)
    plain = gptq.round_nearest(weight, levels)
    assert loss_of(weight, found, moments, gradient) <= loss_of(weight, plain, moments, gradient) * 1.0001


def test_the_gradients_moments_save_much_of_the_loss() -> None:
    weight, moments = layer(0, (96, 192), 1000, dead=False)
    _, gradient = layer(1, (1, 96), 1000, dead=False)
    levels, search = Levels.of(packing.table("nf4")), Search(group=8)
    coupled = gptq.round_compensated(weight, moments, levels, search=search, output_moments=gradient)
    alone = gptq.round_compensated(weight, moments, levels, search=search)
    assert loss_of(weight, coupled, moments, gradient) < 0.9 * loss_of(weight, alone, moments, gradient)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), SHAPES)
def test_sweeps_only_help(seed: int, shape: tuple[int, int]) -> None:
    weight, moments = layer(seed, shape, 300, dead=False)
    levels = Levels.of(packing.table("nf4"))
    changes = [
        gptq.round_compensated(weight, moments, levels, search=Search(sweeps=sweeps, damping=0.0)).change.sum()
        for sweeps in (0, 1, 3)
    ]
    assert changes[0] * 1.0001 >= changes[1] and changes[1] * 1.0001 >= changes[2]


def test_compensation_and_signs_each_gain() -> None:
    weight, moments = layer(0, (32, 192), 1000, dead=False)
    levels = Levels.of(packing.table("nf4"))
    searches = [
        Search(factors=(1.0,), signed=False, sweeps=0),
        Search(signed=False, sweeps=0),
        Search(sweeps=0),
        Search(),
    ]
    changes = [float(gptq.round_compensated(weight, moments, levels, search=one).change.sum()) for one in searches]
    nearest = gptq.round_nearest(weight, levels)
    plain = Packed.build(nearest.codes, nearest.scales, None, "nf4", torch.float32)
    changes.insert(0, float(change_of(weight, plain, moments).sum()))
    assert changes == sorted(changes, reverse=True)
    assert changes[-1] < 0.4 * changes[0]


def test_the_same_inputs_give_the_same_bytes() -> None:
    weight, moments = layer(5, (24, 128), 200, dead=True)
    levels = Levels.of(packing.table("nf4"))
    first, second = (gptq.round_compensated(weight, moments, levels) for _ in range(2))
    assert torch.equal(first.codes, second.codes) and torch.equal(first.scales, second.scales)


def test_zeros_stay_zeros() -> None:
    levels = Levels.of(packing.table("nf4"))
    found = gptq.round_compensated(torch.zeros(3, 64), torch.zeros(64, 64), levels)
    assert not Packed.build(found.codes, found.scales, None, "nf4", torch.float32).weight().any()


def test_moments_weigh_tokens_by_their_importance() -> None:
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    twice, repeated = Moments(4), Moments(4)
    twice.add(inputs, torch.tensor([2.0, 1, 1, 1, 1, 0]))
    repeated.add(torch.cat([inputs[:1], inputs[:5]]))
    assert torch.allclose(twice.mean, repeated.mean)


def test_moments_that_cannot_be_inverted_are_refused() -> None:
    with pytest.raises(ValueError, match="positive definite"):
        gptq.inverse_factor(-torch.eye(4))
