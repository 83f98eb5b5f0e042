"""Packed codes and scales are what stock bitsandbytes writes, and it reads any of them back to the bit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantize.formats.bitsandbytes import packing
from quantize.formats.bitsandbytes.packing import Packed, ScaleGrid
from quantize.methods.rounding.gptq import output_error
from quantize.methods.rounding.stored import compensated

QUANT_TYPES = st.sampled_from(["nf4", "fp4"])
BLOCKS = st.sampled_from([32, 64])


def random_packed(seed: int, shape: tuple[int, int], quant_type: str, double_quant: bool, block: int) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    blocks = -(-codes.numel() // block)
    scales = torch.randn(blocks, generator=generator)
    grid = ScaleGrid.around(scales, 0.0 if seed % 2 else None) if double_quant else None
    return Packed.build(codes, scales, grid, quant_type, torch.float32, block)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.integers(1, 40), st.integers(1, 100), QUANT_TYPES, st.booleans(), BLOCKS)
def test_bitsandbytes_reads_what_was_packed(
    seed: int, rows: int, pairs: int, quant_type: str, double_quant: bool, block: int
) -> None:
    packed = random_packed(seed, (rows, 2 * pairs), quant_type, double_quant, block)
    state = packed.state()
    if 2 * pairs % block:
        # bitsandbytes 0.50's CPU kernel takes wrong scales where blocks run across rows, so it is read as one row.
        state.shape = torch.Size((1, packed.codes.numel()))
    read = functional.dequantize_4bit(packed.tensors()["weight"], state)
    assert torch.equal(read.view(rows, 2 * pairs), packed.weight())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.integers(1, 40), st.integers(1, 200), QUANT_TYPES, st.booleans(), BLOCKS)
def test_unpacking_inverts_packing(
    seed: int, rows: int, inputs: int, quant_type: str, double_quant: bool, block: int
) -> None:
    tensors = random_packed(seed, (rows, inputs), quant_type, double_quant, block).tensors()
    again = Packed.of(tensors).tensors()
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.integers(1, 700), st.sampled_from([0.0, None, 0.3]))
def test_storing_moves_a_scale_by_less_than_a_hundredth_of_the_largest(
    seed: int, count: int, offset: float | None
) -> None:
    scales = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    grid = ScaleGrid.around(scales, offset)
    kept = grid.quantized(scales, torch.arange(count))
    assert (kept - scales).abs().max() <= 0.0075 * grid.spans.max() + 1e-6
    assert torch.allclose(grid.quantized(kept, torch.arange(count)), kept, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_compensated_packing_beats_nearest_at_no_more_bytes(quant_type: str, double_quant: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 192, generator=generator) @ torch.randn(192, 192, generator=generator)
    weight, hessian = torch.randn(96, 192, generator=generator) / 20, inputs.T @ inputs / 500
    stock = packing.nearest(weight, quant_type, double_quant)
    found = compensated(weight, hessian, quant_type, double_quant, torch.float32)
    stock_change, change = (output_error(weight - one.weight(), hessian).sum() for one in (stock, found))
    assert change < 0.5 * stock_change
    assert bool((found.scales < 0).any()) == (quant_type == "nf4")
    stock_size, size = (sum(tensor.nbytes for tensor in one.tensors().values()) for one in (stock, found))
    assert stock_size - 24 <= size <= stock_size + 4  # only the offset's digits differ


def test_blocks_that_run_across_rows_are_rounded_to_nearest() -> None:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    found = compensated(weight, torch.eye(96), "nf4", True, torch.float16)
    stock = packing.nearest(weight.half(), "nf4", True)
    assert torch.equal(found.codes, stock.codes) and torch.equal(found.stored_scales, stock.stored_scales)


@pytest.fixture(scope="module", params=[("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)])
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, bool]]:
    """The pocket model as stock transformers saves it in 4 bits."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quant_type, double_quant = request.param
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant
    )
    pocket = Path(__file__).parents[1] / "models" / "pocket-gpt2"
    folder = tmp_path_factory.mktemp("stock")
    AutoModelForCausalLM.from_pretrained(
        pocket, quantization_config=config, dtype=torch.float16, device_map={"": "cpu"}
    ).save_pretrained(folder)
    yield folder, quant_type, double_quant


def test_nearest_rounding_packs_to_the_bytes_that_stock_saves(stock: tuple[Path, str, bool], pocket: Path) -> None:
    folder, quant_type, double_quant = stock
    saved, source = load_file(folder / "model.safetensors"), load_file(pocket / "model.safetensors")
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        layer = f"transformer.h.1.{name}."
        mine = packing.nearest(source[f"{layer}weight"].half().T, quant_type, double_quant).tensors()
        theirs = {key.removeprefix(layer): value for key, value in saved.items() if key.startswith(f"{layer}weight")}
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert mine[key].dtype == value.dtype and torch.equal(mine[key], value), key


@pytest.mark.parametrize("tokens", [1, 7])
def test_a_layer_multiplies_by_negative_scales(tokens: int) -> None:
    packed = random_packed(3, (48, 128), "nf4", True, 64)
    assert bool((packed.scales < 0).any())
    tensors = packed.tensors()
    layer = bitsandbytes.nn.Linear4bit(128, 48, bias=False, compute_dtype=torch.float32)
    stats = {name.removeprefix("weight."): value for name, value in tensors.items() if name != "weight"}
    layer.weight = bitsandbytes.nn.Params4bit.from_prequantized(tensors["weight"], stats, device="cpu")
    inputs = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(layer(inputs), inputs @ packed.weight().T, atol=1e-4)


def test_stock_from_pretrained_loads_any_codes_and_scales(stock: tuple[Path, str, bool], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, quant_type, double_quant = stock
    copy, layer = Path(shutil.copytree(folder, tmp_path / "copy")), "transformer.h.0.mlp.c_proj."
    saved = load_file(copy / "model.safetensors")
    packed = replace(random_packed(1, (192, 768), quant_type, double_quant, 64), dtype=torch.float16)
    mine = {f"{layer}{name}": value for name, value in packed.tensors().items()}
    assert mine.keys() <= saved.keys()
    save_file(saved | mine, copy / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(copy, device_map={"": "cpu"})
    weight = model.get_submodule(layer.removesuffix(".")).weight
    assert torch.equal(functional.dequantize_4bit(weight.data, weight.quant_state), packed.weight().half())
