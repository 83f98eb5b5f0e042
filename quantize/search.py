"""Recipe search: attempts from the plainest to the most elaborate, then larger files; the best candidate stays."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantize import devices, methods, package, source
from quantize.errors import CorpusError, CorruptModel, QuantizeError, UnsupportedModel, storage_errors
from quantize.evidence import Attempt, Evidence
from quantize.files import records_of
from quantize.grades import GRADES, PASSING_GRADES, UNMEASURED, grade_at_least
from quantize.methods import Job, Larger
from quantize.parity import headroom, judged
from quantize.records import EvaluationSettings, FileRecord, Quantized, Recipe

ATTEMPTS = "attempts"
SAME_SIZE = 1.001
"""Times the smallest one's bytes: so much larger weight files still count as equally large."""
RESIZED = 3
"""Files of other sizes that are tried at the most."""
MARGIN = 0.95
"""Of the divergence that a grade allows: what a file of another size is looked for with."""
EIGHT_BITS = 8
"""In place of the number of an attempt."""
WORTH_TRYING = 0.02
"""Of the plain bytes: by so much smaller a file must be predicted to be tried after one that is good enough."""
FOLDERS = re.compile(r"(?<![\w:/.])/(?:[^\s/'\"]+/)+")
"""The folders of an absolute path, but not of an address."""
Measure = Callable[[Path, Recipe, Quantized, EvaluationSettings, int], Evidence]
"""Compares a folder that was written by a recipe with the original, as one of so many attempts."""
Measured = Callable[[Path, Recipe, Quantized, str], Evidence]
"""The same for the grade that is required."""


@dataclass(frozen=True)
class Candidate:
    """A quantized model in a folder: by which recipe, what was measured, and the files as they were before that.

    `bug` is an error that nobody foresaw, which ended the search after this candidate was finished. `predicted` is the
    KLD (nats) that was expected of a file whose size was looked for.
    """

    folder: Path
    recipe: Recipe
    quantized: Quantized
    evidence: Evidence
    files: tuple[FileRecord, ...]
    bug: Exception | None = None
    predicted: float | None = None


@dataclass(frozen=True)
class Failure:
    """A recipe of which nothing could be made or measured, and why; `bug` is an error that nobody foresaw."""

    recipe: Recipe
    seconds: float
    reason: str
    bug: Exception | None


def attempts(recipe: Recipe) -> tuple[Recipe, ...]:
    """What is tried for a recipe, in this order: for `auto` what each method offers, the plainest first."""
    if recipe.name != methods.AUTO:
        return (recipe,)
    offered = (attempt for method in methods.registered() for attempt in method.attempts(recipe))
    return tuple(methods.normalized(attempt) for attempt in offered)


def most_attempts(recipe: Recipe) -> int:
    """How many candidates may be judged on the same windows at the most."""
    planned = attempts(recipe)
    resizable = recipe.name == methods.AUTO and any(methods.get(attempt.name).resized for attempt in planned)
    return len(planned) + (RESIZED if resizable else 0)


def build(job: Job, settings: EvaluationSettings, measure: Measure) -> Candidate:
    """Fill the folder `job.output` with the best that the attempts of `job.recipe` give.

    For `auto` its evidence lists what each attempt gave. Finished parts of a killed run are taken up from the folder
    `job.resume`. Raises what `methods.quantize` and `measure` raise at the first attempt; once there is a candidate, an
    attempt that fails is listed with its reason, and an unforeseen error ends the search as the candidate's `bug`.
    """
    searching = job.recipe.name == methods.AUTO
    target = _stricter(job.recipe.target_grade, settings.require) if searching else settings.require
    count = most_attempts(job.recipe)

    def measured(folder: Path, recipe: Recipe, quantized: Quantized, grade: str) -> Evidence:
        return measure(folder, recipe, quantized, dataclasses.replace(settings, require=grade), count)

    tried = _planned(job, target, measured)
    needed = _resized(job, tried, target, settings.require, measured) if searching else None
    tried = _settled(tried, settings.require, measured, job)
    best = preferred(_candidates(tried), settings.require)
    evidence = _judged(best.evidence, settings.require)
    if searching:
        evidence = dataclasses.replace(evidence, attempts=tuple(_attempt(outcome, best) for outcome in tried))
    if not evidence.verdict.passed and evidence.verdict.grade != UNMEASURED:
        evidence = dataclasses.replace(evidence, advice=tuple(_advice(evidence, job, tried, needed, measured)))
    _keep(best.folder, job.output)
    shutil.rmtree(job.resume_folder, ignore_errors=True)
    bugs = [outcome.bug for outcome in tried if outcome.bug is not None]
    return dataclasses.replace(best, folder=job.output, evidence=evidence, bug=bugs[0] if bugs else None)


