"""The whole comparison of a finished folder with its source, from structure to verdict."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quantize import devices
from quantize.errors import CorruptModel, DeviceError, first_line, memory_errors
from quantize.evidence import Check, Coverage, Evidence, Sizes
from quantize.formats import experts, source_model, ties
from quantize.formats.bitsandbytes import checks as format_checks
from quantize.formats.bitsandbytes import coverage, cpu_reading, loading
from quantize.formats.bitsandbytes.config import ExpectedConfig
from quantize.formats.bitsandbytes.modules import names_holding_codes
from quantize.formats.safetensors import recorded_weight_bytes, weight_bytes
from quantize.parity import (
    companions,
    comparison,
    corpus,
    framing,
    generation,
    picture_prompts,
    structure,
    verdict,
)
from quantize.parity.comparison import Measurements
from quantize.parity.models import ADVICE, Pair, load_tokenizer, text_config
from quantize.progress import Progress
from quantize.records import Checkout, EvaluationSettings

SAMPLE = 1_000_000
"""Characters of a corpus that are looked at before the work."""


@dataclass(frozen=True)
class _Structure:
    """What the files and the loaded weights show before scoring: `parameters` counts the source's, ties once."""

    checks: tuple[Check, ...]
    weight_errors: dict[str, float]
    parameters: int
    coverage: Coverage | None = None


def check_inputs(checkout: Checkout, settings: EvaluationSettings) -> None:
    """Raise CorpusError or CorruptModel now, rather than after hours, when nothing could be measured with these."""
    import torch

    text, tokenizer = corpus.load(settings.corpus).text, source_tokenizer(checkout)
    vocabulary = int(text_config(checkout).vocab_size)
    chat = framing.has_template(tokenizer)
    samples = [tokenizer(text[:SAMPLE], verbose=False).input_ids]
    samples += [framing.prompt(tokenizer, prompt, chat) for prompt in generation.prompts(chat)]
    for ids in map(torch.tensor, samples):
        source_model.require_known_tokens(ids, vocabulary, checkout.source.name)


def source_tokenizer(checkout: Checkout) -> Any:
    """The source's tokenizer; raises CorruptModel where it does not load."""
    try:
        return load_tokenizer(checkout.folder, checkout.source.remote_code)
    except Exception as error:  # tokenizers raises bare ones
        raise CorruptModel(f"the tokenizer of {checkout.source.name} does not load: {first_line(error)}") from error


def measure(
    checkout: Checkout,
    candidate: Path,
    settings: EvaluationSettings,
    device: str,
    progress: Progress,
    expected: ExpectedConfig | None = None,
    controls: Mapping[str, Path | str] = MappingProxyType({}),
    reference_cache: Path | None = None,
    attempts: int = 1,
) -> Evidence:
    """Compare the checkpoint in `candidate` with its source, both loaded from disk onto `device`.

    `expected` is what the recipe should have made; without it, the checkpoint's own config says what to expect.
    `controls` are folders of other quantized versions, or why there is none, which are scored on the same windows as
    well; with `settings.controls` the source in float16 is one of them.
    `attempts` candidates on the same windows share the error of their verdicts.
    With a `reference_cache` the models are loaded one at a time, and the reference's logits are kept in that file.
    Raises CorruptModel (the source), CorpusError or DeviceError; a bad candidate is no error but a verdict.
    """
    started = time.monotonic()
    unused = source_model.check_tensors(checkout)
    text = corpus.load(settings.corpus)
    expected = expected or ExpectedConfig.read_if_possible(candidate)
    trust = structure.trusts(checkout, candidate)
    tokenizer = source_tokenizer(checkout)
    alone = reference_cache is not None
    with (
        memory_errors(f"measuring against {checkout.source.name} on {device}", ADVICE),
        Pair(checkout, candidate, device, trust=trust, tokenizer=tokenizer, alone=alone) as pair,
    ):
        examined = _examine(pair, expected)
        measured = Measurements()
        if all(check.passed for check in examined.checks):
            measured = comparison.compare(pair, text, settings, progress, controls, reference_cache, attempts)
    return replace(_evidence(pair, examined, measured, settings, started), unused_tensors=unused)


def unmeasured(
    checkout: Checkout, candidate: Path, settings: EvaluationSettings, device: str, expected: ExpectedConfig
) -> Evidence:
    """What can be said about the checkpoint in `candidate` without loading it or its source: files and tokenizer."""
    started = time.monotonic()
    checks = format_checks.check_files(candidate, expected)
    trust = structure.trusts(checkout, candidate)
    tokenizer, model = source_tokenizer(checkout), experts.unstacked(source_model.skeleton(checkout))
    checks += companions.checks(checkout.folder, tokenizer, candidate, trust)
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
        unused_tensors=source_model.check_tensors(checkout),
        chat=framing.has_template(tokenizer),
        misread_on_cpu=cpu_reading.misread_in_files(candidate),
        coverage=coverage.of(model, format_checks.due_names(model, expected)),
        reads_pictures=picture_prompts.sees(checkout),
    )


