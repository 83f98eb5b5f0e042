"""The gate: every limit from both sides, and the worse end of the interval decides."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from quantize.evidence import Check, Estimate, Evidence, Scores
from quantize.grades import LIMITS, grade_of
from quantize.parity.verdict import gate
from quantize.serialization import read_record


@pytest.mark.parametrize(("grade", "limits"), LIMITS.items())
def test_limits_belong_to_their_grade(grade: str, limits: tuple[float, float]) -> None:
    ratio, kld = limits
    assert grade_of(1.0, ratio, kld) == grade
    assert grade_of(1.0, ratio + 1e-9, 0.0) != grade
    assert grade_of(1.0, 1.0, kld + 1e-9) != grade


def test_beyond_all_limits_is_failed() -> None:
    assert grade_of(1.0, 1.051, 0.0) == "failed"
    assert grade_of(1.0, 1.0, 0.101) == "failed"


def test_implausibly_better_is_another_model() -> None:
    assert grade_of(0.969, 0.98, 0.001) == "changed"
    assert grade_of(0.971, 1.0, 0.001) == "lossless"


@pytest.fixture
def scores(finished: Path) -> Scores:
    measured = read_record(Evidence, finished / "parity.json").scores
    assert measured is not None
    return dataclasses.replace(
        measured,
        perplexity_ratio=Estimate(1.005, 1.0, 1.009),
        kld=dataclasses.replace(measured.kld, mean=Estimate(0.01, 0.009, 0.019)),
    )


def test_point_estimates_do_not_decide(scores: Scores) -> None:
    assert gate([], scores, "good").grade == "parity"
    wide = dataclasses.replace(scores, perplexity_ratio=Estimate(1.005, 0.98, 1.04))
    verdict = gate([], wide, "good")
    assert (verdict.grade, verdict.passed) == ("degraded", False)
    assert verdict.reasons == ("perplexity ratio up to 1.0400, good allows 1.03",)


def test_a_changed_model_never_passes(scores: Scores) -> None:
    better = dataclasses.replace(scores, perplexity_ratio=Estimate(0.92, 0.91, 0.93))
    verdict = gate([], better, "degraded")
    assert (verdict.grade, verdict.passed) == ("changed", False)
    assert "another model" in verdict.reasons[0]


def test_one_failed_check_fails_everything(scores: Scores) -> None:
    verdict = gate([Check("ties", False, "untied")], scores, "good")
    assert (verdict.grade, verdict.passed, verdict.reasons) == ("failed", False, ("ties: untied",))
    assert not gate([Check("loads", False, "no")], None, "degraded").passed