def _planned(job: Job, target: str, measured: Measured) -> list[Candidate | Failure]:
    """The attempts that are the same for every model, until one is content; none of which it is known to be in vain."""
    tried: list[Candidate | Failure] = []
    for recipe in attempts(job.recipe):
        if tried and _in_vain(tried[-1], recipe, target):
            job.progress.note(f"more work in the same bytes is left out: it would not bring the grade {target}")
            continue
        tried.append(_tried(job, len(tried), recipe, target, measured))
        if _ends_search(tried[-1], target):
            break
    return tried


def _in_vain(before: Candidate | Failure, recipe: Recipe, target: str) -> bool:
    """Whether the divergence would have to fall further than such a recipe ever brought it."""
    if isinstance(before, Failure):
        return False
    return headroom(before.evidence, target) < methods.get(recipe.name).least_left(before.recipe, recipe)


def _resized(
    job: Job, tried: list[Candidate | Failure], target: str, require: str, measured: Measured
) -> Larger | None:
    """Try files of other sizes until the smallest one of the grade `target` is near, or else that of `require`.

    Each is predicted from the one that was measured last. Returns the one for `require` if it would be too large.
    """
    for _ in range(RESIZED):
        latest = tried[-1]
        if isinstance(latest, Failure) or methods.get(latest.recipe.name).resized is None:
            return None
        if latest.predicted is None and _ends_search(latest, target):
            return None
        passes = any(_judged(candidate.evidence, require).verdict.passed for candidate in _candidates(tried))
        for goal in (target,) if passes else dict.fromkeys((target, require)):
            larger = _predicted(job, latest, goal, tried)
            if larger is None:
                return None
            if larger.within_reach and abs(larger.times - larger.before) > SAME_SIZE - 1:
                break
        else:
            return None if passes else larger
        outcome = _tried(job, len(tried), larger.recipe, target, measured)
        if isinstance(outcome, Candidate):
            outcome = dataclasses.replace(outcome, predicted=larger.left * _divergence(latest.evidence))
        tried.append(outcome)
    return None


def _predicted(job: Job, latest: Candidate, goal: str, tried: list[Candidate | Failure]) -> Larger | None:
    """The smallest file that should get the grade `goal`; None where that cannot be said, or `latest` is hardly larger.

    An error is added to what was tried.
    """
    room = headroom(latest.evidence, goal)
    if room == 0:
        return None
    started = time.monotonic()
    job.progress.stage(f"look for the smallest file of the grade {goal}")
    try:
        larger = methods.resized(_attempt_job(job, len(tried), latest.recipe), room * MARGIN, job.recipe)
    except Exception as error:  # noqa: BLE001 - a finished package is never lost for want of a better one
        tried.append(_failure(job, latest.recipe, started, error))
        return None
    worth_trying = larger is not None and (room < 1 or larger.times < larger.before - WORTH_TRYING)
    return larger if worth_trying else None


