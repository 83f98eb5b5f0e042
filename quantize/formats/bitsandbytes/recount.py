"""A finished checkpoint is counted again from its files alone, and compared with what its record says about it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import CorruptModel
from quantize.evidence import Coverage
from quantize.files import CONFIG
from quantize.formats import safetensors
from quantize.formats.bitsandbytes import checks
from quantize.formats.bitsandbytes.config import (
    OUTLIER_THRESHOLD,
    QUANTIZATION_KEY,
    STOCK_THRESHOLD,
    ExpectedConfig,
)
from quantize.formats.bitsandbytes.sizes import BLOCK, ROW_SCALES, STATE, MatrixFormat
from quantize.formats.safetensors import Entry
from quantize.records import Quantized, Recipe

FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
PARAMETER_TOLERANCE = 0.01
"""Share by which files may hold more or less than a model's parameters: buffers, and what is stored twice."""
SMALL_BLOCK = 32


@dataclass(frozen=True)
class Counted:
    """What the files hold: the block size of each quantized module, by its name there, and logical parameters, of which
    so many are `quantized`."""

    blocks: Mapping[str, int]
    parameters: int
    quantized: int = 0


def contradictions(
    folder: Path, recipe: Recipe, quantized: Quantized, parameters: int, coverage: Coverage | None = None
) -> Iterator[str]:
    """What is said of the checkpoint in `folder` and is not so, one sentence each."""
    expected = ExpectedConfig.of(recipe, quantized.half_precision_modules)
    for check in checks.check_files(folder, expected):
        if not check.passed:
            yield f"{check.name}: {check.detail}"
    try:
        counted = counted_in(folder, expected.matrices)
        configured = ExpectedConfig.read(folder)
        settings = json.loads((folder / CONFIG).read_text("utf-8"))
    except (CorruptModel, OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        yield f"the files cannot be counted again: {' '.join(str(error).split())}"
        return
    yield from _miscounted(counted, quantized, parameters)
    if coverage is not None and abs(coverage.quantized - counted.quantized / parameters) > PARAMETER_TOLERANCE:
        yield (
            f"the record says that {coverage.quantized:.1%} of the parameters are quantized, and in the files "
            f"{counted.quantized / parameters:.1%} are"
        )
    if configured is not None:
        yield from _misconfigured(configured, quantized)
    yield from _other_settings(settings, quantized)


def counted_in(folder: Path, matrices: MatrixFormat) -> Counted:
    """Count the modules and parameters in the weight files of a folder; raises CorruptModel or ValueError."""
    files = safetensors.weight_files(folder)
    held = {name: entry for file in files for name, entry in safetensors.entries(file).items()}
    blocks: dict[str, int] = {}
    floats, codes = sum(entry.numel for entry in held.values() if entry.kind in FLOATS), 0
    for name, entry in held.items():
        if matrices.bits == 8 and name.endswith(f".{ROW_SCALES}"):
            module = name.removesuffix(f".{ROW_SCALES}")
            blocks[module] = BLOCK
            codes += held[f"{module}.weight"].numel
            floats -= entry.numel
        elif STATE in name:
            weight = name.split(STATE)[0]
            state = json.loads(safetensors.read(entry, 0, entry.numel, pinned=False).numpy().tobytes())
            blocks[weight.removesuffix(".weight")] = int(state["blocksize"])
            rows, inputs = state["shape"]
            codes += int(rows) * int(inputs)
            floats -= _beside(held, weight)
    return Counted(blocks, floats + codes, codes)


def _beside(held: Mapping[str, Entry], weight: str) -> int:
    """Floats that a quantized weight has beside it, and that are no parameters."""
    return sum(entry.numel for name, entry in held.items() if name.startswith(f"{weight}.") and entry.kind in FLOATS)


def _miscounted(counted: Counted, quantized: Quantized, parameters: int) -> Iterator[str]:
    small = [name for name, block in counted.blocks.items() if block == SMALL_BLOCK]
    yield from _otherwise("are quantized", quantized.modules, counted.blocks)
    yield from _otherwise(f"have blocks of {SMALL_BLOCK}", quantized.block_32_modules, small)
    quantized_too = _cores(quantized.kept_modules) & _cores(counted.blocks)
    if quantized_too - _cores(quantized.modules):
        yield f"the record says that {min(quantized_too)} was not quantized, and in the files it is"
    absent = sorted(set(quantized.half_precision_modules) - set(quantized.kept_modules))
    if absent:
        yield f"the record lists {absent[0]} in half precision, and not among the modules that were kept"
    if abs(counted.parameters - parameters) > PARAMETER_TOLERANCE * parameters:
        yield f"the record says {parameters:,} parameters, and the files hold {counted.parameters:,}"


def _otherwise(what: str, recorded: Collection[str], held: Collection[str]) -> Iterator[str]:
    """Says where other modules are recorded than the files hold; names count unless files name all things otherwise."""
    missing = _cores(recorded) - _cores(held)
    if len(recorded) != len(held) or 0 < missing.total() < len(recorded) / 2:
        named = f", without {min(missing)}" if missing else ""
        yield f"the record says that {len(recorded)} modules {what}, and in the files {len(held)} are such{named}"


def _cores(names: Iterable[str]) -> Counter[str]:
    """Names from the list of layers on: what stands before differs between models and files."""
    cores: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        first = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts))
        cores[".".join(parts[max(0, first - 1) :])] += 1
    return cores


def _misconfigured(configured: ExpectedConfig, quantized: Quantized) -> Iterator[str]:
    listed = [name for name in quantized.modules if configured.skips(name)]
    if listed:
        yield f"{CONFIG} says that {listed[0]} is not quantized, and it is"
    unlisted = [name for name in quantized.kept_modules if not configured.skips(name)]
    if unlisted and not configured.skips_head:
        yield f"{CONFIG} does not say that {unlisted[0]} is not quantized"
    if configured.skips_head and quantized.half_precision_modules:
        yield f"{CONFIG} does not say that {quantized.half_precision_modules[0]} is not quantized"


def _other_settings(settings: Mapping[str, Any], quantized: Quantized) -> Iterator[str]:
    own = settings[QUANTIZATION_KEY]
    stated = {
        "dtype": settings.get("dtype", settings.get("torch_dtype")),
        "bnb_4bit_compute_dtype": own.get("bnb_4bit_compute_dtype") if own.get("load_in_4bit") else None,
    }
    for key, dtype in stated.items():
        if dtype not in (None, quantized.dtype):
            yield f"{CONFIG} says {key} {dtype}, and the record {quantized.dtype}"
    if own.get("load_in_8bit"):
        held, recorded = own.get(OUTLIER_THRESHOLD, STOCK_THRESHOLD), quantized.outlier_threshold or STOCK_THRESHOLD
        if held != recorded:
            yield f"{CONFIG} says {OUTLIER_THRESHOLD} {held}, and the record {recorded}"
