"""The texts that are measured on: pinned by hash, cut into whole windows, never taken for one another."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from quantize.errors import CorpusError
from quantize.parity import corpus
from quantize.parity.windows import draw
from tests.conftest import POCKET
from tests.hub import LoopbackHub


def test_the_builtin_corpus_holds_each_paragraph_once() -> None:
    text = corpus.builtin_text()
    paragraphs = text.strip().split("\n\n")
    assert len(paragraphs) == len(set(paragraphs)) and len(text) > 100_000
    assert corpus.builtin_text() == text


def test_wikitext_comes_from_the_hub_at_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, buffer = ["", " = Robert = \n", " Robert is an actor . \n"], io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), buffer)
    with LoopbackHub() as hub:
        hub.create_repo(corpus.WIKITEXT_REPO, repo_type="dataset")
        files = {corpus.WIKITEXT_FILE: buffer.getvalue()}
        commit = hub.commit(corpus.WIKITEXT_REPO, files, message="data", repo_type="dataset")
        monkeypatch.setattr(os, "environ", {**os.environ, **hub.env(home=tmp_path)})
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        wikitext = corpus.load("wikitext-2")
    assert wikitext.name == f"Salesforce/wikitext@{commit} wikitext-2-raw-v1 test"
    assert wikitext.text == "\n\n = Robert = \n\n\n Robert is an actor . \n"


def test_bad_corpora_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(CorpusError, match=r"latin.txt is not UTF-8 text \(byte 3\)"):
        corpus.load(str(tmp_path / "latin.txt"))
    with pytest.raises(CorpusError, match=r"has 3 tokens, which makes 0 windows of 64"):
        draw(corpus.load(str(tmp_path / "short.txt")), AutoTokenizer.from_pretrained(POCKET), 64, 9, 0)
