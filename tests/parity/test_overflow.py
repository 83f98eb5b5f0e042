"""What is no number is said so, and never taken for a figure: nothing that was measured can make writing fail."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import model_card
from quantize import methods, pipeline, source
from quantize.cli import console
from quantize.errors import CorruptModel
from quantize.evidence import Evidence, StandardPerplexity
from quantize.package import card, open_package
from quantize.parity import comparison, figures
from quantize.parity.corpus import Corpus
from quantize.parity.measure import _finite
from quantize.parity.scoring import TokenScores
from quantize.parity.standard_perplexity import harness
from quantize.parity.verdict import judged
from quantize.progress import Silent
from quantize.serialization import from_json, read_record, to_json
from tests.conftest import POCKET
from tests.parity.test_windows import with_prefix


@pytest.fixture
def evidence(finished: Path) -> Evidence:
    return read_record(Evidence, finished / "parity.json")


def test_a_control_without_figures_is_a_row_that_says_why(finished: Path, evidence: Evidence) -> None:
    table = np.ones((8, 7))
    tokens = TokenScores(table, table, table * math.nan, table > 0, table)
    control = comparison._control("original in float16", finished, tokens, 0)
    assert control.kld is None and control.grade == "failed" and "overflow" in control.problem
    whole = comparison._control("original in float16", finished, TokenScores(table, table, table, table > 0, table), 0)
    assert whole.kld is not None and whole.problem == ""
    told = dataclasses.replace(evidence, controls=(control, whole))
    assert from_json(Evidence, to_json(told), "parity.json") == told
    assert "overflow and are no numbers" in terminal(told) and "| | | its outputs overflow" in text_of(finished, told)


def test_a_control_that_cannot_be_made_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = source.fetch(str(POCKET), revision=None, trust_remote_code=False, progress=Silent())

    def refusing(job: methods.Job) -> None:
        if job.recipe.bits == 8:
            raise CorruptModel("float16 ends at 65504")

    monkeypatch.setattr(methods, "quantize", refusing)
    with pipeline._controls(checkout, pipeline.CONTROLS, "cpu", Silent()) as controls:
        assert controls["int8"] == "could not be made: float16 ends at 65504"
        assert isinstance(controls[pipeline.RTN_NF4], Path)


def test_a_standard_perplexity_beyond_all_numbers_is_said_so(finished: Path, evidence: Evidence) -> None:
    corpus = Corpus("no spaces", "word" * 400)
    reading = harness(corpus, with_prefix(()), 64)
    assert reading.figures([9000.0])[0] == math.inf and math.isfinite(reading.figures([9000.0])[2])
    told = dataclasses.replace(
        evidence, standard_perplexities=(StandardPerplexity("word perplexity", "of a text", None, 3.0),)
    )
    assert "no number" in terminal(told) and "| word perplexity | no number | 3.0000 |" in text_of(finished, told)


def test_parts_that_hold_no_number_are_left_out_and_fail(evidence: Evidence) -> None:
    assert _finite(evidence) == evidence
    assert evidence.generation is not None and evidence.scores is not None
    sample = dataclasses.replace(evidence.generation.samples[1], candidate_sampled_nll=math.inf)
    samples = (evidence.generation.samples[0], sample)
    scores = dataclasses.replace(evidence.scores, kld_by_position=(0.1, math.nan))
    bad = dataclasses.replace(
        evidence,
        generation=dataclasses.replace(evidence.generation, samples=samples),
        scores=scores,
        weight_errors={"a": math.inf, "b": 0.1},
    )
    told = judged(_finite(bad), "degraded")
    assert told.generation is None and told.scores is None and told.weight_errors == {"b": 0.1}
    assert not told.verdict.passed and told.verdict.grade == "failed"
    assert told.verdict.reasons == (
        "scores: scores.kld_by_position[1] is no finite number",
        "generation: generation.samples[1].candidate_sampled_nll is no finite number",
    )
    to_json(told)


@pytest.mark.slow
def test_figures_of_a_model_without_any_difference_are_drawn(evidence: Evidence, tmp_path: Path) -> None:
    assert evidence.scores is not None
    scores = dataclasses.replace(evidence.scores, kld_by_position=(0.0, 0.0))
    same = dataclasses.replace(evidence, scores=scores, weight_errors={"a.b": 0.0})
    assert len(figures.draw(same, tmp_path)) == 4
    assert len(figures.draw(dataclasses.replace(same, weight_errors={}), tmp_path)) == 3


def test_judging_again_from_the_record_says_the_same(evidence: Evidence) -> None:
    assert judged(evidence, evidence.verdict.required) == evidence
    strict = judged(evidence, "lossless")
    assert strict.verdict.required == "lossless" and not strict.verdict.passed
    assert evidence.scores is not None and evidence.look_plan is not None
    assert len(evidence.scores.window_figures.kld) == evidence.looks[-1].windows == 16


def test_a_refusal_for_one_grade_is_no_pass_for_another(evidence: Evidence) -> None:
    """16 windows are enough to miss a strict grade, and too few to reach a loose one before the end."""
    assert evidence.look_plan is not None
    plan = dataclasses.replace(evidence.look_plan, windows=204, required="lossless")
    strict = judged(dataclasses.replace(evidence, look_plan=plan), "lossless")
    assert not strict.verdict.passed and strict.looks[-1].certain
    loose = judged(strict, "degraded")
    assert not loose.verdict.passed and not loose.looks[-1].certain
    assert loose.look_plan == dataclasses.replace(plan, required="degraded")


def terminal(evidence: Evidence) -> str:
    screen = Console(record=True, width=160)
    console.show_evidence(screen, evidence)
    return screen.export_text()


def text_of(folder: Path, evidence: Evidence) -> str:
    return model_card.render(card.facts(open_package(folder).provenance, evidence, None, ()))


def test_matrices_are_told_apart_by_what_they_are_in_their_layer() -> None:
    experts = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(3) for expert in range(9)]
    assert figures._kinds([*experts, "model.layers.0.self_attn.q_proj"]) == [*["up_proj"] * 27, "q_proj"]
    assert figures._kinds(["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.attn.c_attn"]) == [
        *("attn.c_proj", "mlp.c_proj", "c_attn"),
    ]
    many = [f"model.layers.0.mixer.matrix_{number}" for number in range(40) for _ in range(1 + (number < 11))]
    assert set(figures._kinds(many)) == {*(f"matrix_{number}" for number in range(11)), "others"}
