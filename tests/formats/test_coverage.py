"""How much of a model is in 4 bits is counted, said and required."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import model_card
from quantize import package
from quantize.errors import UnsupportedModel
from quantize.evidence import Coverage
from quantize.formats.bitsandbytes import coverage, modules
from quantize.package.card import facts
from quantize.records import Recipe
from quantize.source import support
from tests.conftest import POCKET, Outcome
from tests.models import tiny

RTN = Recipe(name="rtn")


class FusedLinear(torch.nn.Linear):
    """A class of its own, which bitsandbytes passes over."""


def skeleton(kind: str, **changes: Any) -> Any:
    with torch.device("meta"):
        return tiny.model_class(kind)._from_config(tiny.config(kind, **changes))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba", "recurrent_gemma", "llava"])
def test_shares_are_those_of_all_parameters(kind: str) -> None:
    """Ties count once, and everything counts."""
    model = skeleton(kind)
    names = modules.to_quantize(model, RTN, kind)
    shares = coverage.of(model, names)
    total = sum(parameter.numel() for parameter in model.parameters())
    tied = sum(model.get_parameter(name).numel() for name in model.all_tied_weights_keys)
    shared = len(list(model.named_parameters(remove_duplicate=False))) - len(list(model.parameters()))
    inside = sum(model.get_submodule(name).weight.numel() for name in names)
    assert shares.quantized == pytest.approx(inside / (total if shared else total - tied), abs=1e-4)
    assert shares.quantized + sum(shares.kept.values()) == pytest.approx(1, abs=1e-3)
    assert list(shares.kept.values()) == sorted(shares.kept.values(), reverse=True)


def test_what_stays_is_named_by_its_kind() -> None:
    kept = coverage.of(skeleton("llava"), modules.to_quantize(skeleton("llava"), RTN, "x")).kept
    assert {"embeddings", "output head", "model.vision_tower", "model.multi_modal_projector"} <= kept.keys()
    assert "layers of the class Conv1d" in coverage.of(skeleton("mamba"), ()).kept
    assert "linear layers that are skipped" in coverage.of(skeleton("mamba"), ()).kept


def with_fused(model: Any, names: tuple[str, ...]) -> Any:
    for layer in model.model.layers:
        for name in names:
            old = getattr(layer.mlp, name)
            setattr(layer.mlp, name, FusedLinear(old.in_features, old.out_features, bias=False, device="meta"))
    return model


def test_a_model_of_which_little_can_be_quantized_is_refused_with_what_stays() -> None:
    wide = {"intermediate_size": 2048, "vocab_size": 512}
    model = with_fused(skeleton("llama", **wide), ("gate_proj", "up_proj", "down_proj"))
    with pytest.raises(UnsupportedModel, match=r"only [\d.]+% of .*layers of the class FusedLinear 8\d\.\d%"):
        coverage.require(model, RTN, "it")
    coverage.require(with_fused(skeleton("llama", **wide), ("gate_proj",)), RTN, "it")


def test_who_skips_modules_is_not_told_that_they_are_missing() -> None:
    coverage.require(skeleton("llama"), Recipe(name="rtn", skip_modules=("mlp", "self_attn")), "it")


def test_a_model_is_refused_by_its_config_before_its_weights_are_fetched() -> None:
    content = json.loads(tiny.config("llava").to_json_string(use_diff=False))
    content["architectures"] = ["LlavaForConditionalGeneration"]
    support.check_model(content, "it")
    content["vision_config"]["intermediate_size"] = 1 << 16
    with pytest.raises(UnsupportedModel, match=r"10% of those beside .*model.vision_tower 9\d"):
        support.check_model(content, "it")


def test_a_large_vocabulary_is_no_reason_to_refuse() -> None:
    coverage.require(skeleton("llama", vocab_size=200_000), RTN, "it")


def test_the_output_and_the_card_name_it(tmp_path: Path, command: Callable[..., Outcome]) -> None:
    options = ("--recipe", "rtn", "--device", "cpu", "--unverified", "-o", tmp_path / "out")
    ended = command("run", POCKET, *options)
    opened = package.open_package(tmp_path / "out")
    shares = opened.evidence.coverage
    assert ended.code == 0 and shares is not None and shares.quantized > 0.5
    assert f"{shares.quantized:.1%} of the parameters are in 4 bits" in ended.err
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"hold 4-bit weights, {100 * shares.quantized:.1f} % of all parameters" in card
    assert f"these stay in float16: `embeddings` {100 * shares.kept['embeddings']:.1f} %" in card


def test_the_card_does_not_call_a_model_4_bit_of_which_little_is() -> None:
    opened = package.open_package(POCKET.parents[1] / "data" / "package-v1")
    for share, words in ((0.8, "This 4-bit model"), (0.2, "This partly 4-bit model")):
        covered = dataclasses.replace(opened.evidence, coverage=Coverage(share, {"embeddings": 1 - share}))
        card = model_card.render(facts(opened.provenance, covered, None, ()))
        assert words in card
        assert ("Only partly in 4 bits" in card) == (share < 0.5)