def preferred(candidates: Sequence[Candidate], required: str) -> Candidate:
    """The best candidate: one that passes under the grade `required`; then the better grade; then the smaller one; and
    among equals the one that diverges least. Perplexity alone does not count."""
    standing = min(_standing(candidate.evidence, required) for candidate in candidates)
    equals = [candidate for candidate in candidates if _standing(candidate.evidence, required) == standing]
    limit = SAME_SIZE * min(candidate.evidence.sizes.package_bytes for candidate in equals)
    alike = [candidate for candidate in equals if candidate.evidence.sizes.package_bytes <= limit]
    return min(alike, key=lambda candidate: _divergence(candidate.evidence))


def _standing(evidence: Evidence, required: str) -> tuple[bool, int, bool]:
    """Less is better: whether it fails, its place on the scale of grades, whether its structure is unsound."""
    verdict = _judged(evidence, required).verdict
    place = GRADES.index(verdict.grade) if verdict.grade in GRADES else len(GRADES)
    return not verdict.passed, place, not _sound(evidence)


def _sound(evidence: Evidence) -> bool:
    return evidence.scores is not None and all(check.passed for check in evidence.checks)


def _divergence(evidence: Evidence) -> float:
    return evidence.scores.kld.mean.value if evidence.scores else float("inf")


def _tried(job: Job, number: int, recipe: Recipe, required: str, measured: Measured) -> Candidate | Failure:
    """One attempt in a folder of its own; all but the first may fail."""
    started = time.monotonic()
    attempt = _attempt_job(job, number, recipe)
    try:
        with storage_errors(attempt.output):
            quantized = _quantize(attempt, job.resume_folder)
            before = records_of(attempt.output)
            evidence = measured(attempt.output, recipe, quantized, required)
            return Candidate(attempt.output, recipe, quantized, evidence, before)
    except Exception as error:
        if number == 0:
            raise
        failure = _failure(job, recipe, started, error)
    shutil.rmtree(attempt.output, ignore_errors=True)
    devices.release(job.device)
    return failure


def _attempt_job(job: Job, number: int, recipe: Recipe) -> Job:
    return dataclasses.replace(
        job,
        output=job.output / ATTEMPTS / str(number),
        recipe=recipe,
        resume=job.resume_folder / str(number),
        shared=job.resume_folder / "shared",
    )


def _failure(job: Job, recipe: Recipe, started: float, error: Exception) -> Failure:
    failure = Failure(recipe, round(time.monotonic() - started, 3), *_reason(error))
    job.progress.note(f"the recipe {recipe.name} is left out: {failure.reason}")
    return failure


def _reason(error: Exception) -> tuple[str, Exception | None]:
    """The first line of a known failure; of any other with its name, and the error itself without its variables.

    The line is published with the package, so it names no folder of this machine.
    """
    first_line = [FOLDERS.sub("", line) for line in str(error).strip().splitlines()[:1]]
    if isinstance(error, QuantizeError):
        return "".join(first_line), None
    traceback.clear_frames(error.__traceback__)  # they hold whole models
    return ": ".join([type(error).__name__, *first_line]), error


def _candidates(tried: Sequence[Candidate | Failure]) -> list[Candidate]:
    return [outcome for outcome in tried if isinstance(outcome, Candidate)]


def _ends_search(outcome: Candidate | Failure, required: str) -> bool:
    """Whether nothing more is tried: after an unforeseen error, or when the grade is reached or not asked for."""
    if isinstance(outcome, Failure):
        return outcome.bug is not None
    grade = outcome.evidence.verdict.grade
    return grade_at_least(grade, required) or grade == UNMEASURED


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


def _settled(
    tried: list[Candidate | Failure], required: str, measured: Measured, job: Job
) -> list[Candidate | Failure]:
    """What was tried, the preferred candidate measured further while its verdict under `required` is left open."""
    while _left_open((best := preferred(_candidates(tried), required)).evidence, required):
        try:
            evidence = measured(best.folder, best.recipe, best.quantized, required)
        except QuantizeError as error:
            job.progress.note(f"the recipe {best.recipe.name} could not be measured further: {error}")
            break
        further = dataclasses.replace(best, evidence=evidence)
        tried = [further if outcome is best else outcome for outcome in tried]
    return tried


