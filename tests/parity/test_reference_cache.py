"""One model at a time: answers kept on disk with little loss, for these windows only, whatever happens to the file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from quantize import files, pipeline
from quantize.errors import CorpusError
from quantize.evidence import Evidence
from quantize.parity.models import Placed
from quantize.parity.reference_cache import Contents, ReferenceCache
from quantize.progress import Silent
from quantize.records import EvaluationSettings
from tests.conftest import POCKET, Outcome

SETTINGS = EvaluationSettings(max_windows=8, new_tokens=2, require="degraded")
CONTENTS = Contents(source="s", corpus="c", window=6, seed=0, vocabulary=11)


class Told:
    """A model that gives the answers that it was given: to a window of zeros the first, of ones the second ..."""

    def __init__(self, answers: torch.Tensor) -> None:
        self.answers = answers

    def __call__(self, tokens: torch.Tensor, use_cache: bool = False) -> Any:
        class Answer:
            logits = self.answers[int(tokens[0, 0])][None]

        return Answer


def kept(path: Path, answers: torch.Tensor, dtype: str = "float32") -> ReferenceCache:
    cache = ReferenceCache(path, CONTENTS, lambda: dtype)
    windows = torch.arange(len(answers))[:, None].expand(-1, 6)
    cache.extend(Placed(Told(answers), dtype, ("cpu",)), windows, "cpu")
    return cache


@given(arrays.arrays(np.float32, (2, 6, 11), elements=st.floats(-60, 60, width=32)))
@settings(max_examples=40, deadline=None)
def test_what_is_kept_is_nearly_what_was_said(tmp_path_factory: pytest.TempPathFactory, answers: np.ndarray) -> None:
    cache = kept(tmp_path_factory.mktemp("cache") / "answers", torch.tensor(answers))
    found = cache.read(0, torch.zeros(2, 6, dtype=torch.long))(slice(0, 5)).double().log_softmax(-1)
    exact = torch.tensor(answers)[:, :-1].double().log_softmax(-1)
    step = (exact.amax(-1) - exact.amin(-1)).max() / 65_535
    assert float((found - exact).abs().max()) <= float(step) + 1e-5
    record = cache.record(2)
    measured = (exact.exp() * (exact - found)).sum(-1)
    assert record.mean_kld == pytest.approx(float(measured.mean()), abs=1e-9)
    assert record.largest_kld == pytest.approx(float(measured.max()), abs=1e-9) and record.largest_kld < 1e-5


def test_a_file_that_was_cut_short_is_continued(tmp_path: Path) -> None:
    answers = torch.randn(5, 6, 11)
    whole = kept(tmp_path / "whole", answers)
    cut = tmp_path / "cut"
    cut.write_bytes((tmp_path / "whole").read_bytes()[:-70])
    assert ReferenceCache(cut, CONTENTS, lambda: "float32").windows == 4
    kept(cut, answers)
    assert cut.read_bytes() == (tmp_path / "whole").read_bytes() and whole.windows == 5


def test_answers_to_something_else_are_refused(tmp_path: Path) -> None:
    kept(tmp_path / "answers", torch.randn(1, 6, 11))
    for change in ({"corpus": "d"}, {"seed": 1}, {"source": "t"}, {"vocabulary": 12}):
        with pytest.raises(CorpusError, match="holds no logits of this original on these windows"):
            ReferenceCache(tmp_path / "answers", dataclasses.replace(CONTENTS, **change), lambda: "float32")
    with pytest.raises(CorpusError, match="holds logits in float32, and the original now fits only in float16"):
        kept(tmp_path / "answers", torch.randn(2, 6, 11), "float16")
    (tmp_path / "other").write_text("a shopping list\n")
    with pytest.raises(CorpusError, match="choose another --reference-cache file"):
        ReferenceCache(tmp_path / "other", CONTENTS, lambda: "float32")
    assert (tmp_path / "other").read_text() == "a shopping list\n"


def test_damage_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    """Every byte of a record counts: codes, scales, errors and the checksum itself."""
    path, tokens = tmp_path / "answers", torch.zeros(2, 6, dtype=torch.long)
    kept(path, torch.randn(2, 6, 11))
    content = path.read_bytes()
    begin = len(content) - (len(content) - content.index(b"\n") - 1) // 2
    for place in range(begin, len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(CorpusError, match="is damaged at window 1"):
            ReferenceCache(path, CONTENTS, lambda: "float32").record(2)
    path.write_bytes(content.replace(b"float32", b"float16", 1))
    with pytest.raises(CorpusError, match="is damaged at window 0"):
        ReferenceCache(path, CONTENTS, lambda: "float32").read(0, tokens)
    size = len(content) - begin
    path.write_bytes(content[: begin - size] + content[begin:] + content[begin - size : begin])
    with pytest.raises(CorpusError, match="is damaged at window 0"):
        ReferenceCache(path, CONTENTS, lambda: "float32").read(0, tokens)


def test_a_cache_of_an_earlier_version_is_made_anew_and_that_is_said(tmp_path: Path) -> None:
    path, notes = tmp_path / "answers", list[str]()
    kept(path, torch.randn(2, 6, 11))
    path.write_bytes(path.read_bytes().replace(b'"version": 2', b'"version": 1', 1))
    with pytest.raises(CorpusError, match="holds no logits of this original"):
        ReferenceCache(path, dataclasses.replace(CONTENTS, source="t"), lambda: "float32", notes.append)
    cache = ReferenceCache(path, CONTENTS, lambda: "float16", notes.append)
    assert (cache.windows, cache.dtype) == (0, "float16")
    assert notes == [f"{path} has the format of an earlier version: its logits are computed anew"]


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    cache = kept(tmp_path / "answers", torch.randn(1, 6, 11))
    with files.locked(cache.path, CorpusError("held")), pytest.raises(CorpusError, match="another run is writing"):
        kept(tmp_path / "answers", torch.randn(2, 6, 11))


@pytest.fixture(scope="module")
def together(finished: Path) -> Evidence:
    """What both models say side by side."""
    return pipeline.verify(pipeline.VerifyRequest(str(finished), str(POCKET), SETTINGS, "cpu"), Silent())


@pytest.mark.slow
def test_one_at_a_time_says_what_side_by_side_says(
    finished: Path, together: Evidence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference and the candidate are never in memory together, and a second candidate needs no reference."""
    cache = tmp_path / "answers"
    first = pipeline.verify(
        pipeline.VerifyRequest(str(finished), str(POCKET), SETTINGS, "cpu", reference_cache=cache), Silent()
    )
    _expect_same(first, together)
    assert first.reference_cache is not None and first.reference_cache.mean_kld < 1e-7
    monkeypatch.setattr(ReferenceCache, "extend", lambda *_: pytest.fail("the answers are all there"))
    again = pipeline.verify(
        pipeline.VerifyRequest(str(finished), str(POCKET), SETTINGS, "cpu", reference_cache=cache), Silent()
    )
    assert again.scores == first.scores


