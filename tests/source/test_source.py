"""Which files a run takes, which models it refuses, and what it says then."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize import source
from quantize.errors import (
    CorruptModel,
    SourceChanged,
    SourceError,
    SourceNotFound,
    StorageError,
    UnsupportedModel,
)
from quantize.files import require_space
from quantize.formats.safetensors import INDEX
from quantize.progress import Silent

REAL_LISTING = [
    ".gitattributes", "64.tflite", "LICENSE", "README.md", "config.json", "coreml/text-generation/model.mlmodel",
    "flax_model.msgpack", "generation_config.json", "generation_config_for_text_generation.json", "merges.txt",
    "model.safetensors", "onnx/config.json", "onnx/decoder_model.onnx", "onnx/tokenizer.json", "pytorch_model.bin",
    "rust_model.ot", "tf_model.h5", "tokenizer.json", "tokenizer_config.json", "vocab.json",
]  # fmt: skip


def fetch(folder: Path, *, trust_remote_code: bool = False) -> Any:
    return source.fetch(str(folder), revision=None, trust_remote_code=trust_remote_code, progress=Silent())


def change(path: Path, **values: Any) -> None:
    """Set fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_only_what_is_needed_is_taken() -> None:
    assert source.choose_files(REAL_LISTING, None, "distilgpt2", remote_code=False) == [
        "LICENSE",
        "README.md",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]


def test_shards_come_from_the_index_and_consolidated_copies_stay_away() -> None:
    names = ["consolidated.safetensors", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {"a": names[1], "b": names[2]}}
    chosen = source.choose_files([*names, INDEX, "tokenizer.json"], index, "m", remote_code=False)
    assert chosen == [names[1], names[2], INDEX, "tokenizer.json"]
    with pytest.raises(CorruptModel, match=r"names model-00002-of-00002\.safetensors, which is missing"):
        source.choose_files([names[1], INDEX, "tokenizer.json"], index, "m", remote_code=False)


def test_code_travels_only_where_it_is_needed() -> None:
    listing = [*REAL_LISTING, "modeling_own.py"]
    assert "modeling_own.py" not in source.choose_files(listing, None, "m", remote_code=False)
    assert "modeling_own.py" in source.choose_files(listing, None, "m", remote_code=True)


def test_code_may_read_a_vocabulary_of_any_name() -> None:
    own = ["config.json", "model.safetensors", "tokenization_own.py", "tokenizer_config.json", "words.own"]
    foreign = ["onnx/words.own", "tf_model.h5", "demo.png", ".gitattributes", "vocab.bin"]
    assert source.choose_files([*own, *foreign], None, "m", remote_code=True) == own
    with pytest.raises(UnsupportedModel, match=r"has no tokenizer.*needs --trust-remote-code"):
        source.choose_files([*own, *foreign], None, "m", remote_code=False)


@pytest.mark.parametrize("auto_map", [{"AutoTokenizer": ["own.Own", None]}, ["own.Own", None]])
def test_a_tokenizer_that_is_code(pocket_copy: Path, auto_map: Any) -> None:
    """For GPT-2 transformers has a tokenizer; for Llama it has only those that are named, so there code is needed."""
    change(pocket_copy / "tokenizer_config.json", tokenizer_class="Own", auto_map=auto_map)
    (pocket_copy / "own.py").write_text("")
    assert fetch(pocket_copy).source.code_left_out
    assert "own.py" not in fetch(pocket_copy).source.fingerprint()
    change(pocket_copy / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(UnsupportedModel, match=r"tokenizer of .* needs code from its own repo.*--trust-remote-code"):
        fetch(pocket_copy)
    allowed = fetch(pocket_copy, trust_remote_code=True).source
    assert allowed.remote_code and not allowed.code_left_out and "own.py" in allowed.fingerprint()


def test_a_record_says_whether_code_runs_again(pocket_copy: Path) -> None:
    """Code that was left out stays out, though it is allowed now; code that ran has to be allowed again."""
    change(pocket_copy / "config.json", auto_map={"AutoModelForCausalLM": "own.Own"})
    (pocket_copy / "own.py").write_text("")
    for allowed in (False, True):
        recorded = fetch(pocket_copy, trust_remote_code=allowed).source
        again = source.refetch(recorded, str(pocket_copy), trust_remote_code=True, progress=Silent())
        assert again.source == recorded
    with pytest.raises(UnsupportedModel, match="was measured with code from its own repo"):
        source.refetch(recorded, str(pocket_copy), trust_remote_code=False, progress=Silent())


def test_pickle_only_models_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"only pickle weights.*convert them to safetensors"):
        source.choose_files(["pytorch_model.bin", "tokenizer.json"], None, "m", remote_code=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": None}, "names no model_type and architectures"),
        ({"quantization_config": {"load_in_4bit": True}}, "is already quantized"),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "is not a causal language model"),
        (
            {"model_type": "own", "architectures": ["OwnLM"], "auto_map": {"AutoModelForCausalLM": "modeling.OwnLM"}},
            "needs code from its own repo.*--trust-remote-code",
        ),
    ],
)
def test_configs_that_are_refused(pocket_copy: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((pocket_copy / "config.json").read_text())
    (pocket_copy / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UnsupportedModel, match=message):
        fetch(pocket_copy)


def test_known_architectures_need_no_remote_code() -> None:
    config = {"model_type": "gpt2", "auto_map": {"AutoModelForCausalLM": "m.M"}}
    assert not source.needs_remote_code(config)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def overwrite_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)


