"""Recipe search: attempts from the plainest to the most elaborate until parity is content; the best candidate stays."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quantize import methods, package, source
from quantize.errors import CorpusError, CorruptModel, UnsupportedModel
from quantize.evidence import Attempt, Evidence
from quantize.files import records_of
from quantize.grades import GRADES, UNMEASURED, grade_at_least
from quantize.methods import Job
from quantize.parity import judged
from quantize.records import EvaluationSettings, FileRecord, Quantized, Recipe

ATTEMPTS = "attempts"
Measure = Callable[[Path, Recipe, Quantized, EvaluationSettings, int], Evidence]
"""Compares a folder that was written by a recipe with the original, as one of so many attempts."""


@dataclass(frozen=True)
class Candidate:
    """A quantized model in a folder: by which recipe, what was measured, and the files as they were before that."""

    folder: Path
    recipe: Recipe
    quantized: Quantized
    evidence: Evidence
    files: tuple[FileRecord, ...]


def attempts(recipe: Recipe) -> tuple[Recipe, ...]:
    """What is tried for a recipe, in this order: for `auto` what each method offers, the plainest first."""
    if recipe.name != methods.AUTO:
        return (recipe,)
    offered = (attempt for method in methods.registered() for attempt in method.attempts(recipe))
    return tuple(methods.normalized(attempt) for attempt in offered)


def build(job: Job, settings: EvaluationSettings, measure: Measure) -> Candidate:
    """Fill the folder `job.output` with the best that the attempts of `job.recipe` give.

    For `auto` its evidence lists what each attempt gave. Finished parts of a killed run are taken up from the folder
    `job.resume`. Raises what `methods.quantize` and `measure` raise.
    """
    searching = job.recipe.name == methods.AUTO
    required = _stricter(job.recipe.target_grade, settings.require) if searching else settings.require
    candidates: list[Candidate] = []
    planned = attempts(job.recipe)
    for number, recipe in enumerate(planned):
        attempt = dataclasses.replace(
            job,
            output=job.output / ATTEMPTS / str(number),
            recipe=recipe,
            resume=job.resume_folder / str(number),
        )
        quantized = _quantize(attempt, job.resume_folder)
        job.progress.stage("verify against the original")
        stricter = dataclasses.replace(settings, require=required)
        before = records_of(attempt.output)
        evidence = measure(attempt.output, recipe, quantized, stricter, len(planned))
        candidates.append(Candidate(attempt.output, recipe, quantized, evidence, before))
        if grade_at_least(evidence.verdict.grade, required) or evidence.verdict.grade == UNMEASURED:
            break
    best = min(candidates, key=_distance)
    evidence = _final_evidence(best, settings, measure, len(planned))
    if searching:
        listed = tuple(_attempt(candidate, chosen=candidate is best) for candidate in candidates)
        evidence = dataclasses.replace(evidence, attempts=listed)
    _keep(best.folder, job.output)
    shutil.rmtree(job.resume_folder, ignore_errors=True)
    return dataclasses.replace(best, folder=job.output, evidence=evidence)


def _quantize(attempt: Job, resume: Path) -> Quantized:
    """Write one attempt's weights, config and carried files into its folder."""
    attempt.output.mkdir(parents=True)
    attempt.progress.stage(f"quantize to {attempt.recipe.bits} bits on {attempt.device}: {attempt.recipe.name}")
    try:
        quantized = methods.quantize(attempt)
    except (CorpusError, CorruptModel, UnsupportedModel):  # no other run could go on from its finished parts
        shutil.rmtree(resume, ignore_errors=True)
        raise
    package.copy_carried(attempt.checkout, source.carried_files(attempt.checkout.source), attempt.output)
    return quantized


def _final_evidence(best: Candidate, settings: EvaluationSettings, measure: Measure, planned: int) -> Evidence:
    """The best candidate's evidence under the grade that is required, measured further where that stopped too early."""
    if best.evidence.verdict.required == settings.require or best.evidence.verdict.grade == UNMEASURED:
        return best.evidence
    evidence = judged(best.evidence, settings.require)
    plan = evidence.look_plan
    if plan is not None and not evidence.looks[-1].certain and evidence.looks[-1].windows < plan.windows:
        return measure(best.folder, best.recipe, best.quantized, settings, planned)
    return evidence


def _keep(folder: Path, staging: Path) -> None:
    """Move one attempt's files into the staging folder; the other attempts go."""
    for path in folder.iterdir():
        path.rename(staging / path.name)
    shutil.rmtree(staging / ATTEMPTS)


def _distance(candidate: Candidate) -> tuple[bool, float]:
    """What is structurally sound comes first, then the smaller divergence; perplexity alone does not count."""
    scores = candidate.evidence.scores
    sound = scores is not None and all(check.passed for check in candidate.evidence.checks)
    return not sound, scores.kld.mean.value if scores else float("inf")


def _stricter(*grades: str) -> str:
    return min(grades, key=GRADES.index)


def _attempt(candidate: Candidate, *, chosen: bool) -> Attempt:
    scores = candidate.evidence.scores
    return Attempt(
        recipe=candidate.recipe,
        grade=candidate.evidence.verdict.grade,
        perplexity_ratio=scores.perplexity_ratio if scores else None,
        kld=scores.kld.mean if scores else None,
        same_top=scores.same_top if scores else None,
        weight_bytes=candidate.evidence.sizes.package_bytes,
        seconds=candidate.quantized.seconds,
        chosen=chosen,
    )
