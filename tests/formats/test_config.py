"""The config that ships is the source's own, in whatever dialect, and says what was quantized besides."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize import methods, package, source
from quantize.files import CONFIG, GENERATION_CONFIG
from quantize.formats import remote_code
from quantize.formats.bitsandbytes import checkpoint
from quantize.formats.bitsandbytes import config as configs
from quantize.parity import generation_settings
from quantize.progress import Silent
from quantize.records import Recipe
from tests.conftest import POCKET

RTN = Recipe(name="rtn")
CHANGED = {"architectures", "dtype", "torch_dtype", "quantization_config"}
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}
CODE = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("a\xe9\udc80", max_size=2)
names = st.sampled_from(["rope_theta", "auto_map", "text_config", "dtype", "torch_dtype", "\udc80", "x"])
contents = st.recursive(leaves, lambda inner: st.dictionaries(names, inner, max_size=4) | st.lists(inner, max_size=2))
objects = st.dictionaries(names, contents, max_size=6)


def llama(folder: Path, **changes: Any) -> Path:
    """A tiny Llama with random weights, without generation_config.json.

    `changes` are those of its config.json, where None removes a field.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, **heads)).half().save_pretrained(folder)
    (folder / GENERATION_CONFIG).unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POCKET / name, folder)
    config = {**read(folder / CONFIG), **changes}
    (folder / CONFIG).write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def quantized(folder: Path, output: Path, *, trust_remote_code: bool = False) -> Path:
    """The files of a package that come before its evidence."""
    checkout = source.fetch(str(folder), revision=None, trust_remote_code=trust_remote_code, progress=Silent())
    output.mkdir()
    methods.quantize(methods.Job(checkout, output, RTN, "cpu", Silent()))
    package.copy_carried(checkout, source.carried_files(checkout.source), output)
    return output


def without(config: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


def test_an_older_dialect_stays(tmp_path: Path) -> None:
    """Versions before 5 find the base of the rotary embedding here alone; the newest find it as well."""
    from transformers import AutoModelForCausalLM

    older = {"rope_parameters": None, "dtype": None, "rope_theta": 100000.0, "torch_dtype": "float32"}
    folder = llama(tmp_path / "source", **older, transformers_version="4.42.3", own_field={"kept": [1, None]})
    made = read(quantized(folder, tmp_path / "out") / CONFIG)
    assert without(made, CHANGED) == without(read(folder / CONFIG), CHANGED)
    assert (made["dtype"], made["torch_dtype"]) == ("float16", "float16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map={"": "cpu"})
    assert loaded.config.rope_parameters["rope_theta"] == 100000.0


@given(objects)
@settings(deadline=None, max_examples=50)
def test_nothing_else_is_rewritten(config: dict[str, Any]) -> None:
    renewed = configs._with_dtype(config, "float16")
    assert list(renewed) == list(config)
    assert without(renewed, CHANGED | {"text_config"}) == without(config, CHANGED | {"text_config"})
    assert configs._with_dtype(renewed, "float16") == renewed


def test_the_type_is_renewed_in_parts_as_well() -> None:
    config = {"torch_dtype": "float32", "text_config": {"dtype": "float32", "x": {"dtype": "float32"}}}
    renewed = {"torch_dtype": "float16", "text_config": {"dtype": "float16", "x": {"dtype": "float32"}}}
    assert configs._with_dtype(config, "float16") == renewed


@pytest.mark.parametrize("own_file", [True, False])
def test_generation_settings_are_kept_as_stock_keeps_them(tmp_path: Path, own_file: bool) -> None:
    folder = llama(tmp_path / "source", **SAMPLING)
    if own_file:
        (folder / GENERATION_CONFIG).write_text(json.dumps({"eos_token_id": [0, 7], "temperature": 0.3}))
    made = quantized(folder, tmp_path / "out")
    checkout = source.fetch(str(folder), revision=None, trust_remote_code=False, progress=Silent())
    checkpoint.load_quantized(checkout, RTN, "float16", "cpu").save_pretrained(tmp_path / "stock")
    kept = made if own_file else tmp_path / "stock"
    expected = folder if own_file else tmp_path / "stock"
    assert read(made / GENERATION_CONFIG) == read(expected / GENERATION_CONFIG)
    assert read(made / CONFIG).items() >= SAMPLING.items()
    assert own_file or read(kept / GENERATION_CONFIG).items() >= SAMPLING.items()
    assert generation_settings.read(made, False) == generation_settings.read(folder, False)


def test_settings_that_contradict_each_other_do_so_in_the_package(tmp_path: Path) -> None:
    """Saving would refuse some of them, which is no reason to lose the others."""
    from transformers import AutoModelForCausalLM

    folder = llama(tmp_path / "source", do_sample=False, temperature=0.6, repetition_penalty=1.1)
    made = quantized(folder, tmp_path / "out")
    original, copy = (AutoModelForCausalLM.from_pretrained(place, device_map="cpu") for place in (folder, made))
    assert copy.generation_config.to_diff_dict() == original.generation_config.to_diff_dict()
    assert copy.generation_config.repetition_penalty == 1.1


def test_code_that_is_not_carried_is_not_named(tmp_path: Path) -> None:
    """So that the package loads for those who trust code by habit as well."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = llama(tmp_path / "source", auto_map=CODE, custom_pipelines={"own": {"impl": "pipe.Own"}})
    tokenizer = {**read(folder / "tokenizer_config.json"), "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    made = quantized(folder, tmp_path / "out")
    assert remote_code.classes(folder) and not remote_code.classes(made)
    assert read(made / "tokenizer_config.json") == without(tokenizer, {"auto_map"})
    assert not list(made.glob("*.py"))
    AutoTokenizer.from_pretrained(made, trust_remote_code=True)
    AutoModelForCausalLM.from_pretrained(made, trust_remote_code=True, device_map={"": "cpu"})


def test_a_word_that_looks_like_code_stays_in_the_vocabulary(tmp_path: Path) -> None:
    folder = llama(tmp_path / "source", auto_map=CODE)
    (folder / "vocab.json").write_text(json.dumps({"auto_map": 0, "custom_pipelines": 1}))
    made = quantized(folder, tmp_path / "out")
    assert (made / "vocab.json").read_bytes() == (folder / "vocab.json").read_bytes()


@given(objects)
@settings(deadline=None, max_examples=50)
def test_without_code_no_code_is_named(config: dict[str, Any]) -> None:
    assert not remote_code.names_code(remote_code.without_code(config))