def garble_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "model.safetensors is damaged"),
        (overwrite_header, "model.safetensors is damaged"),
        (remove_tokenizer, "has no tokenizer"),
        (garble_config, "config.json is not JSON"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
    ],
)
def test_damaged_folders_are_refused(pocket_copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(pocket_copy)
    with pytest.raises(SourceError, match=message):
        fetch(pocket_copy)


def test_nan_weights_are_refused(pocket_copy: Path, command: Callable[..., Any], tmp_path: Path) -> None:
    tensors = load_file(pocket_copy / "model.safetensors")
    name = next(name for name in tensors if name.endswith("c_fc.weight"))
    tensors[name][3, 5] = torch.nan
    save_file(tensors, pocket_copy / "model.safetensors", metadata={"format": "pt"})
    outcome = command("run", pocket_copy, "--output", tmp_path / "out", "--device", "cpu")
    assert outcome.code == 1
    assert f"{name} in model.safetensors holds NaN or infinity" in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_local_source_is_described(pocket: Path) -> None:
    found = fetch(pocket).source
    assert (found.repo_id, found.commit, found.architecture, found.dtype) == (None, None, "GPT2LMHeadModel", "F16")
    assert 2_000_000 < found.parameters < 3_500_000
    assert {file.path for file in found.files} >= {"model.safetensors", "tokenizer.json", "README.md", "config.json"}


def test_folders_have_no_revisions(pocket: Path) -> None:
    with pytest.raises(SourceNotFound, match="has no revisions"):
        source.fetch(str(pocket), revision="main", trust_remote_code=False, progress=Silent())


def test_cards_in_another_encoding_are_named_with_their_line(pocket_copy: Path) -> None:
    (pocket_copy / "README.md").write_bytes("one\ntwo\ncaf\xe9".encode("latin-1"))
    with pytest.raises(CorruptModel, match=r"not UTF-8 \(line 3\)"):
        source.card_text(fetch(pocket_copy))


def replaced(folder: Path, name: str, content: bytes) -> None:
    (folder / "new").write_bytes(content)
    (folder / "new").rename(folder / name)


def test_a_source_that_changes_meanwhile_is_named(pocket_copy: Path) -> None:
    """Also in place of the error that came of it; the same bytes under another time stamp are the same source."""
    weights = pocket_copy / "model.safetensors"
    content = weights.read_bytes()
    with source.watched(fetch(pocket_copy)):
        replaced(pocket_copy, weights.name, content)
    with pytest.raises(KeyError), source.watched(fetch(pocket_copy)):
        raise KeyError("a bug")
    with pytest.raises(SourceChanged, match=r"config\.json is gone"), source.watched(fetch(pocket_copy)):
        (pocket_copy / "config.json").rename(pocket_copy / "config.old")
    (pocket_copy / "config.old").rename(pocket_copy / "config.json")
    with (
        pytest.raises(SourceChanged, match=r"model\.safetensors was changed while"),
        source.watched(fetch(pocket_copy)),
    ):
        replaced(pocket_copy, weights.name, content[:-1] + b"x")
        raise CorruptModel("what came of it")


def test_too_little_space_is_seen_beforehand(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"the package needs 1000000\.00 GB and the disk of .* free some space"):
        require_space(tmp_path / "not" / "yet", 10**15, "the package")
