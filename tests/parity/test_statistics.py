"""Scores and statistics against plain float64 arithmetic, and intervals that cover what they should."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from quantize.parity import comparison
from quantize.parity.scoring import SLICE_LOGITS, KeptLogits, LiveReference, TokenScores, compare_logits, nll, score
from quantize.parity.statistics import mean_estimates, summarize
from quantize.progress import Silent
from quantize.records import EvaluationSettings

logits = arrays.arrays(np.float32, (2, 5, 11), elements=st.floats(-20, 20, width=32))


def reference_scores(p_logits: np.ndarray, q_logits: np.ndarray, targets: np.ndarray) -> list[np.ndarray]:
    """The protocol's definitions, token by token in float64."""

    def log_softmax(values: np.ndarray) -> np.ndarray:
        shifted = values.astype(np.float64) - values.max()
        return np.asarray(shifted - np.log(np.exp(shifted).sum()))

    rows: list[list[float]] = []
    for index in np.ndindex(targets.shape):
        log_p, log_q, right = log_softmax(p_logits[index]), log_softmax(q_logits[index]), targets[index]
        kld = sum(np.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))
        rows.append([-log_p[right], -log_q[right], kld, np.exp(log_q[right]) - np.exp(log_p[right])])
    return [np.array(column).reshape(targets.shape) for column in zip(*rows, strict=True)]


@given(logits, logits, arrays.arrays(np.int64, (2, 5), elements=st.integers(0, 10)))
@settings(max_examples=60, deadline=None)
def test_token_scores_equal_plain_arithmetic(p: np.ndarray, q: np.ndarray, targets: np.ndarray) -> None:
    found = compare_logits(torch.tensor(p), torch.tensor(q), torch.tensor(targets))
    nll_p, nll_q, kld, delta = reference_scores(p, q, targets)
    for ours, plain in zip((found[0], found[1], found[2], found[4]), (nll_p, nll_q, kld, delta), strict=True):
        np.testing.assert_allclose(ours.numpy(), plain, rtol=1e-6, atol=1e-12)


