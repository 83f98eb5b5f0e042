"""Calibration text: what the source writes itself, or a text that is named; never the evaluation corpus."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantize import devices, hub
from quantize.errors import CorpusError
from quantize.formats import source_model
from quantize.methods.calibration import sampling
from quantize.methods.calibration.layers import autocast
from quantize.methods.calibration.options import CALIBRATION_TEXT, SELF, CalibratedOptions
from quantize.methods.calibration.overlap import Passages
from quantize.methods.calibration.own_generate import Draws, Way, kept_bytes
from quantize.methods.calibration.static_cache import make_static
from quantize.methods.method import Job
from quantize.progress import Advance, Progress
from quantize.records import CalibrationText

GENERATED_AT_ONCE = 128
"""Windows that a model writes side by side, where their caches fit into CACHE_BYTES."""
CACHE_BYTES = {"cpu": 512 << 20, "gpu": 4 << 30}
WINDOW_MULTIPLE = 8
"""Windows run through the model in batches of equal size, so a few may be left over."""
MAX_OVERLAP = 0.01
TEMPERATURES = (1.0, 1.4)
"""Half of the text is sampled above temperature 1: that helps with text of another kind."""


@dataclass(frozen=True)
class GivenText:
    """A text that is named, with the data set on the Hub that it is from and the commit that was read."""

    text: str
    repo_id: str | None = None
    commit: str | None = None


def of_job(
    job: Job,
    options: CalibratedOptions,
    model: Any,
    bfloat16: bool,
    temperatures: tuple[float, ...] = TEMPERATURES,
) -> tuple[torch.Tensor, CalibrationText]:
    """Tokens [windows, length] for a job, whose source is `model`, and their record; see `prepare`."""
    from transformers import AutoTokenizer

    trust = job.checkout.source.remote_code
    tokenizer = AutoTokenizer.from_pretrained(job.checkout.folder, local_files_only=True, trust_remote_code=trust)
    return prepare(options, model, tokenizer, job.corpus, job.device, bfloat16, job.progress, temperatures)


def prepare(
    options: CalibratedOptions,
    model: Any,
    tokenizer: Any,
    corpus: str,
    device: str,
    bfloat16: bool,
    progress: Progress,
    temperatures: tuple[float, ...],
) -> tuple[torch.Tensor, CalibrationText]:
    """Tokens [windows, length] to calibrate on, and their record.

    `corpus` is the text that the package is judged by. Windows that repeat a passage of it are left out; raises
    CorpusError where more than 1 % of a given text is of it, or where that is too short.
    """
    length, given = _length(options, model.config), GivenText("")
    if options.calibration == SELF:
        tokens = generated(model, options, length, device, bfloat16, progress, temperatures)
    else:
        given = read(options.calibration)
        tokens = from_text(given, options, model.config, tokenizer, corpus)
    judged_by = Passages.of(corpus)
    shared = torch.tensor([judged_by.repeated_by(text) for text in tokenizer.batch_decode(tokens)])
    kept = tokens[~shared]
    kept = kept[: len(kept) // WINDOW_MULTIPLE * WINDOW_MULTIPLE]
    if len(kept) < len(tokens) / 2:
        raise CorpusError(
            f"{len(tokens) - len(kept)} of {len(tokens)} windows of calibration text repeat the corpus that the "
            f"package is judged by: name another --corpus or another --calibration"
        )
    digest = hashlib.sha256(kept.to(torch.int64).numpy().tobytes()).hexdigest()
    return kept, CalibrationText(
        source=Path(options.calibration).name,
        seed=options.calibration_seed,
        windows=len(kept),
        length=length,
        left_out=int(shared.sum()),
        sha256=digest,
        repo_id=given.repo_id,
        commit=given.commit,
    )


def from_text(given: GivenText, options: CalibratedOptions, config: Any, tokenizer: Any, corpus: str) -> torch.Tensor:
    """Windows [windows, length] of a `given` text; raises CorpusError where it cannot be calibrated on."""
    tokens = _windows(tokenizer, given.text, options, _length(options, config))
    source_model.require_known_tokens(tokens, int(config.get_text_config().vocab_size), "the original")
    _require_disjoint(Path(options.calibration).name, tokenizer.batch_decode(tokens), Passages.of(corpus))
    return tokens


def _length(options: CalibratedOptions, config: Any) -> int:
    return min(options.calibration_length, source_model.context(config.get_text_config()))


def generated(
    model: Any,
    options: CalibratedOptions,
    length: int,
    device: str,
    bfloat16: bool,
    progress: Progress,
    temperatures: tuple[float, ...],
) -> torch.Tensor:
    """What the model writes after the token that begins a text, sampled at each of the temperatures in turn."""
    begin, windows = _beginning(model.config), options.calibration_windows
    temperature = torch.tensor(temperatures, device=device).repeat(-(-windows // len(temperatures)))[:windows]
    draws = Draws(temperature, sampling.shares(windows, length, options.calibration_seed))
    probes = _probes(model, device, bfloat16)
    way = None if _keeps_keys_and_values(probes) else Way.suiting(model, begin, draws, bfloat16)
    parts = []
    with progress.task("writing calibration text", windows * length, "tokens") as advance:
        for rows in torch.split(torch.arange(windows), _windows_at_once(probes, length, device)):
            part = draws.part(rows, length)
            if way is None:
                parts.append(_written(model, begin, part, bfloat16, advance))
            else:
                parts.append(way.written(model, begin, part, bfloat16, advance))
    return torch.cat(parts)


def _written(model: Any, begin: int, draws: Draws, bfloat16: bool, advance: Advance) -> torch.Tensor:
    """Tokens [windows, length] of a model that keeps keys and values, whose cache has room for all from the start."""
    (windows, length), device = draws.share.shape, str(draws.temperature.device)
    tokens, past = [torch.full((windows, 1), begin, device=device)], None
    while len(tokens) < length:
        output = _next_logits(model, tokens[-1], past, device, bfloat16)
        past = make_static(output.past_key_values, length) if past is None else past
        chances = torch.softmax(output.logits[:, -1].float() / draws.temperature[:, None], -1)
        tokens.append(sampling.draw(chances, draws.share[:, len(tokens)])[:, None])
        advance(windows)
    return torch.cat(tokens, 1).cpu()


def _beginning(config: Any) -> int:
    """The token that begins a text, in its place one that ends texts, and the first of all where there is neither."""
    parts = (config.get_text_config(), config)
    named = [getattr(part, f"{kind}_token_id", None) for kind in ("bos", "eos") for part in parts]
    listed = [token for value in named for token in (value if isinstance(value, list) else [value])]
    return next((token for token in listed if isinstance(token, int) and token >= 0), 0)


def _next_logits(model: Any, tokens: torch.Tensor, past: Any, device: str, bfloat16: bool) -> Any:
    with torch.inference_mode(), autocast(device, bfloat16), devices.steady_attention():
        return model(tokens, past_key_values=past, use_cache=True)


def _probes(model: Any, device: str, bfloat16: bool) -> list[Any]:
    """Outputs after one token and after two, which show what the model keeps of them; none where its cache fails."""
    try:
        texts = (torch.zeros(1, count, dtype=torch.int64, device=device) for count in (1, 2))
        return [_next_logits(model, text, None, device, bfloat16) for text in texts]
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # noqa: BLE001 - whatever foreign code raises; such a model writes without a cache
        return []


def _keeps_keys_and_values(probes: list[Any]) -> bool:
    """Whether a model keeps keys and values of every token, and nothing else: then its cache can have room at once."""
    caches = [getattr(getattr(output, "past_key_values", None), "layers", ()) for output in probes]
    layers = [(layer, tokens) for tokens, cache in enumerate(caches, start=1) for layer in cache]
    return bool(layers) and all(_keeps(layer, tokens) for layer, tokens in layers)


def _keeps(layer: Any, tokens: int) -> bool:
    """Whether a layer of a cache keeps the keys of so many tokens, not also of a prompt of its own, and no state."""
    keys = getattr(layer, "keys", None)
    return not hasattr(layer, "recurrent_states") and (keys is None or keys.shape[-2] == tokens)


def _windows_at_once(probes: list[Any], length: int, device: str) -> int:
    """Windows that can be written side by side."""
    if not probes:
        return GENERATED_AT_ONCE
    first, both = map(kept_bytes, probes)
    each = first + (both - first) * (length - 1)
    return max(1, min(GENERATED_AT_ONCE, CACHE_BYTES[devices.kind(device)] // max(1, each)))


def read(source: str) -> GivenText:
    """A file, or one file of a data set on the Hub written as owner/name:path; raises CorpusError."""
    path, repo_id, commit = CALIBRATION_TEXT.file(source), None, None
    if path is None:
        repo_id, mark, inside = source.partition(":")
        if not mark or repo_id.count("/") != 1:
            raise CorpusError(
                f"no calibration text {source!r}: name a text file, a file of a Hub data set as owner/name:path, "
                f"or {SELF}"
            )
        commit, path = hub.dataset_file(repo_id, inside)
    if path.suffix == ".parquet":
        return GivenText("\n\n".join(_parquet_rows(path)), repo_id, commit)
    try:
        return GivenText(path.read_text("utf-8"), repo_id, commit)
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path.name} is not UTF-8 text (byte {error.start})") from error


def content_hash(options: CalibratedOptions) -> str | None:
    """The sha256 of the text that is named, None where the model writes its own."""
    if options.calibration == SELF:
        return None
    return hashlib.sha256(read(options.calibration).text.encode()).hexdigest()


def _parquet_rows(path: Path) -> list[str]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise CorpusError(
            "Parquet is read with pyarrow: install it with `pip install quantize-bnb[wikitext]`"
        ) from None
    table = pyarrow.parquet.read_table(path)
    if "text" not in table.column_names:
        raise CorpusError(f"{path.name} has no column `text`")
    return [row for row in table.column("text").to_pylist() if row]


def _windows(tokenizer: Any, text: str, options: CalibratedOptions, length: int) -> torch.Tensor:
    """Whole windows of the text in a seeded order."""
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    windows = ids[: len(ids) // length * length].view(-1, length)
    if len(windows) < options.calibration_windows:
        raise CorpusError(
            f"{options.calibration} has {len(windows)} windows of {length} tokens, and "
            f"{options.calibration_windows} are needed: give more text or a smaller --calibration-windows"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(options.calibration_seed))
    chosen: torch.Tensor = windows[order[: options.calibration_windows]]
    return chosen


def _require_disjoint(source: str, texts: list[str], corpus: Passages) -> None:
    share = corpus.share_in(texts)
    if share > MAX_OVERLAP:
        raise CorpusError(
            f"{share:.0%} of the calibration text {source} is in the corpus that the package is judged by: "
            f"name another --calibration or another --corpus"
        )
