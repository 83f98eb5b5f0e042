"""The whole comparison of a finished folder with its source, from structure to verdict."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from quantize import devices
from quantize.errors import CorruptModel, DeviceError
from quantize.evidence import (
    CacheRecord,
    Check,
    Control,
    CorpusRecord,
    Evidence,
    Generation,
    Look,
    Scores,
    Sizes,
    StandardPerplexity,
)
from quantize.formats import ties
from quantize.formats.bitsandbytes import checks as format_checks
from quantize.formats.bitsandbytes import loading
from quantize.formats.bitsandbytes.config import ExpectedConfig
from quantize.formats.safetensors import recorded_weight_bytes, weight_bytes
from quantize.grades import grade_of
from quantize.parity import corpus, generation, scoring, sequential, standard_perplexity, statistics, structure, verdict
from quantize.parity.models import Pair, load_tokenizer
from quantize.parity.reference_cache import ReferenceCache, contents_of
from quantize.progress import Progress
from quantize.records import Checkout, EvaluationSettings

if TYPE_CHECKING:
    import torch

ARITHMETIC_WINDOWS, ARITHMETIC_TOKENS, CACHED_TOKENS = 2, 256, 48
FLOAT16 = "float16 source"


@dataclasses.dataclass(frozen=True)
class _Structure:
    """What was seen before scoring: `parameters` counts the source's, ties once."""

    checks: tuple[Check, ...]
    weight_errors: dict[str, float]
    parameters: int


@dataclasses.dataclass(frozen=True)
class _Measured:
    """What scoring and generating found; empty when structure already refused the candidate."""

    checks: tuple[Check, ...] = ()
    corpus: CorpusRecord | None = None
    scores: Scores | None = None
    looks: tuple[Look, ...] = ()
    reference_cache: CacheRecord | None = None
    controls: tuple[Control, ...] = ()
    standard_perplexities: tuple[StandardPerplexity, ...] = ()
    generation: Generation | None = None


def check_inputs(checkout: Checkout, settings: EvaluationSettings) -> None:
    """Raise CorpusError or CorruptModel now, rather than after hours, when nothing could be measured with these."""
    corpus.load(settings.corpus)
    source_tokenizer(checkout)


def source_tokenizer(checkout: Checkout) -> Any:
    try:
        return load_tokenizer(checkout.folder, checkout.source.remote_code)
    except Exception as error:  # tokenizers raises bare ones
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CorruptModel(f"the tokenizer of {checkout.source.name} does not load: {reason}") from error


def measure(
    checkout: Checkout,
    candidate: Path,
    settings: EvaluationSettings,
    device: str,
    progress: Progress,
    promised: ExpectedConfig | None = None,
    controls: Mapping[str, Path] = MappingProxyType({}),
    reference_cache: Path | None = None,
) -> Evidence:
    """Compare the checkpoint in `candidate` with its source, both loaded from disk onto `device`.

    `promised` is what the recipe meant; without it the checkpoint's own config is taken at its word. `controls` are
    folders of other quantized versions, which are scored on the same windows as well; with `settings.controls` the
    float16 source is one of them.
    With a `reference_cache` the models are loaded one at a time, and the reference's answers are kept in that file.
    Raises CorpusError or DeviceError; a bad candidate is no error but a verdict.
    """
    started = time.monotonic()
    text = corpus.load(settings.corpus)
    expected = promised or ExpectedConfig.read_if_possible(candidate)
    trust = checkout.source.remote_code and structure.same_code(checkout.folder, candidate)
    tokenizer = source_tokenizer(checkout)
    alone = reference_cache is not None
    with Pair(checkout, candidate, device, trust=trust, tokenizer=tokenizer, alone=alone) as pair:
        examined = _examine(pair, expected)
        measured = _Measured()
        if all(check.passed for check in examined.checks):
            measured = _compare(pair, text, settings, controls, reference_cache, progress)
    checks = (*examined.checks, *measured.checks)
    return Evidence(
        reference_dtype=pair.reference_dtype,
        reference_devices=pair.reference_devices,
        candidate_dtype=pair.candidate_dtype,
        corpus=measured.corpus,
        checks=checks,
        weight_errors=examined.weight_errors,
        scores=measured.scores,
        looks=measured.looks,
        reference_cache=measured.reference_cache,
        controls=measured.controls,
        standard_perplexities=measured.standard_perplexities,
        generation=measured.generation,
        verdict=verdict.judge(checks, measured.scores, settings.require),
        sizes=_sizes(checkout, candidate, examined.parameters),
        environment=devices.describe(device),
        seconds=round(time.monotonic() - started, 3),
    )


