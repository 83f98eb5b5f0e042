"""Two loaded models on the same windows and prompts: scores, controls, standard perplexities, generation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import CorpusError
from quantize.evidence import (
    CacheRecord,
    Check,
    Control,
    CorpusRecord,
    Framing,
    Generation,
    LookPlan,
    Pictures,
    Scores,
    StandardPerplexity,
    WindowFigures,
)
from quantize.formats import source_model
from quantize.formats.bitsandbytes import cpu_reading
from quantize.formats.safetensors import weight_bytes
from quantize.grades import GRADES, grade_of
from quantize.parity import (
    answers,
    corpus,
    decoding,
    framing,
    generation,
    scoring,
    sequential,
    standard_perplexity,
    statistics,
    structure,
)
from quantize.parity.models import Pair
from quantize.parity.reference_cache import ReferenceCache, contents_of
from quantize.parity.windows import draw
from quantize.progress import Progress
from quantize.records import EvaluationSettings

if TYPE_CHECKING:
    import torch

ARITHMETIC_WINDOWS, ARITHMETIC_TOKENS, CACHED_TOKENS = 2, 256, 24
ARITHMETIC_LOGITS = 1 << 25
"""That are kept of those windows at most: 128 MB in float32."""
CHAT_FRAMING = "chat framing"
FLOAT16 = "original in float16"
OVERFLOW = "its outputs overflow and are no numbers"


@dataclass(frozen=True)
class Measurements:
    """What scoring and generating gave; empty when structure already refused the candidate."""

    checks: tuple[Check, ...] = ()
    corpus: CorpusRecord | None = None
    scores: Scores | None = None
    look_plan: LookPlan | None = None
    reference_cache: CacheRecord | None = None
    controls: tuple[Control, ...] = ()
    standard_perplexities: tuple[StandardPerplexity, ...] = ()
    generation: Generation | None = None
    chat_framing: Framing | None = None
    pictures: Pictures | None = None
    pictures_left_out: str = ""


@dataclass(frozen=True)
class _Comparison:
    """A pair of models, the settings, and the file that stands in for the reference's logits, if there is one."""

    pair: Pair
    settings: EvaluationSettings
    progress: Progress
    cache: ReferenceCache | None
    _live: dict[str, scoring.LiveReference] = field(default_factory=dict)

    def reference_logits(self, windows: torch.Tensor) -> scoring.ReferenceLogits:
        """The reference itself, or the cache, after it was extended by those of `windows` that it lacks."""
        if self.cache is None:
            return self._once("reference", self.pair.reference, windows)
        if self.cache.windows < len(windows):
            self.cache.extend(self.pair.placed_reference, windows, self.pair.device)
        return self.cache

    def candidate_logits(self, windows: torch.Tensor) -> scoring.LiveReference:
        """The candidate, which where there is a cache may be another object each time."""
        if self.cache is not None:
            return scoring.LiveReference.of(self.pair.candidate, windows, self.pair.device)
        return self._once("candidate", self.pair.candidate, windows)

    def _once(self, name: str, model: Any, windows: torch.Tensor) -> scoring.LiveReference:
        """A model that stays in memory, tried on `windows` the first time only."""
        if name not in self._live:
            self._live[name] = scoring.LiveReference.of(model, windows, self.pair.device)
        return self._live[name]


def compare(
    pair: Pair,
    text: corpus.Corpus,
    settings: EvaluationSettings,
    progress: Progress,
    controls: Mapping[str, Path | str],
    reference_cache: Path | None,
    attempts: int,
) -> Measurements:
    """Score the pair on windows of `text`, generate, and measure whatever else the settings ask for.

    `attempts` are all that are judged on the same windows, and share the error of their verdicts.
    """
    window = min(settings.window, pair.context)
    windows, record = draw(text, pair.tokenizer, window, settings.max_windows, settings.seed)
    source_model.require_known_tokens(windows, pair.vocabulary, pair.checkout.source.name)
    checks = [_arithmetic_check(pair, windows)] if pair.device == "cpu" else []
    cache = _open_cache(reference_cache, pair, record, settings, progress) if reference_cache else None
    comparison = _Comparison(pair, settings, progress, cache)
    plan = sequential.plan(len(windows), settings.require, full=settings.full, attempts=attempts)
    scores = _score(comparison, windows, record.prefix, plan)
    checks.append(_outputs_check(scores))
    if scores is None:
        return Measurements(tuple(checks), record)
    chat_framing = None
    if pair.chat:
        chat_framing, check = _chat_framing(pair, text, settings, progress, reference_cache, attempts)
        checks.append(check)
    scored = windows[: len(scores.window_figures.kld)]
    answered = answers.compare(pair, settings, plan.error, progress)
    generated = _generate(comparison)
    return Measurements(
        (*checks, *answered.checks, *generated.checks),
        dataclasses.replace(record, scored=len(scored)),
        scores,
        plan,
        reference_cache=cache.record(len(scored)) if cache else None,
        generation=generated.record,
        chat_framing=chat_framing,
        pictures=answered.record,
        pictures_left_out=answered.left_out,
        standard_perplexities=_standard_perplexities(comparison, text) if settings.standard_perplexities else (),
        controls=_controls(comparison, controls, scored, record.prefix),
    )


