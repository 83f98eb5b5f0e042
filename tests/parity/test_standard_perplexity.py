"""Published perplexities against other implementations: the guide's loop written plainly, and the harness itself."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantize import pipeline
from quantize.parity import standard_perplexity
from quantize.parity.corpus import Corpus, builtin_text, detokenized, pages_of
from quantize.progress import Silent
from quantize.records import EvaluationSettings
from tests.conftest import POCKET

DATA = Path(__file__).parents[1] / "data"
TEXT = (DATA / "wikitext-like.txt").read_text("utf-8")


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(POCKET)


@pytest.mark.parametrize(("context", "stride"), [(256, 128), (256, 256), (100, 33)])
def test_sliding_window_is_the_guides_loop(model: Any, tokenizer: Any, context: int, stride: int) -> None:
    ids = tokenizer(TEXT, return_tensors="pt", verbose=False).input_ids
    total, counted, scored_until = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + context, ids.shape[1])
        new = end - scored_until
        labels = ids[:, begin:end].clone()
        labels[:, :-new] = -100
        with torch.inference_mode():
            loss = float(model(ids[:, begin:end], labels=labels).loss)
        own = int((labels != -100).sum())
        total, counted, scored_until = total + loss * (own - 1), counted + own - 1, end
        if end == ids.shape[1]:
            break
    reading = standard_perplexity.sliding_window(Corpus("text", TEXT), tokenizer, context, stride)
    assert standard_perplexity.figures(model, [reading], "cpu") == [pytest.approx(math.exp(total / counted), rel=1e-5)]


def test_the_harness_says_the_same(model: Any, tokenizer: Any) -> None:
    """Its own figures, recorded by scripts/record_harness.py; it sums in float32."""
    record = json.loads((DATA / "harness.json").read_text())
    corpus = Corpus("text", TEXT, tuple(pages_of(TEXT)))
    found = standard_perplexity.figures(model, [standard_perplexity.harness(corpus, tokenizer, 256)], "cpu")
    names = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    assert dict(zip(names, found, strict=True)) == pytest.approx({name: record[name] for name in names}, rel=1e-5)


def test_every_token_is_scored_once(tokenizer: Any) -> None:
    corpus = Corpus("text", TEXT)
    ids = tokenizer(TEXT, verbose=False).input_ids
    for reading, first in zip(standard_perplexity.readings(corpus, tokenizer, 256), (ids[1:], ids), strict=True):
        scored = [token for segment in reading.segments for token in segment.tokens[-segment.scored :]]
        assert scored == first
        assert all(len(segment.tokens) - 1 <= 256 for segment in reading.segments)


def test_wikitext_is_cut_into_pages_and_spelled_out() -> None:
    pages = pages_of(TEXT)
    assert [page.splitlines()[0] for page in pages] == [" = The Brook Bridge = ", " = Counting Rain = "]
    text = detokenized(pages[0])
    assert "41.5 metres long" in text and "1,200 pounds" in text and "road-way" in text and "==Building==" not in text
    assert '"We have lost two horses and a boy in the water"' in text and "(a hand with six fingers)" in text


@pytest.mark.slow
def test_both_models_are_stated_on_request(finished: Path, tmp_path: Path) -> None:
    """On a part of the built-in text, since these figures read every token that there is."""
    corpus = tmp_path / "part.txt"
    corpus.write_text(builtin_text()[:8_000], "utf-8")
    settings = EvaluationSettings(str(corpus), max_windows=8, window=64, new_tokens=2, require="degraded")
    settings = dataclasses.replace(settings, standard_perplexities=True)
    evidence = pipeline.verify(pipeline.VerifyRequest(str(finished), str(POCKET), settings, "cpu"), Silent())
    stated = {figure.name: figure for figure in evidence.standard_perplexities}
    assert list(stated) == ["sliding window perplexity", "word perplexity", "byte perplexity", "bits per byte"]
    for figure in stated.values():
        assert figure.candidate is not None and figure.reference is not None
        assert 1.0 < figure.candidate / figure.reference < 1.05
    assert stated["sliding window perplexity"].method == "sliding window of 256 tokens, stride 128"
