"""Nearest rounding on the CPU: bitsandbytes' own bytes, whatever the weights are."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.formats.bitsandbytes import cpu_kernel, packing

TYPES = (torch.float16, torch.bfloat16, torch.float32)


def stock(weight: torch.Tensor, quant_type: str, double_quant: bool, block: int) -> dict[str, torch.Tensor]:
    packed, state = functional.quantize_4bit(
        weight, blocksize=block, compress_statistics=double_quant, quant_type=quant_type
    )
    return {"weight": packed} | {f"weight.{name}": one for name, one in state.as_dict(packed=True).items()}


def require_same(weight: torch.Tensor, quant_type: str, double_quant: bool, block: int) -> None:
    mine, theirs = (make(weight, quant_type, double_quant, block) for make in (packing.nearest_tensors, stock))
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype and torch.equal(mine[name], tensor), name


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 200),
    kind=st.sampled_from(TYPES),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    double_quant=st.booleans(),
    block=st.sampled_from([32, 64]),
    scale=st.sampled_from([1e-6, 0.02, 1.0, 300.0]),
    seed=st.integers(0, 2**31),
)
def test_the_bytes_are_those_of_bitsandbytes(
    rows: int,
    columns: int,
    kind: torch.dtype,
    quant_type: str,
    double_quant: bool,
    block: int,
    scale: float,
    seed: int,
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale
    weight[seed % rows] = 0
    require_same(weight.to(kind), quant_type, double_quant, block)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_weights_on_the_boundaries_and_next_to_them(quant_type: str) -> None:
    """Scaled by exactly 1, so that the boundary between two codes itself comes up, and its neighbours among floats."""
    values = packing.table(quant_type).sort().values
    middles = (values[1:] + values[:-1]) / 2
    near = [middles, values]
    for _ in range(3):
        near += [torch.nextafter(near[-2], torch.tensor(2.0)), torch.nextafter(near[-1], torch.tensor(-2.0))]
    flat = torch.cat(near)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % 63)).view(-1, 63)
    require_same(torch.cat([torch.ones(len(blocks), 1), blocks], dim=1), quant_type, False, 64)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_matrices_are_shared_among_threads(threads: int) -> None:
    weight = torch.randn(1025, 1024, generator=torch.Generator().manual_seed(1)).half()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        packed, scales = cpu_kernel.quantize(weight, packing.table("nf4"), 64)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    theirs = stock(weight, "nf4", False, 64)
    assert torch.equal(packed, theirs["weight"]) and torch.equal(scales, theirs["weight.absmax"])


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_scale_tells_of_weights_that_are_no_numbers(kind: torch.dtype, bad: float) -> None:
    weight = torch.ones(4, 128, dtype=kind)
    weight[2, 70] = bad
    _, scales = cpu_kernel.quantize(weight, packing.table("nf4"), 64)
    assert scales.isfinite().tolist() == [True] * 5 + [False] + [True] * 2
