"""Calibration text: what the source writes itself, or a text that is named; never the evaluation corpus."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantize import devices, hub
from quantize.errors import CorpusError, UnsupportedModel
from quantize.formats import source_model
from quantize.methods.calibration import sampling
from quantize.methods.calibration.layers import autocast
from quantize.methods.calibration.options import CALIBRATION_TEXT, SELF, CalibratedOptions
from quantize.methods.calibration.overlap import Passages
from quantize.methods.calibration.static_cache import make_static
from quantize.progress import Progress
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
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or 1024
    return min(options.calibration_length, int(context))


def generated(
    model: Any,
    options: CalibratedOptions,
    length: int,
    device: str,
    bfloat16: bool,
    progress: Progress,
    temperatures: tuple[float, ...],
) -> torch.Tensor:
    """What the model writes after its beginning-of-text token, sampled at each of the temperatures in turn."""
    config, windows = model.config.get_text_config(), options.calibration_windows
    begin = next((token for token in (config.bos_token_id, config.eos_token_id) if isinstance(token, int)), 0)
    temperature = torch.tensor(temperatures, device=device).repeat(-(-windows // len(temperatures)))[:windows]
    share = sampling.shares(windows, length, options.calibration_seed)
    side_by_side = _windows_at_once(model, length, device, bfloat16)
    parts = []
    with progress.task("writing calibration text", windows * length, "tokens") as advance:
        for rows in torch.split(torch.arange(windows), side_by_side):
            tokens, past = [torch.full((len(rows), 1), begin, device=device)], None
            while len(tokens) < length:
                output = _next_logits(model, tokens[-1], past, device, bfloat16)
                past = make_static(output.past_key_values, length) if past is None else past
                chances = torch.softmax(output.logits[:, -1].float() / temperature[rows, None], -1)
                tokens.append(sampling.draw(chances, share[rows, len(tokens)])[:, None])
                advance(len(rows))
            parts.append(torch.cat(tokens, 1).cpu())
    return torch.cat(parts)


def _next_logits(model: Any, tokens: torch.Tensor, past: Any, device: str, bfloat16: bool) -> Any:
    with torch.inference_mode(), autocast(device, bfloat16), devices.steady_attention():
        return model(tokens, past_key_values=past, use_cache=True)


def _windows_at_once(model: Any, length: int, device: str, bfloat16: bool) -> int:
    """Windows that can be written side by side: a first token shows what each token takes in the cache."""
    output = _next_logits(model, torch.zeros(1, 1, dtype=torch.int64, device=device), None, device, bfloat16)
    layers = getattr(getattr(output, "past_key_values", None), "layers", None)
    if not layers:
        raise UnsupportedModel(
            "the model keeps no keys and values, without which it writes no calibration text in reasonable time: "
            "name a text with --calibration, or choose --recipe rtn"
        )
    kept = [tensor for layer in layers for tensor in vars(layer).values() if isinstance(tensor, torch.Tensor)]
    bytes_per_token = sum(tensor.nbytes for tensor in kept)
    fitting = CACHE_BYTES[devices.kind(device)] // max(1, bytes_per_token * length)
    return max(1, min(GENERATED_AT_ONCE, fitting))


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
