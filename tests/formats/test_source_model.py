"""The model that a config describes against the tensors in its files: what is absent, spare, or of another shape."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize import source
from quantize.errors import CorruptModel, UnsupportedModel
from quantize.formats import source_model
from quantize.progress import Silent
from quantize.records import Checkout
from tests.conftest import POCKET, Outcome

SHAPE: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "vocab_size": 4096, "max_position_embeddings": 128, "tie_word_embeddings": False},
    **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
}
KINDS = ("llama", "qwen3", "gemma2", "phi3", "gpt_neox", "mixtral", "mamba", "bloom")


def made(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """A model of two layers with random weights and the pocket model's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SHAPE, **changes})
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POCKET / name, folder)
    return folder


def fetched(folder: Path) -> Checkout:
    return source.fetch(str(folder), revision=None, trust_remote_code=False, progress=Silent())


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
def test_whole_models_are_whole(kind: str, tmp_path: Path) -> None:
    assert source_model.check_tensors(fetched(made(tmp_path / kind, kind))) == ()


def test_the_pocket_model_has_ties_and_may_have_masks_that_nobody_reads(pocket_copy: Path) -> None:
    assert source_model.check_tensors(fetched(pocket_copy)) == ()
    edit_tensors(pocket_copy, lambda held: held.update({"h.0.attn.bias": torch.ones(1, 1, 8, 8)}))
    assert source_model.check_tensors(fetched(pocket_copy)) == ()
    edit_tensors(pocket_copy, lambda held: held.update({"lm_head.weight": held.pop("transformer.wte.weight")}))
    assert source_model.check_tensors(fetched(pocket_copy)) == ()


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.input_layernorm.weight", "lm_head.weight", "model.layers.1.mlp.down_proj.weight"],
)
def test_absent_tensors_are_named_before_and_while_a_model_is_loaded(name: str, tmp_path: Path) -> None:
    folder = made(tmp_path / "model")
    edit_tensors(folder, lambda held: held.pop(name))
    with pytest.raises(CorruptModel, match=f"{name} is missing from the weights of model: fetch"):
        source_model.check_tensors(fetched(folder))
    with pytest.raises(CorruptModel, match=f"{name} is missing from the weights of it: fetch"):
        source_model.load(folder, "it")


def test_what_has_no_place_in_the_model_is_listed_by_layer(tmp_path: Path) -> None:
    folder = made(tmp_path / "model", num_hidden_layers=3)
    edit_tensors(folder, lambda held: held.update({"mtp.head.weight": torch.ones(2), "x`\n# y": torch.ones(1)}))
    edit_config(folder, num_hidden_layers=2)
    unused = source_model.check_tensors(fetched(folder))
    assert "model.layers.2.self_attn.q_proj.weight" in unused and "mtp.head.weight" in unused
    assert source_model.grouped(unused) == {"model.layers.2": 9, "mtp.head": 1, "x????y": 1}


def test_a_layer_that_transformers_is_told_to_ignore_is_listed_as_well(tmp_path: Path) -> None:
    from transformers import DeepseekV3ForCausalLM

    folder = made(tmp_path / "model")
    model = source_model.skeleton(fetched(folder))
    model._keys_to_ignore_on_load_unexpected = DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected
    assert not source_model._is_former_buffer("model.layers.61.eh_proj.weight", model)
    model._keys_to_ignore_on_load_unexpected = ["attn.bias"]
    assert source_model._is_former_buffer("layers.1.self_attn.bias", model)


def test_shapes_that_the_config_does_not_have_are_named(tmp_path: Path) -> None:
    folder = made(tmp_path / "model", vocab_size=4160)
    edit_config(folder, vocab_size=4096)
    shapes = r"has the shape \[4160, 64\] in its file, and \[4096, 64\] by its config\.json"
    with pytest.raises(CorruptModel, match=rf"lm_head\.weight of model {shapes}"):
        source_model.check_tensors(fetched(folder))


def test_a_head_that_is_not_what_the_config_ties_it_to_is_named(pocket_copy: Path) -> None:
    edit_tensors(pocket_copy, lambda held: held.update({"lm_head.weight": held["transformer.wte.weight"].clone()}))
    assert source_model.check_tensors(fetched(pocket_copy)) == ()
    edit_tensors(pocket_copy, lambda held: held["lm_head.weight"].add_(1))
    with pytest.raises(CorruptModel, match=r"lm_head\.weight of pocket-copy differs from transformer\.wte\.weight"):
        source_model.check_tensors(fetched(pocket_copy))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "llama"},
        {"n_layer": 10**9},
        {"n_layer": 9000},
        {"n_embd": 10**7},
        {"vocab_size": 10**12},
        {"n_positions": 10**12},
        {"num_labels": 10**10},
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "text_config": {"num_hidden_layers": 1e30}},
    ],
    ids=str,
)
def test_a_config_that_promises_too_much_is_refused_at_once(pocket_copy: Path, changes: dict[str, Any]) -> None:
    edit_config(pocket_copy, **changes)
    checkout, started = fetched(pocket_copy), time.monotonic()
    with pytest.raises(CorruptModel, match="it is another model's"):
        source_model.check_tensors(checkout)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("changes", [{"n_embd": "wide"}, {"n_head": 0}, {"activation_function": "no such"}], ids=str)
def test_a_config_that_describes_no_model_is_one_line(pocket_copy: Path, changes: dict[str, Any]) -> None:
    edit_config(pocket_copy, **changes)
    with pytest.raises(UnsupportedModel, match=r"transformers cannot build pocket-copy from its config\.json: ") as one:
        source_model.skeleton(fetched(pocket_copy))
    assert "\n" not in str(one.value)


def test_a_tensor_in_two_files_is_named(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = made(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="500KB")
    (folder / "model.safetensors").unlink()
    first, second = sorted(folder.glob("model-0000[12]-*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second, {"format": "pt"})
    with pytest.raises(CorruptModel, match=f"{name} lies in {first.name} and in {second.name}"):
        source_model.tensors(fetched(folder))


def test_a_tokenizer_of_another_model_is_refused_before_the_work(
    tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    folder = made(tmp_path / "model", vocab_size=4000)
    ended = command("run", folder, "-o", tmp_path / "out", "--device", "cpu", "--recipe", "rtn")
    assert ended.code == 1 and "and its model knows 4000 tokens" in ended.err and "quantize to" not in ended.err


def test_an_incomplete_source_is_refused_before_the_work(tmp_path: Path, command: Callable[..., Outcome]) -> None:
    folder = made(tmp_path / "model")
    edit_tensors(folder, lambda held: held.pop("model.norm.weight"))
    ended = command("run", folder, "-o", tmp_path / "out", "--device", "cpu", "--recipe", "rtn")
    assert ended.code == 1 and "model.norm.weight is missing from the weights of model" in ended.err
    assert "quantize to" not in ended.err
