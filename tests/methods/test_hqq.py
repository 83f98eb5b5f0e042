"""Half-quadratic quantization: the files of rtn with a smaller l_p error, and a method that needs one module."""

from __future__ import annotations

import itertools
import pkgutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantize import methods
from quantize.errors import ConfigError
from quantize.formats.bitsandbytes import packing
from quantize.formats.bitsandbytes.packing import NotFinite
from quantize.formats.bitsandbytes.sizes import BLOCK, STATE
from quantize.methods import hqq
from quantize.methods.rounding.gptq import Levels
from quantize.records import Recipe
from tests.conftest import POCKET
from tests.methods.test_calibrated import LITTLE, made

HQQ = Recipe(name="hqq")


def lp_error(weight: torch.Tensor, packed: packing.Packed) -> float:
    return float((weight.float() - packed.weight()).abs().pow(hqq.NORM).sum())


def test_a_method_is_the_module_that_has_one() -> None:
    """Nothing but the module itself names it: not the registry, not the command line."""
    modules = [import_module(f"{methods.__name__}.{info.name}") for info in pkgutil.iter_modules(methods.__path__)]
    with_method = {module.__name__.rpartition(".")[2] for module in modules if hasattr(module, "METHOD")}
    assert set(methods.names()) == {methods.AUTO, *with_method}
    assert "hqq" in with_method
    package = Path(methods.__file__).parent.parent
    mentions = {path for path in package.rglob("*.py") if "hqq" in path.read_text("utf-8").lower()}
    assert mentions == {Path(hqq.__file__)}


@pytest.mark.slow
def test_its_file_is_that_of_rtn_and_stock_transformers_loads_it(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, rtn = made(tmp_path / "rtn", Recipe(name="rtn"))
    _, tensors = made(tmp_path / "hqq", HQQ)
    layout = {name: (one.dtype, one.shape) for name, one in rtn.items() if STATE not in name}
    assert layout == {name: (one.dtype, one.shape) for name, one in tensors.items() if STATE not in name}
    assert tensors.keys() == rtn.keys()
    assert any(not torch.equal(tensors[name], rtn[name]) for name in rtn)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hqq", local_files_only=True)
    assert sum(type(module).__name__ == "Linear4bit" for module in loaded.modules()) == 16
    with torch.no_grad():
        assert bool(loaded(torch.arange(8)[None]).logits.isfinite().all())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_each_matrix_of_a_trained_model_comes_nearer_than_by_rtn(quant_type: str, double_quant: bool) -> None:
    tensors = load_file(POCKET / "model.safetensors")
    matrices = [tensor.T for name, tensor in tensors.items() if ".h." in name and tensor.ndim == 2]
    assert len(matrices) == 16
    for weight in matrices[:4]:
        fitted = hqq.round_matrix(weight, quant_type, double_quant, 20)
        nearest = packing.nearest(weight, quant_type, double_quant)
        assert lp_error(weight, fitted) < lp_error(weight, nearest)


def test_codes_are_the_nearest_for_the_scales_as_they_are_stored() -> None:
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    packed = hqq.round_matrix(weight, "nf4", True, 20)
    levels = Levels.of(packing.table("nf4"))
    relative = weight / packing.expand_scales(packed.scales, weight.shape)
    assert torch.equal(levels.codes[levels.nearest(relative)], packed.codes)


@pytest.mark.parametrize("shape", [(5, 80), (3, 7)], ids=["blocks-across-rows", "less-than-a-block"])
def test_blocks_across_rows_are_those_of_the_flattened_matrix(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).half()
    fitted, nearest = hqq.round_matrix(weight, "nf4", False, 20), packing.nearest(weight, "nf4", False)
    assert {name: (one.dtype, one.shape) for name, one in fitted.tensors().items() if "state" not in name} == {
        name: (one.dtype, one.shape) for name, one in nearest.tensors().items() if "state" not in name
    }
    assert lp_error(weight, fitted) < lp_error(weight, nearest)


def test_more_iterations_only_help_and_zeros_stay_zeros() -> None:
    blocks = torch.randn(50, BLOCK, generator=torch.Generator().manual_seed(2))
    blocks[0] = 0
    levels = Levels.of(packing.table("nf4"))
    errors = []
    for iterations in (0, 1, 5, 20):
        scales = hqq.fit_scales(blocks, levels, iterations)
        places = levels.nearest(blocks / scales.clamp(min=1e-9)[:, None])
        errors.append((blocks - levels.values[places] * scales[:, None]).abs().pow(hqq.NORM).sum(1))
        assert scales[0] == 0
    assert torch.allclose(hqq.fit_scales(blocks, levels, 0), blocks.abs().amax(1))
    for fewer, more in itertools.pairwise(errors):
        assert bool((more <= fewer * 1.0001).all())
    assert not hqq.round_matrix(torch.zeros(2, BLOCK), "nf4", True, 3).weight().any()


def test_shrinking_takes_small_errors_away_and_leaves_large_ones() -> None:
    errors = torch.tensor([-1.5, -0.001, 0.0, 0.8])
    shrunk = hqq.shrink_lp(errors, 20.0)
    assert shrunk[1] == 0 and shrunk[2] == 0 and torch.equal(shrunk[[0, 3]].sign(), errors[[0, 3]].sign())
    assert bool((shrunk.abs() <= errors.abs()).all())
    assert shrunk[3] == pytest.approx(0.8 - 0.8 ** (hqq.NORM - 1) / 20)
    assert torch.allclose(hqq.shrink_lp(errors, 1e9), errors, atol=1e-6)


def test_damaged_weights_and_what_it_cannot_make_are_refused() -> None:
    with pytest.raises(NotFinite):
        hqq.round_matrix(torch.tensor([[1.0, float("nan")]]), "nf4", True, 1)
    with pytest.raises(ConfigError, match="makes 4-bit weights"):
        hqq.METHOD.require_bits(Recipe(name="hqq", bits=8))


def test_auto_neither_tries_it_nor_takes_its_option() -> None:
    assert hqq.METHOD.attempts(LITTLE) == ()
    with pytest.raises(ConfigError, match="the recipe auto has no --hqq-iterations"):
        methods.recipe_of({"name": "auto", "hqq_iterations": 5})
    assert methods.recipe_of({"name": "hqq", "hqq_iterations": 5}).options == {"hqq_iterations": 5}