def unmeasured(
    checkout: Checkout, candidate: Path, settings: EvaluationSettings, device: str, promised: ExpectedConfig
) -> Evidence:
    """What can be said about the checkpoint in `candidate` without loading it or its source: files and tokenizer."""
    started = time.monotonic()
    checks = format_checks.check_files(candidate, promised)
    trust = checkout.source.remote_code and structure.same_code(checkout.folder, candidate)
    checks.append(structure.tokenizer_check(source_tokenizer(checkout), candidate, trust))
    return Evidence(
        reference_dtype="none",
        reference_devices=(),
        candidate_dtype="none",
        corpus=None,
        checks=tuple(checks),
        weight_errors={},
        scores=None,
        looks=(),
        reference_cache=None,
        controls=(),
        standard_perplexities=(),
        generation=None,
        verdict=verdict.unmeasured(checks, settings.require),
        sizes=_sizes(checkout, candidate, checkout.source.parameters),
        environment=devices.describe(device),
        seconds=round(time.monotonic() - started, 3),
    )


def _examine(pair: Pair, expected: ExpectedConfig | None) -> _Structure:
    """Everything that can be said before a window is read."""
    checks = format_checks.check_files(pair.folder, expected)
    loads = _loads_check(pair)
    checks.append(loads)
    if not loads.passed or expected is None:
        return _Structure(tuple(checks), {}, pair.checkout.source.parameters)
    with pair.weights_beside_candidate() as (reference, candidate):
        checks += structure.check_models(reference, candidate, pair.folder, expected)
        checks.append(structure.tokenizer_check(pair.tokenizer, pair.folder, pair.trust))
        errors = loading.weight_errors(reference, candidate)
        checks.append(format_checks.weight_check(errors, expected.bits))
        return _Structure(tuple(checks), errors, ties.distinct_count(reference))


def _loads_check(pair: Pair) -> Check:
    try:
        _ = pair.candidate
    except DeviceError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a foreign checkpoint does to from_pretrained is its verdict
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Check("loads", False, f"stock transformers cannot load it: {reason}")
    return Check("loads", True, "stock transformers loads it")


def _compare(
    pair: Pair,
    text: corpus.Corpus,
    settings: EvaluationSettings,
    controls: Mapping[str, Path],
    reference_cache: Path | None,
    progress: Progress,
) -> _Measured:
    """Score, generate, and whatever else was asked for."""
    window = min(settings.window, pair.context)
    windows, record = corpus.windows_of(text, pair.tokenizer, window, settings.max_windows, settings.seed)
    checks = [_arithmetic_check(pair, windows)] if pair.device == "cpu" else []
    kept = _opened(reference_cache, pair, record, settings) if reference_cache else None
    scores, looks = _score(pair, kept, windows, settings, progress)
    checks.append(_numbers_check(scores))
    if scores is None:
        return _Measured(tuple(checks), record)
    scored = windows[: looks[-1].windows]
    return _Measured(
        tuple(checks),
        dataclasses.replace(record, scored=len(scored)),
        scores,
        looks,
        reference_cache=kept.record(len(scored)) if kept else None,
        generation=_generate(pair, settings, progress),
        standard_perplexities=_standard_perplexities(pair, text, progress) if settings.standard_perplexities else (),
        controls=_controls(pair, kept, controls, scored, settings, progress),
    )


def _arithmetic_check(pair: Pair, windows: torch.Tensor) -> Check:
    """Switch the candidate to float32 sums, and check that they say what its own type and kernels said before."""
    few, one = windows[:ARITHMETIC_WINDOWS, :ARITHMETIC_TOKENS], windows[:1, :CACHED_TOKENS]
    at_once = scoring.KeptLogits.of(pair.candidate, few, pair.device)
    one_by_one = scoring.KeptLogits.one_by_one(pair.candidate, one, pair.device)
    pair.upcast()
    shifts = [
        scoring.score(before, pair.candidate, tokens, pair.device, lambda amount: None).kld.mean()
        for before, tokens in ((at_once, few), (one_by_one, one))
    ]
    return structure.arithmetic_check(*map(float, shifts))


