"""Records become the flat facts that a card is rendered from."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from model_card import (
    CardCalibration,
    CardControl,
    CardConvention,
    CardDataset,
    CardFacts,
    CardPublisher,
    CardRung,
    CardSample,
    Interval,
)
from quantize import hub
from quantize.parity.verdict import LIMITS
from quantize.records import (
    CALIBRATED,
    UNMEASURED,
    Calibrated,
    Estimate,
    Parity,
    ParitySettings,
    Provenance,
    Recipe,
    Rung,
    Source,
)

CALIBRATED_OPTIONS = (
    *("size_budget", "sweeps", "epochs"),
    *("calibration", "calibration_windows", "calibration_length", "calibration_seed"),
)


def facts(
    provenance: Provenance,
    parity: Parity,
    source_card: str | None,
    figures: tuple[str, ...],
) -> CardFacts:
    """What the card of a package may say, from its evidence and its source's own card."""
    source, quantized, recipe = provenance.source, provenance.quantized, provenance.recipe
    scores, generated, text = parity.scores, parity.generation, parity.corpus
    ratio_limit, kld_limit = LIMITS[parity.verdict.required]
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
        parameters=parity.sizes.parameters,
        recipe=recipe.name,
        calibration=_calibration(quantized.calibrated, recipe.epochs),
        rungs=tuple(_rung(one) for one in parity.rungs),
        bits=recipe.bits,
        quant_type=recipe.quant_type,
        double_quant=recipe.double_quant,
        dtype=quantized.dtype,
        quantized_modules=len(quantized.modules),
        fine_modules=len(quantized.fine),
        spared_modules=len(quantized.spared),
        kept_modules=quantized.kept_modules,
        source_bytes=parity.sizes.source_bytes,
        package_bytes=parity.sizes.package_bytes,
        bits_per_parameter=parity.sizes.bits_per_parameter,
        grade=parity.verdict.grade,
        required_grade=parity.verdict.required,
        passed=parity.verdict.passed,
        reasons=parity.verdict.reasons,
        corpus=text.name if text else None,
        corpus_dataset=CardDataset(**dataclasses.asdict(dataset)) if dataset else None,
        corpus_sha256=text.sha256 if text else None,
        scored_tokens=text.scored * (text.window - 1) if text else 0,
        window=text.window if text else 0,
        windows=text.scored if text else 0,
        corpus_windows=text.windows if text else 0,
        reference_dtype=parity.reference_dtype,
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
                one.name,
                one.weight_bytes,
                _interval(one.perplexity_ratio),
                _interval(one.kld),
                _interval(one.same_top),
                one.grade,
            )
            for one in parity.controls
        ),
        conventions=tuple(
            CardConvention(one.name, one.method, one.reference, one.candidate) for one in parity.conventions
        ),
        ratio_limit=ratio_limit,
        kld_limit=kld_limit,
        identical_at_16=generated.identical_at_16 if generated else None,
        identical_at_32=generated.identical_at_32 if generated else None,
        prefill_agreement=generated.prefill_agreement if generated else None,
        cached_agreement=generated.cached_agreement if generated else None,
        new_tokens=generated.new_tokens if generated else 0,
        seed=provenance.settings.seed,
        greedy_samples=tuple(
            CardSample(one.prompt, one.reference_greedy, one.candidate_greedy, one.first_divergence) for one in samples
        ),
        sampled_samples=tuple(
            CardSample(one.prompt, one.reference_sampled, one.candidate_sampled, None) for one in samples
        ),
        figures=figures,
        device_name=parity.environment.device_name,
        versions=parity.environment.versions,
        remote_code=source.remote_code,
        tool_version=provenance.tool_version,
        created=provenance.created,
        command=command(source, recipe, provenance.settings, measured=parity.verdict.grade != UNMEASURED),
    )


def command(source: Source, recipe: Recipe, settings: ParitySettings, *, measured: bool = True) -> str:
    """The one command that makes this package again: every option that differs from its default."""
    words = ["quantize", "run", source.repo_id or f"./{source.name}"]
    if source.commit:
        words += ["--revision", source.commit]
    words += ["--bits", str(recipe.bits)]
    if recipe.bits == 4:
        words += ["--recipe", recipe.name]
    if recipe.name == CALIBRATED:
        words += _changed(recipe, CALIBRATED_OPTIONS)
    if recipe.bits == 4 and recipe.quant_type != Recipe.quant_type:
        words += ["--quant-type", recipe.quant_type]
    if recipe.bits == 4 and not recipe.double_quant:
        words += ["--no-double-quant"]
    if recipe.compute_dtype != Recipe.compute_dtype:
        words += ["--compute-dtype", recipe.compute_dtype]
    for module in recipe.skip_modules:
        words += ["--skip-modules", module]
    words += [f"--{name}" for name in ("full", "controls", "conventions") if getattr(settings, name)]
    words += _changed(settings, ("corpus", "window", "max_windows", "new_tokens", "seed", "require"))
    if source.remote_code:
        words += ["--trust-remote-code"]
    if not measured:
        words += ["--unverified"]
    return shlex.join(words)


def _changed(record: Recipe | ParitySettings, names: tuple[str, ...]) -> list[str]:
    """Options for the fields that differ from their defaults."""
    given = {name: getattr(record, name) for name in names if getattr(record, name) != getattr(type(record), name)}
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def _calibration(text: Calibrated | None, epochs: int) -> CardCalibration | None:
    return CardCalibration(text.source, text.windows, text.length, text.seed, text.sha256, epochs) if text else None


def _rung(one: Rung) -> CardRung:
    name, usual = one.recipe.name, Recipe()
    if one.recipe.sweeps != usual.sweeps:
        name = f"{name}, {one.recipe.calibration_windows} windows of text, {one.recipe.sweeps} sweeps"
    if one.recipe.epochs != usual.epochs:
        name = f"{name}, rounding learned in {one.recipe.epochs} epochs"
    if one.recipe.size_budget != usual.size_budget:
        name = f"{name}, at most {one.recipe.size_budget:g} times the bytes"
    return CardRung(
        name=name,
        size=one.weight_bytes,
        perplexity_ratio=_interval(one.perplexity_ratio) if one.perplexity_ratio else None,
        kld=_interval(one.kld) if one.kld else None,
        same_top=_interval(one.same_top) if one.same_top else None,
        grade=one.grade,
        chosen=one.chosen,
    )


def figure_names(folder: Path) -> tuple[str, ...]:
    """Figures of a package as its card names them."""
    return tuple(sorted(path.relative_to(folder).as_posix() for path in folder.glob("figures/*.png")))


def _interval(estimate: Estimate) -> Interval:
    return Interval(estimate.value, estimate.low, estimate.high)