def _evidence(
    pair: Pair, examined: _Structure, measured: Measurements, settings: EvaluationSettings, started: float
) -> Evidence:
    checks = (*examined.checks, *measured.checks)
    evidence = Evidence(
        reference_dtype=pair.reference_dtype,
        reference_devices=pair.reference_devices,
        candidate_dtype=pair.candidate_dtype,
        corpus=measured.corpus,
        checks=checks,
        weight_errors=examined.weight_errors,
        scores=measured.scores,
        looks=(),
        reference_cache=measured.reference_cache,
        controls=measured.controls,
        standard_perplexities=measured.standard_perplexities,
        generation=measured.generation,
        verdict=verdict.gate(checks, None, settings.require),
        sizes=_sizes(pair.checkout, pair.folder, examined.parameters),
        environment=devices.describe(pair.device),
        seconds=round(time.monotonic() - started, 3),
        look_plan=measured.look_plan,
        chat=pair.chat,
        chat_framing=measured.chat_framing,
        misread_on_cpu=cpu_reading.misread_in_files(pair.folder),
        coverage=examined.coverage,
        reads_pictures=picture_prompts.sees(pair.checkout),
        pictures=measured.pictures,
        pictures_left_out=measured.pictures_left_out,
    )
    return verdict.judged(_finite(evidence), settings.require)


def _finite(evidence: Evidence) -> Evidence:
    """The evidence without the parts that hold a value that is no number, each named by a check that failed.

    A model can make NaN or infinity of anything, JSON cannot say them, and neither may be taken for a good figure.
    """
    parts = ("scores", "reference_cache", "generation", "chat_framing")
    bad: dict[str, str] = {part: where for part in parts if (where := _not_finite(getattr(evidence, part), part))}
    errors = {name: error for name, error in evidence.weight_errors.items() if math.isfinite(error)}
    failed = tuple(Check(part, False, f"{where} is no finite number") for part, where in bad.items())
    left_out: dict[str, Any] = dict.fromkeys(bad)
    return dataclasses.replace(evidence, checks=(*evidence.checks, *failed), weight_errors=errors, **left_out)


def _not_finite(value: object, where: str) -> str:
    """The place of a number in a record that is NaN or infinite, or nothing."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else where
    if dataclasses.is_dataclass(value):
        inner = ((f"{where}.{item.name}", getattr(value, item.name)) for item in dataclasses.fields(value))
    elif isinstance(value, dict):
        inner = ((f"{where}.{name}", item) for name, item in value.items())
    elif isinstance(value, tuple):
        inner = ((f"{where}[{number}]", item) for number, item in enumerate(value))
    else:
        return ""
    return next((found for name, item in inner if (found := _not_finite(item, name))), "")


def _examine(pair: Pair, expected: ExpectedConfig | None) -> _Structure:
    """Everything that can be said before a window is read."""
    checks = format_checks.check_files(pair.folder, expected)
    loads = _loads_check(pair)
    checks.append(loads)
    if not loads.passed or expected is None:
        return _Structure(tuple(checks), {}, pair.checkout.source.parameters)
    with pair.weights_beside_candidate() as (reference, candidate), experts.as_linear(reference):
        checks += structure.check_models(reference, candidate, pair.folder, expected)
        checks += companions.checks(pair.checkout.folder, pair.tokenizer, pair.folder, pair.trust)
        errors = loading.weight_errors(reference, candidate)
        checks.append(format_checks.weight_check(errors, expected.bits))
        covered = coverage.of(reference, names_holding_codes(candidate, expected.bits))
        return _Structure(tuple(checks), errors, ties.distinct_count(reference), covered)


def _loads_check(pair: Pair) -> Check:
    try:
        with memory_errors("loading a model", ADVICE):
            _ = pair.candidate
    except DeviceError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a foreign checkpoint does to from_pretrained is its verdict
        return Check("loads", False, f"stock transformers cannot load it: {first_line(error)}")
    return Check("loads", True, "stock transformers loads it")


def _sizes(checkout: Checkout, candidate: Path, parameters: int) -> Sizes:
    source_bytes = recorded_weight_bytes(checkout.source.files)
    package_bytes = weight_bytes(candidate)
    return Sizes(source_bytes, package_bytes, parameters, round(8 * package_bytes / parameters, 4))
