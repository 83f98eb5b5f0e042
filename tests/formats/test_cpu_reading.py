"""Matrices that bitsandbytes misreads on some CPUs are found by their shape, and read here."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit

from quantize.formats.bitsandbytes import cpu_reading
from quantize.formats.bitsandbytes.sizes import BLOCK
from tests.conftest import POCKET
from tests.pipeline.test_run import small_run


def as_avx512_does(read: Any) -> Any:
    """bitsandbytes' `dequantize_4bit` with the fault of its AVX-512 kernels."""

    def dequantize(codes: torch.Tensor, state: Any) -> torch.Tensor:
        values: torch.Tensor = read(codes, state)
        rows, inputs = state.shape
        if not cpu_reading.misreads(inputs, state.blocksize) or rows == 1:
            return values
        scales = state.absmax
        if state.nested:
            scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
        right = scales.repeat_interleave(state.blocksize)[: rows * inputs].view(rows, inputs)
        first = torch.arange(rows)[:, None] * (inputs // state.blocksize)
        wrong = scales[(first + torch.arange(inputs) // state.blocksize).clamp_max(len(scales) - 1)]
        misread: torch.Tensor = (values / right * wrong).to(values.dtype)
        return misread

    return dequantize


@pytest.fixture
def avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "dequantize_4bit", as_avx512_does(functional.dequantize_4bit))
    cpu_reading.misreads_here.cache_clear()
    monkeypatch.setattr(cpu_reading, "misreads_here", cpu_reading.misreads_here.__wrapped__)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose rows are four and a half blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 6, "num_key_value_heads": 6, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=4096, hidden_size=288, intermediate_size=320, max_position_embeddings=128, **heads)
    folder = tmp_path_factory.mktemp("sources") / "narrow"
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POCKET / name, folder)
    return folder


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("inputs", [288, 320, 32])
def test_values_are_those_of_one_long_row(quant_type: str, nested: bool, inputs: int) -> None:
    """Which every kernel reads rightly."""
    torch.manual_seed(0)
    weight = torch.randn(6, inputs)
    module = Linear4bit(inputs, 6, bias=False, quant_type=quant_type, compress_statistics=nested)
    module.weight.data = weight
    module = module.to("cpu")
    options = {"quant_type": quant_type, "compress_statistics": nested}
    expected = functional.dequantize_4bit(*functional.quantize_4bit(weight.view(1, -1), **options))
    assert torch.allclose(cpu_reading.values(module), expected.view(6, inputs), rtol=1e-6)


def test_shapes_that_are_misread() -> None:
    assert [inputs for inputs in (32, 33, 64, 288, 320) if cpu_reading.misreads(inputs, BLOCK)] == [32, 288]


@pytest.mark.slow
@pytest.mark.usefixtures("avx512")
def test_a_package_is_measured_at_its_real_values_and_warns(narrow: Path, tmp_path: Path) -> None:
    assert cpu_reading.misreads_here(288, BLOCK, "nf4")
    made = small_run(tmp_path / "out", narrow)
    checks = {check.name: check for check in made.evidence.checks}
    assert made.evidence.verdict.passed and "misreads 6 modules on this CPU" in checks["arithmetic"].detail
    assert len(made.evidence.misread_on_cpu) == 6
    assert all(error < 0.2 for error in made.evidence.weight_errors.values())
    card = (made.folder / "README.md").read_text()
    assert "Not for CPUs with AVX-512" in card and "wrongly on such a CPU" in card
