"""Code from a model's own repo: not run unless allowed, then used for model and tokenizer, carried and recorded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from quantize import pipeline
from quantize.errors import UnsupportedModel
from quantize.files import CONFIG
from quantize.progress import Silent
from quantize.records import EvaluationSettings
from tests.formats.test_config import RTN, llama, read

TOKENIZER = """
from transformers import PreTrainedTokenizerFast


class OwnTokenizer(PreTrainedTokenizerFast):
    vocab_files_names = {"words": "words.own"}

    def __init__(self, words=None, **options):
        options.pop("tokenizer_file", None)
        super().__init__(tokenizer_file=words, **options)
"""
MODEL = """
from transformers import LlamaForCausalLM


class OwnForCausalLM(LlamaForCausalLM):
    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits = output.logits * 2
        return output
"""
BROKEN = "from transformers import NothingOfThatName\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama whose tokenizer is code, with a vocabulary under a name that only this code knows."""
    made = llama(tmp_path / "source")
    (made / "tokenizer.json").rename(made / "words.own")
    settings = {**read(made / "tokenizer_config.json"), "tokenizer_class": "OwnTokenizer"}
    settings["auto_map"] = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    (made / "tokenizer_config.json").write_text(json.dumps(settings))
    (made / "own.py").write_text(TOKENIZER)
    return made


def request(folder: Path, output: Path) -> pipeline.RunRequest:
    settings = EvaluationSettings(max_windows=16, window=64, new_tokens=2, require="degraded")
    return pipeline.RunRequest(
        str(folder), output=output, recipe=RTN, settings=settings, device="cpu", trust_remote_code=True
    )


@pytest.mark.slow
def test_a_tokenizer_that_is_code_is_used_carried_and_recorded(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    with pytest.raises(UnsupportedModel, match="--trust-remote-code"):
        pipeline.run(dataclasses.replace(request(folder, tmp_path / "out"), trust_remote_code=False), Silent())
    made = pipeline.run(request(folder, tmp_path / "out"), Silent()).package
    recorded = {file.path: file.sha256 for file in made.provenance.files}
    for name in ("own.py", "words.own"):
        assert recorded[name] == made.provenance.source.fingerprint()[name]
    assert made.provenance.source.remote_code and made.evidence.scores is not None
    assert "trust_remote_code=True" in (made.folder / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(made.folder, trust_remote_code=True)
    assert type(tokenizer).__name__ == "OwnTokenizer" and len(tokenizer) == 4096


def test_allowed_code_runs_though_transformers_knows_the_type(tmp_path: Path) -> None:
    """As in transformers itself: who trusts code measures what the code computes, and ships it."""
    folder = llama(tmp_path / "source", auto_map={"AutoModelForCausalLM": "own.OwnForCausalLM"})
    (folder / "own.py").write_text(MODEL)
    asked = dataclasses.replace(request(folder, tmp_path / "out"), unverified=True)
    made = pipeline.run(asked, Silent()).package
    assert made.provenance.source.remote_code
    assert read(made.folder / CONFIG)["auto_map"] == {"AutoModelForCausalLM": "own.OwnForCausalLM"}
    assert (made.folder / "own.py").read_text() == MODEL
    assert read(made.folder / CONFIG)["architectures"] == ["OwnForCausalLM"]


def test_code_that_does_not_run_here_is_one_line(tmp_path: Path) -> None:
    folder = llama(tmp_path / "source", auto_map={"AutoModelForCausalLM": "own.OwnForCausalLM"})
    (folder / "own.py").write_text(BROKEN)
    asked = dataclasses.replace(request(folder, tmp_path / "out"), unverified=True)
    with pytest.raises(UnsupportedModel, match=r"transformers cannot build source .*NothingOfThatName"):
        pipeline.run(asked, Silent())
