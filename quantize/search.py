"""Recipes from the simplest to the most elaborate, each judged by parity, until one is good enough; the best stays."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quantize import methods, package, source
from quantize.errors import CorpusError, CorruptModel, UnsupportedModel
from quantize.evidence import Attempt, Evidence
from quantize.grades import GRADES, UNMEASURED, grade_at_least
from quantize.methods import Job
from quantize.parity import corpus_text, gate
from quantize.progress import Progress
from quantize.records import Checkout, EvaluationSettings, Quantized, Recipe

TRIES = "tries"
Measure = Callable[[Path, Recipe, Quantized, EvaluationSettings], Evidence]
"""Judges a folder that was made by a recipe."""


@dataclass(frozen=True)
class Made:
    """A quantized model in a folder: by which recipe, and what was measured."""

    folder: Path
    recipe: Recipe
    quantized: Quantized
    evidence: Evidence


def attempts(recipe: Recipe) -> tuple[Recipe, ...]:
    """What is tried for a recipe, in this order: for `auto` what each method offers, the plainest first."""
    if recipe.name != methods.AUTO:
        return (recipe,)
    offered = (attempt for method in methods.registered() for attempt in method.attempts(recipe))
    return tuple(methods.normalized(attempt) for attempt in offered)


def build(
    checkout: Checkout,
    staging: Path,
    recipe: Recipe,
    settings: EvaluationSettings,
    device: str,
    progress: Progress,
    resume: Path,
    measure: Measure,
) -> Made:
    """Fill `staging` with the best that the attempts of `recipe` give, and say which it was and what the others gave.

    Finished parts of a killed try are taken up from the folder `resume`.
    """
    tried: list[Made] = []
    aim = _stricter(recipe.target_grade, settings.require) if recipe.name == methods.AUTO else settings.require
    for number, attempt in enumerate(attempts(recipe)):
        folder = staging / TRIES / str(number)
        folder.mkdir(parents=True)
        progress.stage(f"quantize to {attempt.bits} bits on {device}: {attempt.name}")
        kept = resume / str(number)
        try:
            quantized = methods.quantize(Job(checkout, folder, attempt, device, progress, corpus_text(settings), kept))
        except (CorpusError, CorruptModel, UnsupportedModel):  # no other run could go on from there
            shutil.rmtree(resume, ignore_errors=True)
            raise
        package.copy_carried(checkout, source.carried_files(checkout.source), folder)
        progress.stage("verify against the source")
        evidence = measure(folder, attempt, quantized, dataclasses.replace(settings, require=aim))
        tried.append(Made(folder, attempt, quantized, evidence))
        if grade_at_least(evidence.verdict.grade, aim) or evidence.verdict.grade == UNMEASURED:
            break
    best = min(tried, key=_distance)
    evidence = _judged(best, settings, measure)
    for path in best.folder.iterdir():
        path.rename(staging / path.name)
    shutil.rmtree(staging / TRIES)
    shutil.rmtree(resume, ignore_errors=True)
    listed = tuple(_attempt(one, chosen=one is best) for one in tried) if recipe.name == methods.AUTO else ()
    return dataclasses.replace(best, folder=staging, evidence=dataclasses.replace(evidence, attempts=listed))


def _judged(best: Made, settings: EvaluationSettings, measure: Measure) -> Evidence:
    """The best one's evidence under the grade that is required; measured further where it had stopped too early."""
    evidence = best.evidence
    if evidence.verdict.grade == UNMEASURED:
        return evidence
    verdict = gate(evidence.checks, evidence.scores, settings.require)
    stopped = evidence.corpus is not None and evidence.corpus.scored < evidence.corpus.windows
    if evidence.verdict.required != settings.require and not verdict.passed and stopped:
        return measure(best.folder, best.recipe, best.quantized, settings)
    return dataclasses.replace(evidence, verdict=verdict)


def _distance(made: Made) -> tuple[bool, float]:
    """What is structurally sound comes first, then the smaller divergence; perplexity alone does not count."""
    scores = made.evidence.scores
    sound = scores is not None and all(check.passed for check in made.evidence.checks)
    return not sound, scores.kld.mean.value if scores else float("inf")


def _stricter(one: str, other: str) -> str:
    return min(one, other, key=GRADES.index)


def _attempt(made: Made, *, chosen: bool) -> Attempt:
    scores = made.evidence.scores
    return Attempt(
        recipe=made.recipe,
        grade=made.evidence.verdict.grade,
        perplexity_ratio=scores.perplexity_ratio if scores else None,
        kld=scores.kld.mean if scores else None,
        same_top=scores.same_top if scores else None,
        weight_bytes=made.evidence.sizes.package_bytes,
        seconds=made.quantized.seconds,
        chosen=chosen,
    )
