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


def test_windows_are_whole_seeded_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"The value of item {number} is {number * 7}.\n" for number in range(400)))
    text, tokenizer = corpus.load(str(path)), AutoTokenizer.from_pretrained(POCKET)
    windows, record = corpus.windows_of(text, tokenizer, 64, 20, seed=1)
    again, _ = corpus.windows_of(text, tokenizer, 64, 20, seed=1)
    other, _ = corpus.windows_of(text, tokenizer, 64, 20, seed=2)
    assert windows.shape == (20, 64) and (windows == again).all() and not (windows == other).all()
    assert (record.name, record.scored, record.windows) == ("text.txt", 20, record.tokens // 64)


def test_bad_corpora_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(CorpusError, match=r"latin.txt is not UTF-8 text \(byte 3\)"):
        corpus.load(str(tmp_path / "latin.txt"))
    with pytest.raises(CorpusError, match=r"has 3 tokens, which makes 0 windows of 64"):
        corpus.windows_of(corpus.load(str(tmp_path / "short.txt")), AutoTokenizer.from_pretrained(POCKET), 64, 9, 0)