def _left_open(evidence: Evidence, required: str) -> bool:
    """Whether scoring stopped, certain of the verdict under another grade, before it was certain under `required`."""
    if evidence.verdict.required == required or evidence.verdict.grade == UNMEASURED:
        return False
    return judged(evidence, required).undecided


def _judged(evidence: Evidence, required: str) -> Evidence:
    """The evidence with its verdict under the grade that is required."""
    if evidence.verdict.required == required or evidence.verdict.grade == UNMEASURED:
        return evidence
    return judged(evidence, required)


def _keep(folder: Path, staging: Path) -> None:
    """Move one attempt's files into the staging folder; the other attempts go."""
    for path in folder.iterdir():
        path.rename(staging / path.name)
    shutil.rmtree(staging / ATTEMPTS)


def _advice(
    evidence: Evidence, job: Job, tried: list[Candidate | Failure], needed: Larger | None, measured: Measured
) -> Iterator[str]:
    """What would help a package that was refused, a line each."""
    verdict = evidence.verdict
    if needed is not None:
        plain = min(candidate.evidence.sizes.package_bytes for candidate in _candidates(tried))
        megabytes = needed.needed * plain / 1e6
        yield (
            f"a file of {needed.needed:.2f} times the plain 4-bit bytes, about {megabytes:.0f} MB, is predicted to be "
            f"{verdict.required}: ask for --max-size {math.ceil(needed.needed * 20) / 20:.2f}"
        )
    elif job.recipe.name != methods.AUTO:
        yield f"--recipe auto looks for the smallest file that is {verdict.required}"
    if job.recipe.bits == 4 and job.recipe.name == methods.AUTO:
        yield from _eight_bits(job, verdict.required, measured)
    if verdict.grade in PASSING_GRADES:
        yield f"--require {verdict.grade} takes this package as it is"


def _eight_bits(job: Job, required: str, measured: Measured) -> Iterator[str]:
    """What 8 bits would give, measured; they are never chosen for somebody who asked for 4."""
    from quantize.formats.bitsandbytes import checkpoint

    (recipe,) = attempts(dataclasses.replace(job.recipe, name=methods.AUTO, bits=8, options={}))
    outcome = _tried(job, EIGHT_BITS, recipe, required, measured)
    if isinstance(outcome, Candidate):
        verdict, megabytes = outcome.evidence.verdict, outcome.evidence.sizes.package_bytes / 1e6
        why = "" if verdict.passed else f": {verdict.reasons[0]}"
        yield f"--bits 8 was measured as {verdict.grade}, in {megabytes:.0f} MB{why}"
    else:
        megabytes = checkpoint.plain_bytes(job.checkout, recipe) / 1e6
        yield f"--bits 8 would take at least {megabytes:.0f} MB, and could not be measured: {outcome.reason}"


def _stricter(*grades: str) -> str:
    return min(grades, key=GRADES.index)


def _attempt(outcome: Candidate | Failure, best: Candidate) -> Attempt:
    if isinstance(outcome, Failure):
        return Attempt(outcome.recipe, UNMEASURED, None, None, None, 0, outcome.seconds, False, outcome.reason)
    evidence, scores = outcome.evidence, outcome.evidence.scores
    return Attempt(
        recipe=outcome.recipe,
        grade=evidence.verdict.grade,
        perplexity_ratio=scores.perplexity_ratio if scores else None,
        kld=scores.kld.mean if scores else None,
        same_top=scores.same_top if scores else None,
        weight_bytes=evidence.sizes.package_bytes,
        seconds=outcome.quantized.seconds,
        chosen=outcome is best,
        predicted=outcome.predicted,
    )
