"""Recipe search: which candidate stays, and that an attempt which fails never takes a finished one with it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize import methods, package, pipeline, search, source
from quantize.errors import CorpusError, CorruptModel, DeviceError, StorageError, UnsupportedModel
from quantize.evidence import Estimate, Evidence
from quantize.formats.bitsandbytes import checkpoint
from quantize.grades import GRADES
from quantize.methods import calibrated
from quantize.methods.calibration import quantizer
from quantize.methods.calibration.allocation import Offers, StorageOption
from quantize.parity import gate, judged, models
from quantize.progress import Silent
from quantize.records import Checkout, EvaluationSettings, Quantized, Recipe
from quantize.search import Candidate
from tests.conftest import POCKET, QUICK, Outcome
from tests.publishing.workspace import MEASURING

AUTO = methods.recipe_of({"name": "auto", "passes": 0, "calibration_windows": 8, "calibration_length": 32})
HARD = dataclasses.replace(AUTO, target_grade="lossless")
WEIGHTS = "model.safetensors"


def candidate(base: package.Package, ratio: float, high: float, kld: float, size: float = 1.0) -> Candidate:
    """A candidate whose figures are these, in files of `size` times the bytes of the package `base`."""
    evidence = base.evidence
    assert evidence.scores is not None
    scores = dataclasses.replace(
        evidence.scores,
        perplexity_ratio=Estimate(ratio, 0.99, high),
        kld=dataclasses.replace(evidence.scores.kld, mean=Estimate(kld, kld, 1.01 * kld)),
    )
    sizes = dataclasses.replace(evidence.sizes, package_bytes=round(size * 1_000_000))
    verdict = gate(evidence.checks, scores, evidence.verdict.required)
    evidence = dataclasses.replace(evidence, scores=scores, sizes=sizes, verdict=verdict, look_plan=None)
    return Candidate(base.folder, base.provenance.recipe, base.provenance.quantized, evidence, ())


@pytest.fixture(scope="module")
def base(finished: Path) -> package.Package:
    return package.open_package(finished)


@pytest.mark.parametrize("required", ["parity", "good", "degraded"])
def test_figures_that_disagree(base: package.Package, required: str) -> None:
    """The smaller divergence decides only among equal grades."""
    parity, good = candidate(base, 1.003, 1.008, 0.0122), candidate(base, 1.014, 1.022, 0.0120)
    assert search.preferred([parity, good], required) is parity
    assert search.preferred([good, parity], required) is parity
    nearer = candidate(base, 1.004, 1.009, 0.0100)
    assert search.preferred([parity, good, nearer], required) is nearer


def test_size_counts_before_divergence_unless_it_is_about_the_same(base: package.Package) -> None:
    plain, larger = candidate(base, 1.003, 1.008, 0.015), candidate(base, 1.003, 1.008, 0.010, size=1.1)
    assert search.preferred([larger, plain], "parity") is plain
    headers = candidate(base, 1.003, 1.008, 0.010, size=1.0009)
    assert search.preferred([plain, headers], "parity") is headers
    assert search.preferred([plain, candidate(base, 1.0, 1.001, 0.001, size=1.1)], "parity") is not plain


FIGURES = st.tuples(st.floats(1.0, 1.1), st.floats(0.001, 0.2), st.floats(0.9, 1.2))


@given(st.lists(FIGURES, min_size=1, max_size=3), st.sampled_from(GRADES[:-1]))
def test_nothing_that_passes_is_left_for_what_does_not(
    base: package.Package, figures: list[tuple[float, float, float]], required: str
) -> None:
    candidates = [candidate(base, 1.0, ratio, kld, size) for ratio, kld, size in figures]
    best = search.preferred(candidates, required)
    passed = [gate(one.evidence.checks, one.evidence.scores, required).passed for one in candidates]
    assert passed[candidates.index(best)] == any(passed)
    grades = [GRADES.index(one.evidence.verdict.grade) for one in candidates]
    assert grades[candidates.index(best)] == min(grades)
    divergences = {
        search._divergence(search.preferred([*rest], required).evidence) for rest in itertools.permutations(candidates)
    }
    assert divergences == {search._divergence(best.evidence)}


class Attempts:
    """Stands for the methods and the measurement: attempts get better, but for the one that fails at some stage."""

    def __init__(self, base: package.Package, number: int, stage: str, error: BaseException) -> None:
        self.base, self.number, self.stage, self.error = base, number, stage, error
        self.begun: list[int] = []

    def quantize(self, job: methods.Job) -> Quantized:
        self.begun.append(int(job.output.name))
        (job.output / "model.safetensors.part").touch()
        self.fail("quantize")
        (job.output / "model.safetensors.part").unlink()
        (job.output / WEIGHTS).write_text(job.output.name)
        return self.base.provenance.quantized

    def measure(
        self, folder: Path, recipe: Recipe, quantized: Quantized, settings: EvaluationSettings, planned: int
    ) -> Evidence:
        self.fail("measure")
        return candidate(self.base, 1.006, 1.009, 0.01 / (1 + int(folder.name))).evidence

    def fail(self, stage: str) -> None:
        if (self.begun[-1], stage) == (self.number, self.stage):
            raise self.error


KNOWN = [
    DeviceError("out of memory while measuring: end other programs"),
    UnsupportedModel("the model is not a sequence of decoder layers"),
    CorpusError("half of the windows repeat the corpus"),
    CorruptModel("w holds NaN"),
    StorageError("no space left while writing /srv/private/out.building/attempts/1; nothing was left half done there"),
    OSError(28, "No space left on device"),
]


@functools.cache
def fetched() -> Checkout:
    return source.fetch(str(POCKET), revision=None, trust_remote_code=False, progress=Silent())


def searched(attempts: Attempts, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Candidate:
    monkeypatch.setattr(methods, "quantize", attempts.quantize)
    monkeypatch.setattr(search, "RESIZED", 0)
    monkeypatch.setattr(calibrated, "REFINED_SHARE", 0.0)
    (folder / "staging").mkdir()
    job = methods.Job(fetched(), folder / "staging", HARD, "cpu", Silent(), "", folder / "unfinished")
    return search.build(job, QUICK, attempts.measure)


@pytest.mark.parametrize("error", KNOWN, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("stage", ["quantize", "measure"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_known_failure_in_each_stage(
    base: package.Package, number: int, stage: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first attempt it ends the run; of a later one it is noted, and the best of the others stays."""
    attempts = Attempts(base, number, stage, error)
    if number == 0:
        with pytest.raises(StorageError if isinstance(error, OSError) else type(error)):
            searched(attempts, tmp_path, monkeypatch)
        return
    best = searched(attempts, tmp_path, monkeypatch)
    assert attempts.begun == [0, 1, 2] and best.bug is None
    kept = 1 if number == 2 else 2
    assert (best.folder / WEIGHTS).read_text() == str(kept)
    listed = best.evidence.attempts
    assert [one.chosen for one in listed] == [index == kept for index in range(3)]
    assert [bool(one.failure) for one in listed] == [index == number for index in range(3)]
    assert "/srv" not in listed[number].failure and listed[number].grade == "unmeasured"
    assert {path.name for path in best.folder.iterdir()} >= {WEIGHTS, "tokenizer.json"}
    assert not list(tmp_path.rglob("*.part")) and not (best.folder / search.ATTEMPTS).exists()


