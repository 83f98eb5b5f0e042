"""Compensated rounding never loses to nearest rounding, always lies on the stored grid, and repeats itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.formats.bitsandbytes import packing
from quantize.formats.bitsandbytes.packing import Packed, ScaleGrid
from quantize.methods.rounding import gptq
from quantize.methods.rounding.gptq import GptqOptions, HessianAccumulator, Levels, Rounded

SHAPES = st.tuples(st.integers(1, 24), st.sampled_from([64, 128, 192]))


def layer(seed: int, shape: tuple[int, int], tokens: int, dead: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and the Hessian of correlated inputs, some of which may never fire."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = shape
    inputs = torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)
    if dead:
        inputs[:, ::5] = 0
    hessian = HessianAccumulator(width)
    hessian.add(inputs)
    return torch.randn(rows, width, generator=generator) / 20, hessian.mean


def grid_of(weight: torch.Tensor, levels: Levels, signed: bool) -> ScaleGrid:
    scales = gptq.round_nearest(weight, levels).scales.reshape(-1)
    return ScaleGrid.around(scales * 1.1, 0.0 if signed else None)


def error_of(weight: torch.Tensor, packed: Packed, hessian: torch.Tensor) -> torch.Tensor:
    return gptq.output_error(weight - packed.weight(), hessian)


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
    weight, hessian = layer(seed, shape, tokens, dead)
    levels = Levels.of(packing.table(quant_type))
    grid = grid_of(weight, levels, signed)
    plain = gptq.round_nearest(weight, levels, grid.quantized)
    nearest = Packed.build(plain.codes, plain.scales, grid, quant_type, torch.float32)
    found = gptq.round_compensated(weight, hessian, levels, grid.quantized, GptqOptions(signed=signed, passes=1))
    packed = Packed.build(found.codes, found.scales, grid, quant_type, torch.float32)
    error = error_of(weight, packed, hessian)
    assert bool((error <= error_of(weight, nearest, hessian) * (1 + 1e-4) + 1e-9).all())
    assert torch.allclose(error, found.output_error, rtol=1e-3, atol=1e-7)


def loss_of(weight: torch.Tensor, found: Rounded, hessian: torch.Tensor, gradient: torch.Tensor) -> float:
    error = weight - Packed.build(found.codes, found.scales, None, "nf4", torch.float32).weight()
    return float(torch.trace(gradient @ error @ hessian @ error.T))


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), SHAPES, st.integers(1, 9))
def test_with_an_output_hessian_the_loss_grows_no_more_than_by_nearest_rounding(
    seed: int, shape: tuple[int, int], group: int
) -> None:
    weight, hessian = layer(seed, shape, 300, dead=False)
    _, gradient = layer(seed + 1, (1, shape[0]), 300, dead=False)
    levels = Levels.of(packing.table("nf4"))
    found = gptq.round_compensated(weight, hessian, levels, options=GptqOptions(group=group), output_hessian=gradient)
    plain = gptq.round_nearest(weight, levels)
    assert loss_of(weight, found, hessian, gradient) <= loss_of(weight, plain, hessian, gradient) * 1.0001


def test_an_output_hessian_saves_much_of_the_loss() -> None:
    weight, hessian = layer(0, (96, 192), 1000, dead=False)
    _, gradient = layer(1, (1, 96), 1000, dead=False)
    levels, options = Levels.of(packing.table("nf4")), GptqOptions(group=8)
    two_sided = gptq.round_compensated(weight, hessian, levels, options=options, output_hessian=gradient)
    one_sided = gptq.round_compensated(weight, hessian, levels, options=options)
    assert loss_of(weight, two_sided, hessian, gradient) < 0.9 * loss_of(weight, one_sided, hessian, gradient)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), SHAPES)
def test_passes_only_help(seed: int, shape: tuple[int, int]) -> None:
    weight, hessian = layer(seed, shape, 300, dead=False)
    levels = Levels.of(packing.table("nf4"))
    errors = [
        gptq.round_compensated(
            weight, hessian, levels, options=GptqOptions(passes=passes, damping=0.0)
        ).output_error.sum()
        for passes in (0, 1, 3)
    ]
    assert errors[0] * 1.0001 >= errors[1] and errors[1] * 1.0001 >= errors[2]


def test_compensation_and_signs_each_gain() -> None:
    weight, hessian = layer(0, (32, 192), 1000, dead=False)
    levels = Levels.of(packing.table("nf4"))
    variants = [
        GptqOptions(scale_grid=(1.0,), signed=False, passes=0),
        GptqOptions(signed=False, passes=0),
        GptqOptions(passes=0),
        GptqOptions(),
    ]
    errors = [
        float(gptq.round_compensated(weight, hessian, levels, options=candidate).output_error.sum())
        for candidate in variants
    ]
    nearest = gptq.round_nearest(weight, levels)
    plain = Packed.build(nearest.codes, nearest.scales, None, "nf4", torch.float32)
    errors.insert(0, float(error_of(weight, plain, hessian).sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.4 * errors[0]


def test_the_same_inputs_give_the_same_bytes() -> None:
    weight, hessian = layer(5, (24, 128), 200, dead=True)
    levels = Levels.of(packing.table("nf4"))
    first, second = (gptq.round_compensated(weight, hessian, levels) for _ in range(2))
    assert torch.equal(first.codes, second.codes) and torch.equal(first.scales, second.scales)


def test_zeros_stay_zeros() -> None:
    levels = Levels.of(packing.table("nf4"))
    found = gptq.round_compensated(torch.zeros(3, 64), torch.zeros(64, 64), levels)
    assert not Packed.build(found.codes, found.scales, None, "nf4", torch.float32).weight().any()


def test_the_hessian_weights_tokens() -> None:
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    twice, repeated = HessianAccumulator(4), HessianAccumulator(4)
    twice.add(inputs, torch.tensor([2.0, 1, 1, 1, 1, 0]))
    repeated.add(torch.cat([inputs[:1], inputs[:5]]))
    assert torch.allclose(twice.mean, repeated.mean)


def test_a_hessian_that_cannot_be_inverted_is_refused() -> None:
    with pytest.raises(ValueError, match="positive definite"):
        gptq.inverse_factor(-torch.eye(4))