@given(
    arrays.arrays(np.float32, (3, 4, 11), elements=st.floats(-20, 20, width=32)),
    st.floats(1e-3, 3.0),
    st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_statistics_equal_a_plain_reference(p: np.ndarray, distance: float, seed: int) -> None:
    """From logits to every published figure, within 1e-6 of plain float64 arithmetic."""
    random = np.random.default_rng(seed)
    q = (p + distance * random.standard_normal(p.shape)).astype(np.float32)
    targets = random.integers(0, 11, p.shape[:2])
    tokens = compare_logits(torch.tensor(p), torch.tensor(q), torch.tensor(targets))
    scores = summarize(TokenScores(*(column.numpy() for column in tokens)), seed=0)
    nll_p, nll_q, kld, delta = reference_scores(p, q, targets)
    assert scores.reference_perplexity.value == pytest.approx(np.exp(nll_p.mean()), rel=1e-6, abs=1e-12)
    assert scores.candidate_perplexity.value == pytest.approx(np.exp(nll_q.mean()), rel=1e-6, abs=1e-12)
    assert scores.perplexity_ratio.value == pytest.approx(np.exp((nll_q - nll_p).mean()), rel=1e-6, abs=1e-12)
    assert scores.kld.mean.value == pytest.approx(kld.mean(), rel=1e-6, abs=1e-12)
    assert scores.kld.maximum == pytest.approx(kld.max(), rel=1e-6, abs=1e-12)
    for name, level in (("p50", 50), ("p90", 90), ("p95", 95), ("p99", 99), ("p99.9", 99.9)):
        assert scores.kld.percentiles[name] == pytest.approx(np.percentile(kld, level), rel=1e-6, abs=1e-12)
    assert scores.same_top.value == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert scores.delta_p.mean.value == pytest.approx(delta.mean(), rel=1e-6, abs=1e-12)
    assert scores.delta_p_rms.value == pytest.approx(np.sqrt((delta**2).mean()), rel=1e-6, abs=1e-12)


def test_same_top_counts_equal_first_choices() -> None:
    p, q = torch.tensor([[[0.0, 1.0, 2.0], [3.0, 1.0, 0.0]]]), torch.tensor([[[0.0, 5.0, 2.0], [1.0, 0.0, 0.5]]])
    assert compare_logits(p, q, torch.zeros(1, 2, dtype=torch.long))[3].tolist() == [[False, True]]


def test_padded_vocabularies_are_compared_where_both_exist() -> None:
    p = torch.randn(1, 3, 8)
    q = torch.cat([p, torch.full((1, 3, 4), 50.0)], dim=-1)
    _, _, kld, same, _ = compare_logits(p, q, torch.zeros(1, 3, dtype=torch.long))
    assert float(kld.abs().max()) < 1e-12 and bool(same.all())


class Fixed(torch.nn.Module):
    """A model that answers with logits that depend on the token alone."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(vocabulary, vocabulary)
        torch.nn.init.normal_(self.table.weight, generator=torch.Generator().manual_seed(seed))

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.table

    def forward(self, tokens: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        class Answer:
            logits = self.table(tokens)

        return Answer()  # type: ignore[return-value]


def test_slices_and_batches_do_not_change_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = LiveReference.of(Fixed(31, 1), torch.zeros(1, 20, dtype=torch.long), "cpu"), Fixed(31, 2)
    windows = torch.randint(0, 31, (7, 20), generator=torch.Generator().manual_seed(0))
    whole = score(one, other, windows, "cpu", lambda amount: None)
    monkeypatch.setattr("quantize.parity.scoring.SLICE_LOGITS", {"cpu": 31 * 3})
    monkeypatch.setattr("quantize.parity.scoring.BATCH_LOGITS", {"cpu": 31 * 20 * 2})
    sliced = score(one, other, windows, "cpu", lambda amount: None)
    assert whole.kld.shape == (7, 19) and SLICE_LOGITS["cpu"] > 31 * 20 * 7
    for name in TokenScores.__dataclass_fields__:
        np.testing.assert_allclose(getattr(whole, name), getattr(sliced, name), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_memory_is_bounded_whatever_the_corpus() -> None:
    """GPT-2's vocabulary and window: under 1 GB beyond the models, and no more for three times the windows."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50257, n_embd=32, n_layer=1, n_head=2, n_positions=1024)
    model = GPT2LMHeadModel(config).eval()
    windows = torch.randint(0, 50257, (3, 1024), generator=torch.Generator().manual_seed(0))
    score(LiveReference.of(model, windows, "cpu"), model, windows[:1], "cpu", lambda amount: None)
    few = most_bytes(
        lambda: score(LiveReference.of(model, windows, "cpu"), model, windows[:1], "cpu", lambda amount: None)
    )
    many = most_bytes(
        lambda: score(LiveReference.of(model, windows, "cpu"), model, windows, "cpu", lambda amount: None)
    )
    assert few < 1e9 and many < few + 100e6, (few, many)


def most_bytes(work: Callable[[], object]) -> int:
    """The most resident memory while `work` runs, beyond what there was before."""
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    seen = [before]

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(seen) - before


def test_kept_answers_score_like_the_model_that_gave_them() -> None:
    one, other = Fixed(31, 1), Fixed(31, 2)
    windows = torch.randint(0, 31, (4, 20), generator=torch.Generator().manual_seed(0))
    live = score(LiveReference.of(one, windows, "cpu"), other, windows, "cpu", lambda amount: None)
    kept = score(KeptLogits.of(one, windows, "cpu"), other, windows, "cpu", lambda amount: None)
    np.testing.assert_array_equal(live.kld, kept.kld)
    logits = one(windows).logits[:, :-1]
    np.testing.assert_allclose(nll(logits, windows[:, 1:]).detach().numpy(), live.nll_reference, rtol=1e-12)


def test_models_that_stay_in_memory_are_tried_once() -> None:
    pair: Any = SimpleNamespace(reference=Fixed(31, 1), candidate=Fixed(31, 2), device="cpu")
    windows = torch.zeros(1, 20, dtype=torch.long)
    compared = comparison._Comparison(pair, EvaluationSettings(), Silent(), None)
    assert compared.reference_logits(windows) is compared.reference_logits(windows)
    assert compared.candidate_logits(windows) is compared.candidate_logits(windows)
    assert compared.candidate_logits(windows) is not compared.reference_logits(windows)


def test_a_model_against_itself_is_lossless() -> None:
    model = Fixed(31, 1)
    windows = torch.randint(0, 31, (9, 20), generator=torch.Generator().manual_seed(0))
    scores = summarize(
        score(LiveReference.of(model, windows, "cpu"), model, windows, "cpu", lambda amount: None), seed=0
    )
    assert scores.perplexity_ratio.low == scores.perplexity_ratio.high == 1.0
    assert scores.kld.mean.value == 0.0 and scores.same_top.value == 1.0


def test_summary_equals_plain_arithmetic() -> None:
    random = np.random.default_rng(3)
    right = random.gamma(2.0, 1.5, (12, 40))
    shift = random.normal(0.02, 0.1, (12, 40))
    kld = random.gamma(0.5, 0.05, (12, 40))
    top = random.random((12, 40)) < 0.9
    scores = summarize(TokenScores(right, right + shift, kld, top, shift * 0.1), seed=0)
    assert scores.reference_perplexity.value == pytest.approx(np.exp(right.mean()), rel=1e-9)
    assert scores.perplexity_ratio.value == pytest.approx(np.exp(shift.mean()), rel=1e-9)
    assert scores.kld.mean.value == pytest.approx(kld.mean(), rel=1e-9)
    assert scores.kld.percentiles["p99"] == pytest.approx(np.percentile(kld, 99))
    assert scores.same_top.value == pytest.approx(top.mean())
    assert sum(scores.kld_histogram.counts) == kld.size
    assert len(scores.kld_by_position) == 16
    assert scores.perplexity_ratio.low < scores.perplexity_ratio.value < scores.perplexity_ratio.high


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    covered = 0
    for trial in range(200):
        random = np.random.default_rng(trial)
        windows = 0.05 + 0.02 * random.standard_normal((40, 1)) + 0.1 * random.standard_normal((40, 30))
        (estimate,) = mean_estimates([windows], seed=trial)
        covered += estimate.low <= 0.05 <= estimate.high
    assert 0.89 <= covered / 200 <= 0.99


def test_correlated_tokens_widen_the_interval() -> None:
    random = np.random.default_rng(0)
    shared = np.repeat(random.standard_normal((50, 1)), 30, axis=1)
    independent = random.standard_normal((50, 30))
    wide, narrow = mean_estimates([shared, independent], 0)
    assert (wide.high - wide.low) > 3 * (narrow.high - narrow.low)


def test_nan_is_no_number() -> None:
    table = np.zeros((2, 3))
    scores = TokenScores(table, table, table, table.astype(bool), table)
    assert scores.finite
    assert not TokenScores(table, table * np.nan, table, table.astype(bool), table).finite
