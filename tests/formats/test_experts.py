"""Experts that transformers stacks become linear modules, which compute the same, and 4-bit ones in the package."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize import methods, source
from quantize.errors import UnsupportedModel
from quantize.formats import experts, modeling_experts
from quantize.formats.bitsandbytes import checkpoint
from quantize.progress import Silent
from quantize.records import Recipe
from quantize.source import support
from tests.mixtures import FAMILIES, mixture, saved
from tests.models import tiny

RTN = Recipe(name="rtn")
QUICK = ("qwen3_moe", "mixtral", "gpt_oss", "llama4_text", "jetmoe", "longcat_flash")
SLOW = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=name) for name in FAMILIES]
IDS = torch.arange(48).view(2, 24)


def package(folder: Path, output: Path) -> Path:
    output.mkdir()
    checkout = source.fetch(str(folder), revision=None, trust_remote_code=False, progress=Silent())
    methods.quantize(methods.Job(checkout, output, RTN, "cpu", Silent()))
    return output


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, trust_remote_code=True).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits.float()
    return result


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", SLOW)
def test_linear_experts_compute_what_stacked_ones_do(family: str) -> None:
    model = mixture(family, vocab_size=64)
    expected = logits(model)
    linear = modeling_experts.unstack(model)
    assert experts.has_linear_experts(linear)
    assert not any("gate_up_proj" in name for name, _ in linear.named_parameters() if ".experts." in name)
    assert float((logits(linear) - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


def test_a_model_has_linear_experts_for_a_while() -> None:
    model = mixture("qwen3_moe", vocab_size=64)
    names = [name for name, _ in model.named_parameters()]
    with experts.as_linear(model):
        part = model.get_parameter("model.layers.1.mlp.experts.3.up_proj.weight")
        assert torch.equal(part, model_part(model, "model.layers.1.mlp.experts", 3))
    assert [name for name, _ in model.named_parameters()] == names


def model_part(model: Any, path: str, number: int) -> torch.Tensor:
    """The upper half of an expert's part of `gate_up_proj`, in the module that it was made from."""
    (storage,) = {model.get_parameter(f"{path}.{number}.{name}_proj.weight").untyped_storage() for name in ("up",)}
    whole = torch.empty(0).set_(storage).view(4, 128, 64)
    return whole[number, 64:]


def conversions() -> Iterator[tuple[str, tuple[str, ...]]]:
    """By the types of models, what transformers knows the layers of their experts by in files."""
    from transformers.conversion_mapping import _build_checkpoint_conversion_mapping

    for model_type, listed in _build_checkpoint_conversion_mapping().items():
        for item in listed or ():
            sources = [re.search(r"\.(\w+)\\?\.weight$", text) for text in item.source_patterns if "*" in text]
            if any("experts" in target and target.endswith("gate_up_proj") for target in item.target_patterns):
                yield model_type, tuple(match[1] for match in sources if match)


def test_names_are_those_that_transformers_knows() -> None:
    known = dict(conversions())
    for family in FAMILIES:
        if known.get(family):
            names = modeling_experts.OTHER_NAMES.get(family, modeling_experts.USUAL_NAMES)
            assert names[:2] == known[family], family


@pytest.mark.parametrize("stacked", [False, True])
def test_a_package_holds_what_quantizing_in_memory_gives(tmp_path: Path, stacked: bool) -> None:
    folder = saved("qwen3_moe", tmp_path / "source", stacked=stacked)
    made = package(folder, tmp_path / "made")
    names = load_file(made / "model.safetensors").keys()
    assert "model.layers.1.mlp.experts.3.down_proj.weight.absmax" in names
    assert not any("gate_up_proj" in name for name in names)
    config = json.loads((made / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_experts.UnstackedQwen3MoeForCausalLM"
    assert (made / experts.MODELING).read_bytes() == experts.OWN_CODE.read_bytes()
    model = loaded(made)
    assert sum(type(module).__name__ == "Linear4bit" for module in model.modules()) == 2 * (4 + 4 * 3)
    assert torch.equal(logits(model), logits(in_memory(saved("qwen3_moe", tmp_path / "original"))))


def test_a_stack_may_lie_the_other_way_round_in_a_file(tmp_path: Path) -> None:
    """As those of Qwen3-VL do."""
    folder = saved("qwen3_moe", tmp_path / "source", stacked=True, moe_intermediate_size=128)
    expected = load_file(package(folder, tmp_path / "expected") / "model.safetensors")
    tensors = load_file(folder / "model.safetensors")
    turned = {name: values.mT.contiguous() if values.ndim == 3 else values for name, values in tensors.items()}
    assert any(values.shape != tensors[name].shape for name, values in turned.items())
    save_file(turned, folder / "model.safetensors", {"format": "pt"})
    held = load_file(package(folder, tmp_path / "made") / "model.safetensors")
    assert held.keys() == expected.keys()
    assert all(torch.equal(values, expected[name]) for name, values in held.items())


def in_memory(folder: Path) -> Any:
    """The model of a folder with linear experts, quantized while it is loaded by transformers and bitsandbytes."""
    from transformers import Qwen3MoeForCausalLM

    from quantize.formats.bitsandbytes import config

    settings = config.build(RTN, "float16", ["lm_head"])
    unstacking = modeling_experts.unstacking(Qwen3MoeForCausalLM)
    options = {"quantization_config": settings, "dtype": torch.float16, "device_map": {"": "cpu"}}
    return unstacking.from_pretrained(folder, **options).eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_makes_a_package_that_loads(tmp_path: Path, family: str) -> None:
    made = package(saved(family, tmp_path / "source"), tmp_path / "made")
    assert bool(torch.isfinite(logits(loaded(made))).all())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama4_text", "jetmoe", pytest.param("longcat_flash", marks=pytest.mark.slow)])
def test_experts_of_a_kind_of_their_own_have_the_codes_of_their_part(tmp_path: Path, family: str) -> None:
    from bitsandbytes import functional

    made = loaded(package(saved(family, tmp_path / "source", vocab_size=64), tmp_path / "made"))
    original = modeling_experts.unstack(mixture(family, torch.float16, vocab_size=64))
    names = [name for name, module in made.named_modules() if type(module).__name__ == "Linear4bit"]
    inside = [name for name in names if any(name.startswith(path) for path, _ in experts.linear_experts(original))]
    assert len(inside) >= 12
    for name in inside:
        weight = original.get_submodule(name).weight.detach().contiguous()
        codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        held = made.get_submodule(name).weight
        expected = functional.dequantize_4bit(codes, state)
        assert torch.equal(functional.dequantize_4bit(held.data, held.quant_state), expected), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["inkling_mm_model", "diffusion_gemma"])
def test_what_cannot_be_read_tensor_by_tensor_is_refused_by_its_config(kind: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"tied to other experts|stored in a form that is not known"):
        described = tiny.config(kind, architectures=[tiny.model_class(kind).__name__]).to_json_string(use_diff=False)
        support.check_model(json.loads(described), "their-model")


def test_routers_stay_as_they_are(tmp_path: Path) -> None:
    folder = saved("qwen2_moe", tmp_path / "source")
    checkout = source.fetch(str(folder), revision=None, trust_remote_code=False, progress=Silent())
    names = checkpoint.quantized_names(checkout, RTN)
    assert "model.layers.0.mlp.shared_expert.gate_proj" in names
    assert not any(name.endswith(("mlp.gate", "shared_expert_gate")) for name in names)
