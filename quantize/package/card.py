"""Turns a package's records into the flat facts that its card is rendered from."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from model_card import (
    CardAttempt,
    CardCalibration,
    CardControl,
    CardDataset,
    CardFacts,
    CardPublisher,
    CardSample,
    CardStandardPerplexity,
    Interval,
)
from quantize import hub, methods
from quantize.evidence import Attempt, Estimate, Evidence
from quantize.files import FIGURES, PROCESSOR_FILES
from quantize.formats import experts
from quantize.formats.source_model import grouped
from quantize.grades import LIMITS, UNMEASURED
from quantize.options import Option
from quantize.package.readers import least_versions
from quantize.records import CalibrationText, EvaluationSettings, Provenance, Recipe, Source

MANY_LAYERS = 4
"""From so many on, modules of equal place in the layers are named together."""


def facts(
    provenance: Provenance,
    evidence: Evidence,
    source_card: str | None,
    figures: tuple[str, ...],
) -> CardFacts:
    """The facts of a package's card, from its records and its source's own card."""
    source, quantized, recipe = provenance.source, provenance.quantized, provenance.recipe
    scores, generated, text = evidence.scores, evidence.generation, evidence.corpus
    ratio_limit, kld_limit = LIMITS[evidence.verdict.required]
    framing, pictures = evidence.chat_framing, evidence.pictures
    samples = generated.samples if generated else ()
    publisher, dataset = provenance.publisher, text.dataset if text else None
    return CardFacts(
        publisher=CardPublisher(publisher.name, tuple(publisher.links.items())) if publisher else None,
        package_name=provenance.name,
        key=provenance.key,
        source_name=source.name,
        source_repo_id=source.repo_id,
        source_commit=source.commit,
        source_card=source_card,
        hub=hub.endpoint(),
        architecture=source.architecture,
        parameters=evidence.sizes.parameters,
        recipe=recipe.name,
        method_description=methods.get(recipe.name).describe(recipe, quantized),
        calibration=_calibration(quantized.calibration_text),
        attempts=tuple(_attempt(attempt) for attempt in evidence.attempts),
        bits=recipe.bits,
        quant_type=recipe.quant_type,
        double_quant=recipe.double_quant,
        dtype=quantized.dtype,
        quantized_modules=len(quantized.modules),
        block_32_modules=len(quantized.block_32_modules),
        half_precision_modules=len(quantized.half_precision_modules),
        kept_modules=_summarized(quantized.kept_modules),
        quantized_share=evidence.coverage.quantized if evidence.coverage else None,
        kept_shares=tuple(evidence.coverage.kept.items()) if evidence.coverage else (),
        copied_files=_copied(provenance),
        unused_tensors=tuple(grouped(evidence.unused_tensors).items()),
        source_bytes=evidence.sizes.source_bytes,
        package_bytes=evidence.sizes.package_bytes,
        bits_per_parameter=evidence.sizes.bits_per_parameter,
        grade=evidence.verdict.grade,
        required_grade=evidence.verdict.required,
        passed=evidence.verdict.passed,
        reasons=evidence.verdict.reasons,
        advice=evidence.advice,
        corpus=text.name if text else None,
        corpus_dataset=CardDataset(**dataclasses.asdict(dataset)) if dataset else None,
        corpus_sha256=text.sha256 if text else None,
        scored_tokens=text.scored_tokens if text else 0,
        window=text.window if text else 0,
        windows=text.scored if text else 0,
        corpus_windows=text.windows if text else 0,
        confidence=evidence.confidence,
        missed_share=evidence.missed_share,
        optional_stopping=evidence.optional_stopping,
        stopped_early=evidence.stopped_early,
        reference_dtype=evidence.reference_dtype,
        reference_perplexity=_interval(scores.reference_perplexity) if scores else None,
        candidate_perplexity=_interval(scores.candidate_perplexity) if scores else None,
        perplexity_ratio=_interval(scores.perplexity_ratio) if scores else None,
        kld=_interval(scores.kld.mean) if scores else None,
        kld_median=scores.kld.percentiles["p50"] if scores else None,
        kld_p99=scores.kld.percentiles["p99"] if scores else None,
        same_top=_interval(scores.same_top) if scores else None,
        delta_p_rms=_interval(scores.delta_p_rms) if scores else None,
        controls=tuple(
            CardControl(
                control.name,
                control.weight_bytes,
                _interval(control.perplexity_ratio),
                _interval(control.kld),
                _interval(control.same_top),
                control.grade,
                control.problem,
            )
            for control in evidence.controls
        ),
        standard_perplexities=tuple(
            CardStandardPerplexity(figure.name, figure.method, figure.reference, figure.candidate)
            for figure in evidence.standard_perplexities
        ),
        ratio_limit=ratio_limit,
        kld_limit=kld_limit,
        identical_at_16=generated.identical_at_16 if generated else None,
        identical_at_32=generated.identical_at_32 if generated else None,
        prefill_agreement=generated.prefill_agreement if generated else None,
        cached_agreement=generated.cached_agreement if generated else None,
        chat=evidence.chat,
        chat_windows=framing.corpus.scored if framing else 0,
        chat_ratio=_interval(framing.scores.perplexity_ratio) if framing else None,
        chat_kld=_interval(framing.scores.kld.mean) if framing else None,
        reads_pictures=evidence.reads_pictures,
        processor=any(file.path in PROCESSOR_FILES for file in provenance.files),
        picture_chat=pictures.chat if pictures else evidence.chat,
        pictures=pictures.count if pictures else 0,
        pictures_sha256=pictures.sha256 if pictures else "",
        picture_tokens=sum(pictures.figures.tokens) if pictures else 0,
        picture_kld=_interval(pictures.kld) if pictures else None,
        picture_same_top=_interval(pictures.same_top) if pictures else None,
        pictures_left_out=evidence.pictures_left_out,
        misread_on_cpu=len(evidence.misread_on_cpu),
        new_tokens=generated.new_tokens if generated else 0,
        seed=provenance.settings.seed,
        greedy_samples=tuple(
            CardSample(sample.prompt, sample.reference_greedy, sample.candidate_greedy, sample.first_divergence)
            for sample in samples
        ),
        sampled_samples=tuple(
            CardSample(sample.prompt, sample.reference_sampled, sample.candidate_sampled, None) for sample in samples
        ),
        figures=figures,
        device_name=evidence.environment.device_name,
        versions=evidence.environment.versions,
        least_versions=least_versions(
            source, quantized, evidence.environment.versions, own_code=bool(_own_code(provenance))
        ),
        remote_code=source.remote_code,
        code_left_out=source.code_left_out,
        own_code=_own_code(provenance),
        tool_version=provenance.tool_version,
        created=provenance.created,
        command=command(source, recipe, provenance.settings, measured=evidence.verdict.grade != UNMEASURED),
    )


def command(source: Source, recipe: Recipe, settings: EvaluationSettings, *, measured: bool = True) -> str:
    """The one command that makes this package again: every option that differs from its default."""
    values = {item.name: getattr(recipe, item.name) for item in dataclasses.fields(recipe)}
    values |= {**recipe.options, **dataclasses.asdict(settings)}
    values |= {"revision": source.commit, "trust_remote_code": source.remote_code, "unverified": not measured}
    words = _changed(methods.all_options(), values, always=("bits", "name"))
    return shlex.join(["quantize", "run", source.repo_id or f"./{source.name}", *words])


def _changed(options: Iterable[Option], values: Mapping[str, Any], always: Collection[str] = ()) -> list[str]:
    """The words of the options that a card repeats: those that are not at their defaults, and those in `always`."""
    return [
        word
        for option in options
        if option.on_card and option.field in values
        if option.field in always or values[option.field] != option.default
        for word in option.words(values[option.field])
    ]


def _calibration(text: CalibrationText | None) -> CardCalibration | None:
    return CardCalibration(text.source, text.windows, text.length, text.seed, text.sha256) if text else None


def _attempt(attempt: Attempt) -> CardAttempt:
    name = shlex.join([attempt.recipe.name, *_changed(methods.options(), attempt.recipe.options)])
    return CardAttempt(
        name=name,
        size=attempt.weight_bytes,
        perplexity_ratio=_interval(attempt.perplexity_ratio),
        kld=_interval(attempt.kld),
        same_top=_interval(attempt.same_top),
        grade=attempt.grade,
        chosen=attempt.chosen,
        failure=attempt.failure,
        predicted=attempt.predicted,
    )


def _copied(provenance: Provenance) -> tuple[str, ...]:
    """The files that a package holds byte for byte as its source does."""
    held = {(file.path, file.sha256) for file in provenance.files}
    return tuple(file.path for file in provenance.source.files if (file.path, file.sha256) in held)


def _own_code(provenance: Provenance) -> str:
    """The package's own file of code, empty where it has none."""
    own = experts.own_record()
    return own.path if own in provenance.files else ""


def _summarized(modules: tuple[str, ...]) -> tuple[str, ...]:
    """Modules of equal place in many layers once, with a star for the number of the layer."""
    patterns = [re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in modules]
    return tuple(
        dict.fromkeys(
            pattern if patterns.count(pattern) >= MANY_LAYERS else name
            for name, pattern in zip(modules, patterns, strict=True)
        )
    )


def figure_names(folder: Path) -> tuple[str, ...]:
    """Figures of a package as its card names them."""
    return tuple(sorted(path.relative_to(folder).as_posix() for path in folder.glob(f"{FIGURES}/*.png")))


def _interval(estimate: Estimate | None) -> Interval | None:
    return Interval(estimate.value, estimate.low, estimate.high) if estimate else None
