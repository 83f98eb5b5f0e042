"""Recipes from the simplest to the most elaborate, each judged by parity, until one is good enough; the best stays."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quantize import methods, package, source
from quantize.errors import CorpusError, CorruptModel, UnsupportedModel
from quantize.parity import corpus_text, judge
from quantize.progress import Progress
from quantize.records import (
    AUTO,
    CALIBRATED,
    GRADES,
    STOCK,
    UNMEASURED,
    Checkout,
    Parity,
    ParitySettings,
    Quantized,
    Recipe,
    Rung,
    grade_at_least,
)

TRIES = "tries"
SWEEPS, EPOCHS = 3, 8
"""Of the refined recipe, unless more are asked for."""
Measure = Callable[[Path, Recipe, Quantized, ParitySettings], Parity]
"""Judges a folder that was made by a recipe."""


@dataclass(frozen=True)
class Made:
    """A quantized model in a folder: by which recipe, and what was measured."""

    folder: Path
    recipe: Recipe
    quantized: Quantized
    parity: Parity


def rungs(recipe: Recipe) -> tuple[Recipe, ...]:
    """What is tried for a recipe, in this order: for `auto` stock, calibrated, the same with more text and care and
    with learned rounding, and last, where there is a budget for it, with more bytes."""
    if recipe.name != AUTO:
        return (recipe,)
    stock = dataclasses.replace(recipe, name=STOCK, size_budget=1.0, sweeps=Recipe.sweeps, epochs=Recipe.epochs)
    if recipe.bits == 8:
        return (stock,)
    calibrated = dataclasses.replace(recipe, name=CALIBRATED, size_budget=1.0)
    refined = dataclasses.replace(
        calibrated,
        calibration_windows=2 * recipe.calibration_windows,
        sweeps=max(recipe.sweeps, SWEEPS),
        epochs=max(recipe.epochs, EPOCHS),
    )
    larger = dataclasses.replace(refined, size_budget=recipe.size_budget)
    return (stock, calibrated, refined, larger) if recipe.size_budget > 1 else (stock, calibrated, refined)


def build(
    checkout: Checkout,
    site: Path,
    recipe: Recipe,
    settings: ParitySettings,
    device: str,
    progress: Progress,
    resume: Path,
    measure: Measure,
) -> Made:
    """Fill `site` with the best that the rungs of `recipe` give, and say which it was and what the others gave.

    Finished parts of a killed try are taken up from the folder `resume`.
    """
    tried: list[Made] = []
    aim = _stricter(recipe.target_grade, settings.require) if recipe.name == AUTO else settings.require
    for number, rung in enumerate(rungs(recipe)):
        folder = site / TRIES / str(number)
        folder.mkdir(parents=True)
        progress.stage(f"quantize to {rung.bits} bits on {device}: {rung.name}")
        kept = resume / str(number)
        try:
            quantized = methods.quantize(checkout, folder, rung, device, progress, corpus_text(settings), kept)
        except (CorpusError, CorruptModel, UnsupportedModel):  # no other run could go on from there
            shutil.rmtree(resume, ignore_errors=True)
            raise
        package.copy_carried(checkout, source.carried_files(checkout.source), folder)
        progress.stage("verify against the source")
        parity = measure(folder, rung, quantized, dataclasses.replace(settings, require=aim))
        tried.append(Made(folder, rung, quantized, parity))
        if grade_at_least(parity.verdict.grade, aim) or parity.verdict.grade == UNMEASURED:
            break
    best = min(tried, key=_distance)
    parity = _judged(best, settings, measure)
    for path in best.folder.iterdir():
        path.rename(site / path.name)
    shutil.rmtree(site / TRIES)
    shutil.rmtree(resume, ignore_errors=True)
    evidence = tuple(_rung(one, chosen=one is best) for one in tried) if recipe.name == AUTO else ()
    return dataclasses.replace(best, folder=site, parity=dataclasses.replace(parity, rungs=evidence))


def _judged(best: Made, settings: ParitySettings, measure: Measure) -> Parity:
    """The best one's evidence under the grade that is required; measured further where it had stopped too early."""
    parity = best.parity
    if parity.verdict.grade == UNMEASURED:
        return parity
    verdict = judge(parity.checks, parity.scores, settings.require)
    stopped = parity.corpus is not None and parity.corpus.scored < parity.corpus.windows
    if parity.verdict.required != settings.require and not verdict.passed and stopped:
        return measure(best.folder, best.recipe, best.quantized, settings)
    return dataclasses.replace(parity, verdict=verdict)


def _distance(made: Made) -> tuple[bool, float]:
    """What is structurally sound comes first, then the smaller divergence; perplexity alone does not count."""
    scores = made.parity.scores
    sound = scores is not None and all(check.passed for check in made.parity.checks)
    return not sound, scores.kld.mean.value if scores else float("inf")


def _stricter(one: str, other: str) -> str:
    return min(one, other, key=GRADES.index)


def _rung(made: Made, *, chosen: bool) -> Rung:
    scores = made.parity.scores
    return Rung(
        recipe=made.recipe,
        grade=made.parity.verdict.grade,
        perplexity_ratio=scores.perplexity_ratio if scores else None,
        kld=scores.kld.mean if scores else None,
        same_top=scores.same_top if scores else None,
        weight_bytes=made.parity.sizes.package_bytes,
        seconds=made.quantized.seconds,
        chosen=chosen,
    )
