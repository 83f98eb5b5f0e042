"""Weights that a model reads by itself stay numbers: its package runs, where that of stock does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quantize.formats.bitsandbytes import modules
from tests.formats.test_writer import fetched, stream
from tests.models import tiny


def skeleton(kind: str) -> Any:
    with torch.device("meta"):
        return tiny.model_class(kind)._from_config(tiny.config(kind))


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("llama", set()),
        ("gpt2", set()),
        ("gemma3n_text", set()),
        ("mamba", {"dt_proj"}),
        ("falcon_mamba", set()),
        ("rwkv", {"output", "value"}),
    ],
)
def test_what_is_read_directly(kind: str, parts: set[str]) -> None:
    """Falcon-Mamba would do so too, and does not where its config is marked as quantized."""
    model = skeleton(kind)
    assert {name.rpartition(".")[2] for name in modules.read_directly(model)} == parts
    assert not hasattr(model.config, "_is_quantized")


def test_a_model_with_weights_is_asked_without_touching_them() -> None:
    model = tiny.build("rwkv")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert modules.read_directly(model) == modules.read_directly(skeleton("rwkv"))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_package_of_mamba_runs(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny.save("mamba", tmp_path / "mamba")
    assert stream(fetched(tmp_path / "mamba"), tmp_path / "out") == []
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    kinds = {name.rpartition(".")[2]: type(module).__name__ for name, module in model.named_modules()}
    assert (kinds["dt_proj"], kinds["in_proj"]) == ("Linear", "Linear4bit")
    assert bool(model(torch.arange(9)[None]).logits.isfinite().all())