@pytest.mark.slow
def test_what_does_not_fit_is_spread_and_said(
    finished: Path, together: Evidence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With little memory the reference is halved and lies partly on disk; the candidate has to fit."""
    monkeypatch.setattr("quantize.devices.usable_memory", lambda device: 3_000_000)
    spread = pipeline.verify(pipeline.VerifyRequest(str(finished), str(POCKET), SETTINGS, "cpu"), Silent())
    assert together.reference_devices == ("cpu",) and spread.reference_devices == ("cpu", "disk")
    assert (together.reference_dtype, spread.reference_dtype) == ("float32", "float16")
    assert spread.weight_errors == pytest.approx(together.weight_errors, rel=1e-5)
    assert spread.sizes == together.sizes
    _expect_same(spread, together)


def test_a_candidate_that_does_not_fit_is_one_line(
    finished: Path, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantize.devices.usable_memory", lambda device: 1_000_000)
    outcome = command("verify", finished, "--against", POCKET, "--device", "cpu", "--quiet")
    assert outcome.code == 1 and "needs 0.00 GB on cpu" in outcome.err and outcome.err.count("\n") == 1


def _expect_same(found: Evidence, expected: Evidence) -> None:
    assert found.scores is not None and expected.scores is not None
    assert found.scores.kld.mean.value == pytest.approx(expected.scores.kld.mean.value, rel=1e-3)
    ratio = expected.scores.perplexity_ratio
    assert found.scores.perplexity_ratio.value == pytest.approx(ratio.value, abs=1e-4)
    assert [check.name for check in found.checks if check.passed] == [check.name for check in expected.checks]
    assert found.generation is not None and expected.generation is not None
    assert found.generation.samples[0].candidate_sampled == expected.generation.samples[0].candidate_sampled
    assert found.verdict == expected.verdict