@pytest.mark.parametrize("number", [1, 2])
def test_an_unforeseen_error_ends_the_search_but_loses_nothing(
    base: package.Package, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bug = ZeroDivisionError("division by zero")
    best = searched(Attempts(base, number, "measure", bug), tmp_path, monkeypatch)
    assert best.bug is bug and (best.folder / WEIGHTS).read_text() == str(number - 1)
    assert [one.failure for one in best.evidence.attempts] == [*[""] * number, "ZeroDivisionError: division by zero"]


def test_an_interruption_ends_the_run(base: package.Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        searched(Attempts(base, 1, "quantize", KeyboardInterrupt()), tmp_path, monkeypatch)


OFFERS = Offers(
    {
        name: (StorageOption(64, 5_000, 0.05), StorageOption(32, 5_100, 0.04), StorageOption(0, 20_000, 0.0))
        for name in map(str, range(200))
    },
    1_000_000,
)
"""Of a model of 200 equal matrices, in any unit of divergence."""


class Resized:
    """Stands for quantizing and measuring a model whose KLD goes with OFFERS, times `off` in all larger files."""

    def __init__(self, base: package.Package, plain: float, off: float = 1.0, error: Exception | None = None) -> None:
        self.base, self.plain, self.off, self.error, self.recipes = base, plain, off, error, list[Recipe]()

    def quantize(self, job: methods.Job) -> Quantized:
        self.recipes.append(job.recipe)
        (job.output / WEIGHTS).write_text(job.output.name)
        return self.base.provenance.quantized

    def measure(
        self, folder: Path, recipe: Recipe, quantized: Quantized, settings: EvaluationSettings, planned: int
    ) -> Evidence:
        times = float(recipe.options.get("size_budget", 1.0))
        kld = 0.09 if recipe.name == "rtn" else self.plain * OFFERS.divergence(times) / OFFERS.divergence(1)
        kld = 0.001 if recipe.bits == 8 else kld * (self.off if times > 1 else 1)
        scored = candidate(self.base, 1.001, 1.002, kld, times)
        return judged(scored.evidence, settings.require)

    def offers(self, *_: object) -> Offers:
        if self.error is not None:
            raise self.error
        return OFFERS

    def search(self, recipe: Recipe, require: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Candidate:
        monkeypatch.setattr(methods, "quantize", self.quantize)
        monkeypatch.setattr(quantizer, "offers", self.offers)
        (folder / "staging").mkdir()
        job = methods.Job(fetched(), folder / "staging", recipe, "cpu", Silent(), "", folder / "unfinished")
        return search.build(job, dataclasses.replace(QUICK, require=require), self.measure)


def budgets(best: Candidate) -> list[float]:
    return [
        float(one.recipe.options.get("size_budget", 1)) for one in best.evidence.attempts if one.recipe.name != "rtn"
    ]


@pytest.mark.parametrize("off", [1.0, 1.3])
def test_the_smallest_file_that_reaches_the_target(
    base: package.Package, off: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no refinement could give is left out; a prediction that was wrong is mended by what was measured."""
    asked = dataclasses.replace(AUTO, max_size=2.0)
    best = Resized(base, 0.030, off).search(asked, "good", tmp_path, monkeypatch)
    assert best.evidence.verdict.grade == "parity" and not best.evidence.advice
    assert "epochs" not in best.recipe.options
    needed = OFFERS.smallest(0.02 / 1.01 / 0.030 / off * OFFERS.divergence(1))
    chosen = float(best.recipe.options["size_budget"])
    assert needed <= chosen == max(budgets(best)) < needed + 0.08
    assert len(budgets(best)) == (2 if off == 1 else 3)
    last = best.evidence.attempts[-1]
    assert last.predicted is not None and last.kld is not None
    assert last.predicted == pytest.approx(last.kld.value, rel=1e-3)


def test_the_required_grade_where_the_target_is_out_of_reach(
    base: package.Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = dataclasses.replace(AUTO, target_grade="lossless")
    best = Resized(base, 0.025).search(asked, "parity", tmp_path, monkeypatch)
    assert best.evidence.verdict.passed and best.evidence.verdict.grade == "parity"
    assert 1 < float(best.recipe.options["size_budget"]) < 1.5


def test_a_refusal_says_what_would_help(base: package.Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = dataclasses.replace(AUTO, max_size=1.1)
    tries = Resized(base, 0.050)
    best = tries.search(asked, "parity", tmp_path, monkeypatch)
    assert not best.evidence.verdict.passed and best.evidence.verdict.grade == "good" and budgets(best) == [1]
    larger, eight, grade = best.evidence.advice
    needed = OFFERS.smallest(search.MARGIN * 0.02 / 1.01 / 0.050 * OFFERS.divergence(1))
    assert f"a file of {needed:.2f} times the plain 4-bit bytes" in larger and "is predicted to be parity" in larger
    assert eight.startswith("--bits 8 was measured as lossless") and grade.startswith("--require good takes")
    assert tries.recipes[-1].bits == 8 and best.recipe.bits == 4


def test_a_size_that_was_asked_for_is_not_changed(
    base: package.Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = Resized(base, 0.050).search(methods.replace(AUTO, size_budget=1.2), "good", tmp_path, monkeypatch)
    assert budgets(best) == [1, 1.2] and best.evidence.verdict.grade == "good"


def test_a_prediction_that_fails_loses_nothing(
    base: package.Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = DeviceError("out of memory while predicting sizes")
    best = Resized(base, 0.050, error=error).search(AUTO, "good", tmp_path, monkeypatch)
    assert best.evidence.verdict.grade == "good"
    assert best.evidence.attempts[-1].failure == "out of memory while predicting sizes"


STAGES = {"gradients": (quantizer, "output_gradients"), "loading": (models, "_load")}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_memory_that_runs_out_in_a_later_attempt(
    stage: str, tmp_path: Path, shallow: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Outcome]
) -> None:
    """The first package, which passed, is delivered; terminal and card say why there is no second."""
    module, name = STAGES[stage]
    own, resumed = getattr(module, name), tmp_path / "out.unfinished" / "1"

    def failing(*arguments: object, **options: object) -> object:
        if resumed.exists():
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
        return own(*arguments, **options)

    monkeypatch.setattr(module, name, failing)
    monkeypatch.setattr(calibrated, "REFINED_PASSES", 0)
    monkeypatch.setattr(calibrated, "REFINED_EPOCHS", 0)
    monkeypatch.setattr(calibrated, "REFINED_SHARE", 0.0)
    shape = ("--passes", "0", "--calibration-windows", "8", "--calibration-length", "32", "--target", "lossless")
    quick = (*MEASURING, "--device", "cpu")
    ended = command("run", shallow, "-o", tmp_path / "out", *shape, *quick)
    assert ended.code == 0 and "Traceback" not in ended.err, ended.err
    assert "not made: calibrated: out of memory while " in ended.err
    opened = package.open_package(tmp_path / "out")
    assert opened.provenance.recipe.name == "rtn" and [path.name for path in tmp_path.iterdir()] == ["out"]
    assert all(one.failure.startswith("out of memory while ") for one in opened.evidence.attempts[1:])
    assert "not made: out of memory while " in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_memory_that_runs_out_in_the_first_attempt_is_a_known_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Outcome]
) -> None:
    def failing(*_: object, **__: object) -> object:
        raise MemoryError

    monkeypatch.setattr(checkpoint, "write", failing)
    ended = command("run", POCKET, "-o", tmp_path / "out", "--recipe", "rtn", "--device", "cpu")
    assert ended.code == 1 and "out of memory while quantizing pocket-gpt2" in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err


@pytest.mark.slow
def test_a_bug_in_a_later_attempt_keeps_its_traceback_after_the_package_is_in_place(
    tmp_path: Path, shallow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> object:
        raise ZeroDivisionError

    monkeypatch.setattr(quantizer, "output_gradients", failing)
    request = pipeline.RunRequest(str(shallow), output=tmp_path / "out", recipe=HARD, settings=QUICK, device="cpu")
    with pytest.raises(ZeroDivisionError):
        pipeline.run(request, Silent())
    opened = package.open_package(tmp_path / "out")
    package.require_unchanged(opened)
    assert opened.evidence.attempts[1].failure == "ZeroDivisionError"
    assert not pipeline.run(request, Silent()).created
