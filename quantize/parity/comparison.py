"""Two loaded models on the same windows and prompts: scores, controls, standard perplexities, generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.evidence import CacheRecord, Check, Control, CorpusRecord, Generation, Look, Scores, StandardPerplexity
from quantize.formats import source_model
from quantize.formats.safetensors import weight_bytes
from quantize.grades import grade_of
from quantize.parity import corpus, generation, scoring, sequential, standard_perplexity, statistics, structure
from quantize.parity.models import Pair
from quantize.parity.reference_cache import ReferenceCache, contents_of
from quantize.progress import Progress
from quantize.records import EvaluationSettings

if TYPE_CHECKING:
    import torch

ARITHMETIC_WINDOWS, ARITHMETIC_TOKENS, CACHED_TOKENS = 2, 256, 48
FLOAT16 = "original in float16"


@dataclass(frozen=True)
class Measurements:
    """What scoring and generating gave; empty when structure already refused the candidate."""

    checks: tuple[Check, ...] = ()
    corpus: CorpusRecord | None = None
    scores: Scores | None = None
    looks: tuple[Look, ...] = ()
    reference_cache: CacheRecord | None = None
    controls: tuple[Control, ...] = ()
    standard_perplexities: tuple[StandardPerplexity, ...] = ()
    generation: Generation | None = None


@dataclass(frozen=True)
class _Comparison:
    """A pair of models, the settings, and the file that stands in for the reference's logits, if there is one."""

    pair: Pair
    settings: EvaluationSettings
    progress: Progress
    cache: ReferenceCache | None

    def reference_logits(self, windows: torch.Tensor) -> scoring.ReferenceLogits:
        """The reference itself, or the cache, after it was extended by those of `windows` that it lacks."""
        if self.cache is None:
            return scoring.LiveReference(self.pair.reference)
        if self.cache.windows < len(windows):
            self.cache.extend(self.pair.placed_reference, windows, self.pair.device)
        return self.cache


def compare(
    pair: Pair,
    text: corpus.Corpus,
    settings: EvaluationSettings,
    progress: Progress,
    controls: Mapping[str, Path],
    reference_cache: Path | None,
) -> Measurements:
    """Score the pair on windows of `text`, generate, and measure whatever else the settings ask for."""
    window = min(settings.window, pair.context)
    windows, record = corpus.windows_of(text, pair.tokenizer, window, settings.max_windows, settings.seed)
    source_model.require_known_tokens(windows, pair.vocabulary, pair.checkout.source.name)
    checks = [_arithmetic_check(pair, windows)] if pair.device == "cpu" else []
    cache = _open_cache(reference_cache, pair, record, settings, progress) if reference_cache else None
    comparison = _Comparison(pair, settings, progress, cache)
    scores, looks = _score(comparison, windows)
    checks.append(_outputs_check(scores))
    if scores is None:
        return Measurements(tuple(checks), record)
    scored = windows[: looks[-1].windows]
    return Measurements(
        tuple(checks),
        dataclasses.replace(record, scored=len(scored)),
        scores,
        looks,
        reference_cache=cache.record(len(scored)) if cache else None,
        generation=_generate(comparison),
        standard_perplexities=_standard_perplexities(comparison, text) if settings.standard_perplexities else (),
        controls=_controls(comparison, controls, scored),
    )


def _arithmetic_check(pair: Pair, windows: torch.Tensor) -> Check:
    """Upcast the candidate to float32 sums, and check that its logits stay those of its own type and kernels."""
    batch, sequence = windows[:ARITHMETIC_WINDOWS, :ARITHMETIC_TOKENS], windows[:1, :CACHED_TOKENS]
    at_once = scoring.KeptLogits.of(pair.candidate, batch, pair.device)
    one_by_one = scoring.KeptLogits.one_by_one(pair.candidate, sequence, pair.device)
    pair.upcast()
    shifts = [
        scoring.score(before, pair.candidate, tokens, pair.device, lambda amount: None).kld.mean()
        for before, tokens in ((at_once, batch), (one_by_one, sequence))
    ]
    return structure.arithmetic_check(*map(float, shifts))


