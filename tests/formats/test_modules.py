"""Which modules become quantized is what transformers decides when it loads a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantize.errors import UnsupportedModel
from quantize.formats.bitsandbytes import modules
from quantize.package.card import _summarized
from quantize.records import Recipe

SHAPE = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2},
}


class FusedLinear(torch.nn.Linear):
    """A class of its own, which may compute anything."""


def skeleton(kind: str, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SHAPE, **changes}))


def test_subclasses_of_linear_stay_and_are_named() -> None:
    model = skeleton("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj = FusedLinear(32, 64, bias=False, device="meta")
    names = modules.to_quantize(model, Recipe(), "own")
    assert len(names) == 12 and not any("up_proj" in name for name in names)
    assert modules.passed_over(model) == {f"model.layers.{number}.mlp.up_proj": "FusedLinear" for number in (0, 1)}


def test_a_model_of_such_layers_alone_is_refused_by_their_class() -> None:
    model = skeleton("falcon")
    names = modules.to_quantize(model, Recipe(), "falcon")
    with pytest.raises(UnsupportedModel, match="layers of the class FalconLinear"):
        modules.require_quantized(names, model, "falcon")


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_the_last_module_whether_it_is_tied_or_not(tied: bool) -> None:
    """A tied model lists its head with the embeddings, and another module last."""
    model = skeleton("llama", tie_word_embeddings=tied)
    model.model.norm = torch.nn.Sequential(model.model.norm, torch.nn.Linear(32, 32, device="meta"))
    kept = modules.kept_by_default(model)
    assert "lm_head" in kept and not any("norm" in name for name in kept)


def test_many_layers_are_named_together() -> None:
    layers = tuple(f"model.layers.{number}.mlp.up_proj" for number in range(24))
    assert _summarized((*layers, "model.layers.0.mlp.gate_proj", "lm_head")) == (
        "model.layers.*.mlp.up_proj",
        "model.layers.0.mlp.gate_proj",
        "lm_head",
    )