def _numbers_check(scores: Scores | None) -> Check:
    if scores is None:
        return Check("outputs", False, "a model's outputs overflow to NaN or infinity: try another --compute-dtype")
    return Check("outputs", True, "all outputs are finite")


def _opened(path: Path, pair: Pair, record: CorpusRecord, settings: EvaluationSettings) -> ReferenceCache:
    contents = contents_of(pair.checkout.source, record, settings.seed, pair.vocabulary)
    return ReferenceCache(path, contents, lambda: pair.placed_reference.dtype)


def _score(
    pair: Pair, kept: ReferenceCache | None, windows: torch.Tensor, settings: EvaluationSettings, progress: Progress
) -> tuple[Scores | None, tuple[Look, ...]]:
    """Score windows until the verdict is certain, or all of them; no scores where a model answers NaN."""
    count, window = windows.shape
    looks: list[Look] = []
    tokens: scoring.TokenScores | None = None
    with progress.task(f"scoring up to {count} windows of {window} tokens", count, "windows") as advance:
        for stop in sequential.plan(count, full=settings.full):
            seen = looks[-1].windows if looks else 0
            reference = _answers(pair, kept, windows[: stop.windows])
            more = scoring.score(reference, pair.candidate, windows[seen : stop.windows], pair.device, advance, seen)
            if not more.finite:
                return None, ()
            tokens = tokens + more if tokens else more
            looks.append(sequential.look(tokens, stop, settings.require))
            if looks[-1].certain:
                break
    assert tokens is not None
    return statistics.summarize(tokens, settings.seed, None if settings.full else looks[-1]), tuple(looks)


def _answers(pair: Pair, kept: ReferenceCache | None, windows: torch.Tensor) -> scoring.ReferenceLogits:
    """What answers for the reference on `windows`: itself, or the file, after it has answered what is not there."""
    if kept is None:
        return scoring.LiveReference(pair.reference)
    if kept.windows < len(windows):
        kept.extend(pair.placed_reference, windows, pair.device)
    return kept


def _controls(
    pair: Pair,
    kept: ReferenceCache | None,
    versions: Mapping[str, Path],
    windows: torch.Tensor,
    settings: EvaluationSettings,
    progress: Progress,
) -> tuple[Control, ...]:
    """Score other versions of the source on the same windows; only float16 is computed in its own type on a CPU."""
    found = []
    half = {FLOAT16: pair.checkout.folder} if settings.controls else {}
    for name, folder in {**half, **versions}.items():
        reference = _answers(pair, kept, windows)
        model = pair.another(folder, dtype="float16" if name == FLOAT16 else None)
        with progress.task(f"control {name}", len(windows), "windows") as advance:
            tokens = scoring.score(reference, model, windows, pair.device, advance)
        scores = statistics.summarize(tokens, settings.seed)
        ratio, kld = scores.perplexity_ratio, scores.kld.mean
        grade = grade_of(ratio.low, ratio.high, kld.high)
        found.append(Control(name, weight_bytes(folder), ratio, kld, scores.same_top, grade))
    return tuple(found)


def _standard_perplexities(pair: Pair, text: corpus.Corpus, progress: Progress) -> tuple[StandardPerplexity, ...]:
    readings = standard_perplexity.readings(text, pair.tokenizer, pair.context)
    segments = sum(len(reading.segments) for reading in readings)
    with progress.task("published perplexity standard_perplexities", 2 * segments, "segments") as advance:
        reference = standard_perplexity.figures(pair.reference, readings, pair.device, advance)
        candidate = standard_perplexity.figures(pair.candidate, readings, pair.device, advance)
    names = ((name, reading.method) for reading in readings for name in reading.names)
    return tuple(
        StandardPerplexity(name, method, one, other)
        for (name, method), one, other in zip(names, reference, candidate, strict=True)
    )


def _generate(pair: Pair, settings: EvaluationSettings, progress: Progress) -> Generation:
    with progress.task("generating side by side", 2 * len(generation.prompts()), "prompts") as advance:
        return generation.compare(pair, settings.new_tokens, settings.seed, advance)


def _sizes(checkout: Checkout, candidate: Path, parameters: int) -> Sizes:
    source_bytes = recorded_weight_bytes(checkout.source.files)
    package_bytes = weight_bytes(candidate)
    return Sizes(source_bytes, package_bytes, parameters, round(8 * package_bytes / parameters, 4))