def _outputs_check(scores: Scores | None) -> Check:
    if scores is None:
        return Check("outputs", False, "a model's outputs overflow to NaN or infinity: try another --compute-dtype")
    return Check("outputs", True, "all outputs are finite")


def _open_cache(
    path: Path, pair: Pair, record: CorpusRecord, settings: EvaluationSettings, progress: Progress
) -> ReferenceCache:
    contents = contents_of(pair.checkout.source, record, settings.seed, pair.vocabulary)
    return ReferenceCache(path, contents, lambda: pair.placed_reference.dtype, progress.note)


def _score(comparison: _Comparison, windows: torch.Tensor) -> tuple[Scores | None, tuple[Look, ...]]:
    """Score windows until the verdict is certain, or all of them; no scores where a model's logits hold NaN."""
    pair, settings = comparison.pair, comparison.settings
    count, window = windows.shape
    looks: list[Look] = []
    tokens: scoring.TokenScores | None = None
    with comparison.progress.task(f"scoring up to {count} windows of {window} tokens", count, "windows") as advance:
        for stop in sequential.plan(count, full=settings.full):
            start = looks[-1].windows if looks else 0
            reference = comparison.reference_logits(windows[: stop.windows])
            more = scoring.score(reference, pair.candidate, windows[start : stop.windows], pair.device, advance, start)
            if not more.finite:
                return None, ()
            tokens = tokens + more if tokens else more
            looks.append(sequential.look(tokens, stop, settings.require))
            if looks[-1].certain:
                break
    assert tokens is not None
    return statistics.summarize(tokens, settings.seed, None if settings.full else looks[-1]), tuple(looks)


def _controls(comparison: _Comparison, versions: Mapping[str, Path], windows: torch.Tensor) -> tuple[Control, ...]:
    """Score other versions of the source on the same windows; only float16 is computed in its own type on a CPU."""
    pair, settings = comparison.pair, comparison.settings
    half = {FLOAT16: pair.checkout.folder} if settings.controls else {}
    controls = []
    for name, folder in {**half, **versions}.items():
        reference = comparison.reference_logits(windows)
        model = pair.another(folder, dtype="float16" if name == FLOAT16 else None)
        with comparison.progress.task(f"control {name}", len(windows), "windows") as advance:
            tokens = scoring.score(reference, model, windows, pair.device, advance)
        scores = statistics.summarize(tokens, settings.seed)
        ratio, kld = scores.perplexity_ratio, scores.kld.mean
        grade = grade_of(ratio.low, ratio.high, kld.high)
        controls.append(Control(name, weight_bytes(folder), ratio, kld, scores.same_top, grade))
    return tuple(controls)


def _standard_perplexities(comparison: _Comparison, text: corpus.Corpus) -> tuple[StandardPerplexity, ...]:
    pair = comparison.pair
    readings = standard_perplexity.readings(text, pair.tokenizer, pair.context)
    segments = sum(len(reading.segments) for reading in readings)
    with comparison.progress.task("standard perplexities", 2 * segments, "segments") as advance:
        reference = standard_perplexity.figures(pair.reference, readings, pair.device, advance)
        candidate = standard_perplexity.figures(pair.candidate, readings, pair.device, advance)
    names = ((name, reading.method) for reading in readings for name in reading.names)
    return tuple(
        StandardPerplexity(name, method, *values)
        for (name, method), *values in zip(names, reference, candidate, strict=True)
    )


def _generate(comparison: _Comparison) -> Generation:
    settings = comparison.settings
    with comparison.progress.task("generating side by side", 2 * len(generation.prompts()), "prompts") as advance:
        return generation.compare(comparison.pair, settings.new_tokens, settings.seed, advance)
