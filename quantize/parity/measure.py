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
from quantize.parity import corpus, generation, scoring, sequential, statistics, structure, verdict
from quantize.parity.loading import Pair, load_candidate, load_reference, load_tokenizer, widen
from quantize.progress import Progress
from quantize.records import Check, Checkout, Control, Generation, Look, Parity, ParitySettings, Scores, Sizes

if TYPE_CHECKING:
    import torch

ARITHMETIC_WINDOWS = 2
FLOAT16 = "float16 source"


def check_inputs(checkout: Checkout, settings: ParitySettings) -> None:
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
    settings: ParitySettings,
    device: str,
    progress: Progress,
    promised: structure.Expected | None = None,
    controls: Mapping[str, Path] = MappingProxyType({}),
) -> Parity:
    """Compare the checkpoint in `candidate` with its source, both loaded from disk onto `device`.

    `promised` is what the recipe meant; without it the checkpoint's own config is taken at its word. `controls` are
    folders of other quantized versions, which are scored on the same windows as well, and the float16 source too.
    Raises CorpusError or DeviceError; a bad candidate is no error but a verdict.
    """
    started = time.monotonic()
    text = corpus.load(settings.corpus)
    expected = promised or structure.promise_of(candidate)
    checks = structure.check_files(candidate, expected)
    reference, reference_dtype = load_reference(checkout, device)
    trust = checkout.source.remote_code and structure.same_code(checkout.folder, candidate)
    pair, loads = _pair(checkout, candidate, reference, reference_dtype, device, trust)
    checks.append(loads)
    errors: dict[str, float] = {}
    if pair is not None and expected is not None:
        checks += structure.check_models(pair, candidate, expected, trust)
        errors = structure.weight_errors(pair)
        checks.append(structure.weight_check(errors, expected.bits))
    scores, generated, record = None, None, None
    looks: tuple[Look, ...] = ()
    compared: tuple[Control, ...] = ()
    if pair is not None and all(check.passed for check in checks):
        window = min(settings.window, pair.context)
        windows, record = corpus.windows_of(text, pair.tokenizer, window, settings.max_windows, settings.seed)
        if device == "cpu":
            checks.append(_widened(pair, windows[:ARITHMETIC_WINDOWS]))
        scores, looks = _score(pair, windows, settings, progress)
        checks.append(_numbers_check(scores))
    if pair is not None and scores is not None and record is not None:
        record = dataclasses.replace(record, scored=looks[-1].windows)
        generated = _generate(pair, settings, progress)
        if settings.controls:
            scored = windows[: record.scored]
            versions = {FLOAT16: checkout.folder, **controls}
            trust = checkout.source.remote_code
            compared = tuple(
                _control(pair, name, folder, trust, scored, settings, progress) for name, folder in versions.items()
            )
    return Parity(
        reference_dtype=reference_dtype,
        candidate_dtype=_dtype_name(pair.candidate) if pair is not None else "none",
        corpus=record,
        checks=tuple(checks),
        weight_errors=errors,
        scores=scores,
        looks=looks,
        controls=compared,
        generation=generated,
        verdict=verdict.judge(checks, scores, settings.require),
        sizes=_sizes(checkout, candidate, sum(parameter.numel() for parameter in reference.parameters())),
        environment=devices.describe(device),
        seconds=round(time.monotonic() - started, 3),
    )


def _widened(pair: Pair, windows: torch.Tensor) -> Check:
    """Switch the candidate to float32 sums, and check that they say what its own type said before."""
    before = scoring.outputs(pair.candidate, windows, pair.device)
    widen(pair.candidate)
    return structure.arithmetic_check(
        scoring.mean_divergence(before, scoring.outputs(pair.candidate, windows, pair.device))
    )


def _numbers_check(scores: Scores | None) -> Check:
    if scores is None:
        return Check("outputs", False, "a model's outputs overflow to NaN or infinity: try another --compute-dtype")
    return Check("outputs", True, "all outputs are finite")


def _dtype_name(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _pair(
    checkout: Checkout, candidate: Path, reference: object, reference_dtype: str, device: str, trust: bool
) -> tuple[Pair | None, Check]:
    tokenizer = source_tokenizer(checkout)
    try:
        model = load_candidate(candidate, device, trust)
    except DeviceError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a foreign checkpoint does to from_pretrained is its verdict
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return None, Check("loads", False, f"stock transformers cannot load it: {reason}")
    detail = "stock transformers loads it"
    return Pair(reference, model, tokenizer, reference_dtype, device), Check("loads", True, detail)


def _score(
    pair: Pair, windows: torch.Tensor, settings: ParitySettings, progress: Progress
) -> tuple[Scores | None, tuple[Look, ...]]:
    """Score windows until the verdict is certain, or all of them; no scores where a model answers NaN."""
    count, window = windows.shape
    looks: list[Look] = []
    tokens: scoring.TokenScores | None = None
    with progress.task(f"scoring up to {count} windows of {window} tokens", count, "windows") as advance:
        for stop in sequential.plan(count, full=settings.full):
            seen = looks[-1].windows if looks else 0
            more = scoring.score(pair.reference, pair.candidate, windows[seen : stop.windows], pair.device, advance)
            if not more.finite:
                return None, ()
            tokens = tokens + more if tokens else more
            looks.append(sequential.look(tokens, stop, settings.require))
            if looks[-1].certain:
                break
    assert tokens is not None
    return statistics.summarize(tokens, settings.seed, None if settings.full else looks[-1]), tuple(looks)


def _control(
    pair: Pair,
    name: str,
    folder: Path,
    trust: bool,
    windows: torch.Tensor,
    settings: ParitySettings,
    progress: Progress,
) -> Control:
    """Score another version of the source on `windows`; only float16 is computed in its own type on a CPU."""
    model = load_candidate(folder, pair.device, trust, dtype="float16" if name == FLOAT16 else None)
    if name != FLOAT16 and pair.device == "cpu":
        widen(model)
    with progress.task(f"control {name}", len(windows), "windows") as advance:
        tokens = scoring.score(pair.reference, model, windows, pair.device, advance)
    scores = statistics.summarize(tokens, settings.seed)
    width = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Control(name, width, scores.perplexity_ratio, scores.kld.mean, scores.same_top)


def _generate(pair: Pair, settings: ParitySettings, progress: Progress) -> Generation:
    with progress.task("generating side by side", len(generation.prompts()), "prompts") as advance:
        return generation.compare(pair, settings.new_tokens, settings.seed, advance)


def _sizes(checkout: Checkout, candidate: Path, parameters: int) -> Sizes:
    source_bytes = sum(file.size for file in checkout.source.files if file.path.endswith(".safetensors"))
    package_bytes = sum(path.stat().st_size for path in candidate.glob("*.safetensors"))
    return Sizes(source_bytes, package_bytes, parameters, round(8 * package_bytes / parameters, 4))