def _arithmetic_check(pair: Pair, windows: torch.Tensor) -> Check:
    """Upcast the candidate to float32 sums, and check that its logits stay those of its own type and kernels."""
    if misread := len(cpu_reading.misread_in(pair.candidate)):
        pair.upcast()
        return structure.misread_check(misread)
    tokens = max(2, min(ARITHMETIC_TOKENS, ARITHMETIC_LOGITS // (ARITHMETIC_WINDOWS * pair.vocabulary)))
    batch, sequence = windows[:ARITHMETIC_WINDOWS, :tokens], windows[:1, :CACHED_TOKENS].to(pair.device)
    at_once = scoring.KeptLogits.of(pair.candidate, batch, pair.device)
    one_by_one, dtype = _read_one_by_one(pair.candidate, sequence), pair.candidate_dtype
    pair.upcast()
    shift = scoring.score(at_once, pair.candidate, batch, pair.device, lambda amount: None).kld.mean()
    again = _read_one_by_one(pair.candidate, sequence)
    alone = None if one_by_one is None or again is None else scoring.mean_kld(one_by_one, again)
    check = structure.arithmetic_check(float(shift), alone)
    return check if check.passed else structure.arithmetic_check(float(shift), alone, _half_noise(pair, batch, dtype))


def _half_noise(pair: Pair, windows: torch.Tensor, dtype: str) -> float:
    """Mean KLD (nats) of the original in the type `dtype` of the package from the original in float32."""
    exact = scoring.KeptLogits.of(pair.reference, windows, pair.device)
    half = pair.another(pair.checkout.folder, dtype=dtype)
    noise = float(scoring.score(exact, half, windows, pair.device, lambda amount: None).kld.mean())
    return noise if math.isfinite(noise) else 0.0


def _read_one_by_one(model: Any, sequence: torch.Tensor) -> torch.Tensor | None:
    """Logits [tokens, vocabulary] of `sequence` [1, length] after its first tokens, as `generate` reads, if it can."""
    first = sequence[:, : decoding.PROBE_TOKENS]
    try:
        return next(decoding.Decoder().read(model, [first], [sequence[0, first.shape[1] :].tolist()]))
    except decoding.CannotGenerate:
        return None


def _chat_framing(
    pair: Pair,
    text: corpus.Corpus,
    settings: EvaluationSettings,
    progress: Progress,
    reference_cache: Path | None,
    attempts: int,
) -> tuple[Framing | None, Check]:
    """Score `text` once more as answers in the chat template; where it has no room there, the check says so."""
    frame = tuple(framing.turn(pair.tokenizer, framing.REQUEST))
    window = min(settings.window, pair.context)
    try:
        windows, record = draw(text, pair.tokenizer, window, settings.max_windows, settings.seed, frame)
    except CorpusError as error:
        return None, Check(CHAT_FRAMING, True, f"not scored: {error}")
    file = reference_cache and reference_cache.with_name(f"{reference_cache.name}.chat")
    cache = _open_cache(file, pair, record, settings, progress) if file else None
    plan = sequential.plan(len(windows), settings.require, full=settings.full, attempts=attempts)
    comparison = _Comparison(pair, settings, progress, cache)
    scores = _score(comparison, windows, record.prefix, plan, " in the chat template")
    if scores is None:
        return None, Check(CHAT_FRAMING, False, "a model's outputs overflow to NaN or infinity in the chat template")
    scored = dataclasses.replace(record, scored=len(scores.window_figures.kld))
    detail = f"{scored.scored} windows scored as answers, behind {record.prefix} tokens of the chat template"
    return Framing(scored, scores, plan), Check(CHAT_FRAMING, True, detail)


def _outputs_check(scores: Scores | None) -> Check:
    if scores is None:
        return Check("outputs", False, "a model's outputs overflow to NaN or infinity: try another --compute-dtype")
    return Check("outputs", True, "all outputs are finite")


def _open_cache(
    path: Path, pair: Pair, record: CorpusRecord, settings: EvaluationSettings, progress: Progress
) -> ReferenceCache:
    contents = contents_of(pair.checkout.source, record, settings.seed, pair.vocabulary)
    return ReferenceCache(path, contents, lambda: pair.placed_reference.dtype, progress.note)


def _score(
    comparison: _Comparison, windows: torch.Tensor, prefix: int, plan: LookPlan, where: str = ""
) -> Scores | None:
    """Score windows until the verdict is certain, or all of them; no scores where a model's logits hold NaN."""
    pair, settings = comparison.pair, comparison.settings
    count, window = windows.shape
    tokens: scoring.TokenScores | None = None
    figures, start = WindowFigures(), 0
    title = f"scoring up to {count} windows of {window} tokens{where}"
    with comparison.progress.task(title, count, "windows") as advance:
        for stop in sequential.stops(plan):
            reference = comparison.reference_logits(windows[: stop.windows])
            candidate = comparison.candidate_logits(windows)
            more = scoring.score(reference, candidate, windows[start : stop.windows], pair.device, advance, start)
            if not more.finite:
                return None
            more = more.without_prefix(prefix)
            tokens = tokens + more if tokens else more
            figures, start = sequential.figures_of(tokens), stop.windows
            if sequential.looks(figures, plan)[-1].certain:
                break
    assert tokens is not None
    return dataclasses.replace(statistics.summarize(tokens, settings.seed, plan.error), window_figures=figures)


def _controls(
    comparison: _Comparison, versions: Mapping[str, Path | str], windows: torch.Tensor, prefix: int
) -> tuple[Control, ...]:
    """Score other versions of the source on the same windows; only float16 is computed in its own type on a CPU."""
    pair, settings = comparison.pair, comparison.settings
    half = {FLOAT16: pair.checkout.folder} if settings.controls else {}
    controls = []
    for name, folder in {**half, **versions}.items():
        if isinstance(folder, str):
            controls.append(Control(name, 0, None, None, None, GRADES[-1], folder))
            continue
        reference = comparison.reference_logits(windows)
        model = pair.another(folder, dtype="float16" if name == FLOAT16 else None)
        with comparison.progress.task(f"control {name}", len(windows), "windows") as advance:
            tokens = scoring.score(reference, model, windows, pair.device, advance)
        controls.append(_control(name, folder, tokens.without_prefix(prefix), settings.seed))
    return tuple(controls)


def _control(name: str, folder: Path, tokens: scoring.TokenScores, seed: int) -> Control:
    if not tokens.finite:
        return Control(name, weight_bytes(folder), None, None, None, GRADES[-1], OVERFLOW)
    scores = statistics.summarize(tokens, seed)
    ratio, kld = scores.perplexity_ratio, scores.kld.mean
    grade = grade_of(ratio.low, ratio.high, kld.high)
    return Control(name, weight_bytes(folder), ratio, kld, scores.same_top, grade)


def _standard_perplexities(comparison: _Comparison, text: corpus.Corpus) -> tuple[StandardPerplexity, ...]:
    pair = comparison.pair
    readings = standard_perplexity.readings(text, pair.tokenizer, pair.context)
    segments = sum(len(reading.segments) for reading in readings)
    with comparison.progress.task("standard perplexities", 2 * segments, "segments") as advance:
        reference = standard_perplexity.figures(pair.reference, readings, pair.device, advance)
        candidate = standard_perplexity.figures(pair.candidate, readings, pair.device, advance)
    names = ((name, reading.method) for reading in readings for name in reading.names)
    return tuple(
        StandardPerplexity(name, method, *(value if math.isfinite(value) else None for value in values))
        for (name, method), *values in zip(names, reference, candidate, strict=True)
    )


def _generate(comparison: _Comparison) -> generation.Generated:
    pair, settings = comparison.pair, comparison.settings
    count = len(generation.prompts(pair.chat))
    with comparison.progress.task("generating side by side", 2 * count, "prompts") as advance:
        return generation.compare(pair, settings.new_tokens, settings.seed, advance)
