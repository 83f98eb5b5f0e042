"""Recorded evidence is judged again: what follows from its figures has to be what it says."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Iterator
from typing import Any

from quantize.evidence import Attempt, Control, Estimate, Evidence, Generation, Scores
from quantize.formats.bitsandbytes.checks import STATE_CHECK, weight_check
from quantize.grades import grade_of
from quantize.parity import sequential
from quantize.parity.answers import CHECK as PICTURES_CHECK
from quantize.parity.answers import longest_answer, number_of
from quantize.parity.corpus import BUILTIN, WIKITEXT, WIKITEXT_REPO, load
from quantize.parity.generation import share_identical
from quantize.parity.generation_checks import DECODING, ENDS, GENERATION, REPETITION
from quantize.parity.verdict import judged
from quantize.records import EvaluationSettings, Recipe

TOLERANCE = 1e-6
"""Relative; figures of windows are recorded with nine digits."""
ALWAYS = (
    *("config", "finite", "loads", "modules", "ties", "size", "weights", "outputs"),
    *("tokenizer", "special tokens", "added tokens", "chat template", "eos tokens"),
    *("generation settings", "processor files", GENERATION),
)
FOUR_BIT, ON_CPU, OF_TEXTS = (STATE_CHECK,), ("arithmetic",), (DECODING, REPETITION, ENDS)
"""Names of the checks that a measured package has, and of those that it has at 4 bits, on a CPU, or with texts."""


def contradictions(evidence: Evidence, recipe: Recipe, settings: EvaluationSettings) -> Iterator[str]:
    """Where evidence of a package that passed contradicts itself or what was asked for, one sentence each."""
    yield from _checks(evidence, recipe)
    yield from _corpus(evidence, settings)
    yield from _verdict(evidence, settings)
    if evidence.scores is not None:
        yield from _scores(evidence.scores, evidence)
    yield from _pictures(evidence, settings)
    yield from _controls(evidence, settings)
    if bool(evidence.standard_perplexities) != settings.standard_perplexities:
        yield "standard perplexities are there, or are not, against what was asked for"
    if evidence.generation is not None:
        yield from _generation(evidence.generation, settings)
    yield from _attempts(evidence, recipe)


def _checks(evidence: Evidence, recipe: Recipe) -> Iterator[str]:
    names = [check.name for check in evidence.checks]
    needed = [
        *ALWAYS,
        *(FOUR_BIT if recipe.bits == 4 else ()),
        *(ON_CPU if evidence.environment.device == "cpu" else ()),
        *(OF_TEXTS if evidence.generation is not None else ()),
        *((PICTURES_CHECK,) if evidence.pictures is not None else ()),
    ]
    for name in needed:
        if name not in names:
            yield f"the check {name} is missing"
    recorded = [check.passed for check in evidence.checks if check.name == "weights"]
    if recorded != [weight_check(evidence.weight_errors, recipe.bits).passed]:
        yield "the check weights does not follow from the recorded errors"


def _corpus(evidence: Evidence, settings: EvaluationSettings) -> Iterator[str]:
    text, plan, scores = evidence.corpus, evidence.look_plan, evidence.scores
    if text is None or scores is None or plan is None or not scores.window_figures.kld:
        yield "it has no figures of single windows"
        return
    if text.scored != len(scores.window_figures.kld) or text.scored != len(scores.window_figures.nll_difference):
        yield f"{text.scored} windows were scored, and {len(scores.window_figures.kld)} have figures"
    if not text.scored <= plan.windows <= min(settings.max_windows, text.windows) or text.window > settings.window:
        yield f"{text.scored} of {text.windows} windows of {text.window} tokens are not what was asked for"
    if (
        plan.full != settings.full
        or not 0 < plan.error <= sequential.ERROR / max(1, len(evidence.attempts)) + TOLERANCE
    ):
        yield "it was scored by another plan than was asked for"
    if text.windows != text.tokens // (text.window - text.prefix):
        yield f"{text.tokens} tokens do not make {text.windows} windows of {text.window}"
    expected = {BUILTIN: BUILTIN, WIKITEXT: WIKITEXT_REPO}.get(settings.corpus, settings.corpus.removeprefix("./"))
    if text.name.split("@")[0] != expected or (text.dataset is not None) != (settings.corpus == WIKITEXT):
        yield f"it was measured on {text.name}, and {settings.corpus} was asked for"
    same_python = evidence.environment.python.rpartition(".")[0] == platform.python_version().rpartition(".")[0]
    if settings.corpus == BUILTIN and same_python and text.sha256 != load(BUILTIN).sha256:
        yield "its corpus is not the built-in one"


def _verdict(evidence: Evidence, settings: EvaluationSettings) -> Iterator[str]:
    if evidence.verdict.required != settings.require:
        yield f"it is judged by {evidence.verdict.required}, and {settings.require} was asked for"
    again = judged(evidence, settings.require)
    for name in ("scores", "looks", "chat_framing", "pictures", "verdict"):
        if not _same(getattr(again, name), getattr(evidence, name)):
            yield f"{name} do not follow from the recorded figures and checks"


def _scores(scores: Scores, evidence: Evidence) -> Iterator[str]:
    ratio = scores.candidate_perplexity.value / scores.reference_perplexity.value
    if not math.isclose(ratio, scores.perplexity_ratio.value, rel_tol=TOLERANCE):
        yield "the perplexity ratio is not that of the two perplexities"
    for name in ("reference_perplexity", "candidate_perplexity", "perplexity_ratio", "same_top", "delta_p_rms"):
        if not _is_ordered(getattr(scores, name)):
            yield f"the interval of {name} is none"
    for name, distribution in (("kld", scores.kld), ("delta_p", scores.delta_p)):
        levels = sorted(distribution.percentiles.items(), key=lambda item: float(item[0].removeprefix("p")))
        values = [distribution.minimum, *(value for _, value in levels), distribution.maximum]
        if values != sorted(values) or not values[0] <= distribution.mean.value <= values[-1]:
            yield f"the percentiles of {name} are not in order"
    if not 0 <= scores.same_top.low <= scores.same_top.high <= 1:
        yield "the share of equal most likely tokens is no share"
    if evidence.corpus is not None and sum(scores.kld_histogram.counts) != evidence.corpus.scored_tokens:
        yield "the histogram does not count the tokens of all windows"


def _pictures(evidence: Evidence, settings: EvaluationSettings) -> Iterator[str]:
    """Whether as many pictures were asked about as belong to these settings, or a reason says why none."""
    pictures = evidence.pictures
    if evidence.reads_pictures != (pictures is not None or bool(evidence.pictures_left_out)):
        yield "pictures were measured, or were not, against what the model reads"
    if pictures is None:
        return
    figures, due = pictures.figures, number_of(settings)
    if {len(getattr(figures, item.name)) for item in dataclasses.fields(figures)} != {due}:
        yield f"{pictures.count} pictures have figures, and {due} are asked about"
    if (pictures.seed, pictures.new_tokens) != (settings.seed, longest_answer(settings)):
        yield "pictures were drawn, or answers written, with other settings than were asked for"
    if not all(0 < tokens <= pictures.new_tokens for tokens in figures.tokens) or min(figures.kld) < 0:
        yield "an answer about a picture has figures that cannot be"
    if not all(0 <= share <= 1 for share in figures.same_top):
        yield "a share of equal most likely tokens of an answer is none"


def _controls(evidence: Evidence, settings: EvaluationSettings) -> Iterator[str]:
    if settings.controls and not evidence.controls:
        yield "controls were asked for, and are missing"
    for control in evidence.controls:
        if not _has_its_grade(control):
            yield f"the control {control.name} has another grade than its figures"


def _has_its_grade(control: Control) -> bool:
    ratio, kld = control.perplexity_ratio, control.kld
    if ratio is None or kld is None:  # one whose figures are no numbers
        return True
    return control.grade == grade_of(ratio.low, ratio.high, kld.high)


def _generation(generation: Generation, settings: EvaluationSettings) -> Iterator[str]:
    if (generation.new_tokens, generation.seed) != (settings.new_tokens, settings.seed):
        yield "texts were generated with other settings than were asked for"
    if not generation.samples:
        yield "no generated texts are recorded"
    for length, share in ((16, generation.identical_at_16), (32, generation.identical_at_32)):
        if not math.isclose(share, share_identical(generation.samples, length), abs_tol=TOLERANCE):
            yield f"the share of texts that are identical up to token {length} is not that of the samples"
    shares = (
        generation.prefill_agreement,
        generation.cached_agreement,
        generation.reference_repetition,
        generation.candidate_repetition,
    )
    if not all(0 <= share <= 1 for share in shares):
        yield "a share of the generated texts is none"
    for sample in generation.samples:
        if sample.first_divergence is None and sample.reference_greedy != sample.candidate_greedy:
            yield f"two different texts after {sample.prompt!r} are said to be identical"


def _attempts(evidence: Evidence, recipe: Recipe) -> Iterator[str]:
    if not evidence.attempts:
        return
    chosen = [attempt for attempt in evidence.attempts if attempt.chosen]
    if len(chosen) != 1 or not _is_of(chosen[0], evidence, recipe):
        yield "the attempt that was chosen is not the one in this package"


def _is_of(attempt: Attempt, evidence: Evidence, recipe: Recipe) -> bool:
    return attempt.recipe == recipe and attempt.weight_bytes == evidence.sizes.package_bytes


def _is_ordered(estimate: Estimate) -> bool:
    return 0 <= estimate.low <= estimate.high and estimate.value > 0


def _same(one: Any, other: Any) -> bool:
    """Whether two records say the same; numbers may differ in digits that are noise of the arithmetic."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=1e-12)
    if dataclasses.is_dataclass(one) and type(one) is type(other):
        return all(_same(getattr(one, item.name), getattr(other, item.name)) for item in dataclasses.fields(one))
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
