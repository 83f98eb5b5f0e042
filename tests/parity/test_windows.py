"""Windows: whole, seeded, each different, and behind whatever the tokenizer puts before a text."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from quantize.errors import CorpusError
from quantize.parity import standard_perplexity
from quantize.parity.corpus import Corpus, builtin_text, load
from quantize.parity.scoring import LiveReference, score
from quantize.parity.windows import Encoder, draw
from tests.conftest import POCKET

NUMBERED = "".join(f"The value of item {number} is {number * 7}.\n" for number in range(150))
POCKET_TOKENIZER = (POCKET / "tokenizer.json").read_text("utf-8")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(POCKET)


def with_prefix(tokens: tuple[int, ...], behind: tuple[int, ...] = ()) -> Any:
    """The pocket model's tokenizer, which now puts these tokens before every text, and others behind it."""
    fast = Tokenizer.from_str(POCKET_TOKENIZER)
    names = {token: f"T{token}" for token in (*tokens, *behind)}
    template = " ".join([*(names[token] for token in tokens), "$A", *(names[token] for token in behind)])
    pair = f"{template} $B:1"
    special = [(name, token) for token, name in names.items()]
    fast.post_processor = processors.TemplateProcessing(single=template, pair=pair, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=fast)


class Stubborn:
    """A tokenizer that puts its first token before a text whether it is asked to or not."""

    all_special_ids, unk_token_id = (1, 9), 9

    def __call__(self, text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=[1, *text.encode()])


def test_windows_are_whole_seeded_and_counted(tokenizer: Any) -> None:
    text = Corpus("text.txt", NUMBERED)
    windows, record = draw(text, tokenizer, 64, 20, seed=1)
    again, _ = draw(text, tokenizer, 64, 20, seed=1)
    other, _ = draw(text, tokenizer, 64, 20, seed=2)
    assert windows.shape == (20, 64) and (windows == again).all() and not (windows == other).all()
    assert (record.name, record.scored, record.windows) == ("text.txt", 20, record.tokens // 64)
    assert (record.repeated, record.prefix, record.scored_tokens) == (0, 0, 20 * 63)


def test_the_builtin_corpus_repeats_nothing(tokenizer: Any) -> None:
    _, record = draw(load("builtin"), tokenizer, 256, 512, seed=0)
    assert record.repeated == 0 and record.scored == record.windows > 100


@given(st.integers(30, 400), st.integers(0, 3))
@settings(max_examples=8, deadline=None)
def test_a_text_that_repeats_itself_counts_once_at_whatever_period(period: int, seed: int) -> None:
    tokenizer = with_prefix(())
    ids = tokenizer(builtin_text()[:8000]).input_ids[:period]
    corpus = Corpus("repeated", tokenizer.decode(ids * 60))
    windows_in_period = period // 48 + 1
    try:
        _, record = draw(corpus, tokenizer, 48, 512, seed)
    except CorpusError as error:
        assert "repeat others: at least 8 that differ are needed" in str(error)
    else:
        assert record.scored <= 2 * windows_in_period + 2 and record.repeated == record.windows - record.scored


def test_a_corpus_of_one_window_is_refused(tokenizer: Any) -> None:
    ids = tokenizer(builtin_text()[:2000]).input_ids[:48]
    with pytest.raises(CorpusError, match=r"makes 12 windows of 48, of which 11 repeat others: at least 8"):
        draw(Corpus("repeated", tokenizer.decode(ids * 12)), tokenizer, 48, 512, 0)


@given(st.lists(st.integers(0, 50), max_size=4).map(tuple), st.lists(st.integers(0, 50), max_size=2).map(tuple))
@settings(max_examples=8, deadline=None)
def test_the_whole_prefix_stands_before_each_window(before: tuple[int, ...], behind: tuple[int, ...]) -> None:
    tokenizer = with_prefix(before, behind)
    encoder = Encoder.of(tokenizer)
    assert encoder.prefix == before
    bare = with_prefix(())(NUMBERED).input_ids
    assert encoder.ids(NUMBERED) == bare
    windows, record = draw(Corpus("text", NUMBERED), tokenizer, 64, 20, seed=1)
    assert windows.shape == (20, 64) and windows[:, : len(before)].tolist() == [list(before)] * 20
    texts = {tuple(bare[at : at + 64 - len(before)]) for at in range(0, len(bare), 64 - len(before))}
    assert {tuple(row) for row in windows[:, len(before) :].tolist()} <= texts
    assert record.prefix == len(before)


def test_a_prefix_that_cannot_be_left_out_is_one() -> None:
    encoder = Encoder.of(Stubborn())
    assert encoder.prefix == (1,) and encoder.ids("ab") == [97, 98]


def test_a_window_that_the_prefix_fills_is_refused() -> None:
    with pytest.raises(CorpusError, match="leaves no room behind the 4 that the tokenizer puts before a text"):
        draw(Corpus("text", NUMBERED), with_prefix((1, 2, 3, 4)), 5, 20, 0)


def test_the_prefix_is_shown_and_not_scored() -> None:
    """Each text token is scored once, with the prefix before it: the same as scoring it token by token."""
    model = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32).eval()
    windows, record = draw(Corpus("text", NUMBERED), with_prefix((5, 6)), 32, 8, seed=0)
    scores = score(LiveReference.of(model, windows, "cpu"), model, windows, "cpu", lambda amount: None).without_prefix(
        record.prefix
    )
    assert scores.kld.shape == (8, 30) and scores.kld.size == record.scored_tokens
    with torch.inference_mode():
        logits = model(windows).logits.double().log_softmax(-1)
    exact = -logits[:, 1:-1].gather(-1, windows[:, 2:, None])[..., 0]
    assert torch.allclose(torch.tensor(scores.nll_reference), exact, atol=1e-4)
    assert score(LiveReference.of(model, windows, "cpu"), model, windows, "cpu", lambda amount: None).without_prefix(
        0
    ).kld.shape == (
        8,
        31,
    )


@pytest.mark.parametrize("prefix", [(), (5,), (5, 6, 7)])
def test_standard_perplexities_score_every_token_once_behind_the_prefix(prefix: tuple[int, ...]) -> None:
    tokenizer = with_prefix(prefix)
    corpus = Corpus("text", NUMBERED)
    ids = Encoder.of(tokenizer).ids(NUMBERED)
    for reading in standard_perplexity.readings(corpus, tokenizer, 64):
        scored = [token for segment in reading.segments for token in segment.tokens[-segment.scored :]]
        assert scored == (ids if prefix else ids[1:])
        assert all(tuple(segment.tokens[: len(prefix)]) == prefix for segment in reading.segments)
        assert all(len(segment.tokens) - 1 <= 64 for segment in reading.segments)
        assert ("leading tokens" in reading.method) == bool(prefix)
