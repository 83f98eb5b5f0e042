"""Is a checkpoint what its recipe says? Checks of its files, and of its modules once it is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantize.errors import CorruptModel, first_line
from quantize.evidence import Check
from quantize.formats import safetensors
from quantize.formats.bitsandbytes.config import QUANTIZATION_KEY, ExpectedConfig
from quantize.formats.bitsandbytes.modules import (
    block_size,
    converted,
    is_listed,
    kept_by_default,
    kept_in_float32,
    linear_names,
    matrix,
    names_holding_codes,
    read_directly,
    routers,
    towers,
)
from quantize.formats.bitsandbytes.sizes import ROW_SCALES, MatrixFormat
from quantize.formats.bounds import are_bounds
from quantize.formats.ties import distinct_parameters

WEIGHT_ERROR_LIMITS = {4: 0.25, 8: 0.05}
"""Relative RMS error of a module: nearest NF4 gives about 0.09, FP4 0.13, int8 0.01, a wrong matrix above 1."""
STATE_CHECK = "quant_state"
"""The name of the check that 4-bit weights have all that belongs to them."""
SIZE_TOLERANCE = 0.02
HEADER_BYTES, HEADER_BYTES_PER_TENSOR = 4096, 200
"""What the headers of files may take at most, besides the tensors."""
SCALES = {4: ".absmax", 8: f".{ROW_SCALES}"}
"""What follows a weight's or a module's name in that of its scales."""


def check_files(folder: Path, expected: ExpectedConfig | None) -> list[Check]:
    """What can be seen without loading a model: config against recipe and tensors, and every value finite."""
    try:
        return _check_files(folder, expected)
    except (CorruptModel, OSError, ValueError, AttributeError) as error:
        return [Check("files", False, f"unreadable: {first_line(error)}")]


def _check_files(folder: Path, expected: ExpectedConfig | None) -> list[Check]:
    names = _tensor_names(folder)
    configured = ExpectedConfig.read(folder)
    if expected is None or configured is None:
        contents = "quantized tensors" if _weights_with(names, SCALES.values()) else "16-bit weights"
        detail = f"config.json has no bitsandbytes {QUANTIZATION_KEY}; the files hold {contents}"
        return [Check("config", False, detail)]
    checks = [_config_check(configured.matrices, expected.matrices, names)]
    if expected.bits == 4:
        checks.append(_state_check(expected.matrices, names))
    checks.append(_finite_check(folder, names))
    return checks


def _config_check(configured: MatrixFormat, expected: MatrixFormat, names: set[str]) -> Check:
    statement = f"config.json says {configured}"
    if str(configured) != str(expected):
        return Check("config", False, f"{statement}, the recipe {expected}")
    if not _weights_with(names, [SCALES[expected.bits]]):
        return Check("config", False, f"{statement}, the files hold 16-bit weights only")
    return Check("config", True, f"{statement}, so do the files")


def _state_check(expected: MatrixFormat, names: set[str]) -> Check:
    parts = expected.state_names()
    weights = _weights_with(names, parts)
    missing = sorted(weight + part for weight in weights for part in parts if weight + part not in names)
    detail = f"missing {missing[0]} ({len(missing)} in all)" if missing else f"complete for {len(weights)} weights"
    return Check(STATE_CHECK, not missing, detail)


def _finite_check(folder: Path, names: set[str]) -> Check:
    """Codes are no numbers, whatever type they are stored as."""
    import torch

    codes, bounds = _weights_with(names, SCALES.values()), set[str]()
    for file in safetensors.weight_files(folder):
        for name, part in safetensors.parts(file):
            if name in codes or not part.is_floating_point() or bool(torch.isfinite(part).all()):
                continue
            if not are_bounds(part):
                return Check("finite", False, f"{name} holds NaN or infinity")
            bounds.add(name)
    but = f", but for the bounds and masks in {len(bounds)} of them" if bounds else ""
    return Check("finite", True, f"every value of {len(names)} tensors is finite{but}")


def due_names(reference: Any, expected: ExpectedConfig) -> set[str]:
    """Names of the modules of the source's model that should be quantized."""
    skip_list = kept_by_default(reference) if expected.skips_head else []
    skip_list += [*kept_in_float32(reference), *converted(reference)]
    skip_list += towers(reference) if expected.skips_towers else []
    skip_list += read_directly(reference) if expected.skips_head else []
    skip_list += routers(reference) if expected.skips_routers else []
    return {name for name in linear_names(reference) if not (expected.skips(name) or is_listed(name, skip_list))}


def module_check(reference: Any, candidate: Any, expected: ExpectedConfig) -> Check:
    """Whether the modules of the loaded `candidate` are quantized that should be, and no others."""
    due, quantized = due_names(reference, expected), names_holding_codes(candidate, expected.bits)
    if left := sorted(due - quantized):
        return Check("modules", False, f"{left[0]} was left in 16 bits ({len(left)} of {len(due)} were)")
    if extra := sorted(quantized - due):
        return Check("modules", False, f"{extra[0]} was quantized and should not be ({len(extra)} such)")
    kept = len(set(linear_names(reference)) - quantized)
    return Check("modules", True, f"{len(quantized)} modules are {expected.bits}-bit, {kept} are not by design")


def size_check(reference: Any, candidate: Any, folder: Path, expected: ExpectedConfig) -> Check:
    """Whether the files have the size that the recipe leads one to expect."""
    predicted = predicted_bytes(reference, candidate, expected)
    actual = safetensors.weight_bytes(folder)
    headers = HEADER_BYTES_PER_TENSOR * len(_tensor_names(folder)) + HEADER_BYTES
    low, high = predicted * (1 - SIZE_TOLERANCE), predicted * (1 + SIZE_TOLERANCE) + headers
    detail = f"{actual / 1e6:.2f} MB, the recipe predicts {predicted / 1e6:.2f} MB"
    return Check("size", low <= actual <= high, detail)


def predicted_bytes(reference: Any, candidate: Any, expected: ExpectedConfig) -> int:
    """Size of the tensors that the recipe leads one to expect, in bytes, with ties counted once."""
    quantized, total = names_holding_codes(candidate, expected.bits), 0
    for name, key, parameter in distinct_parameters(reference):
        module = candidate.get_submodule(name)
        if name in quantized and key == "weight":
            matrices = replace(expected.matrices, block=block_size(module) or expected.matrices.block)
            total += matrices.stored_bytes(*matrix(reference.get_submodule(name)).shape)
        else:
            total += parameter.numel() * int(getattr(module, key).element_size())
    return total


def weight_check(errors: dict[str, float], bits: int) -> Check:
    """Whether modules hold their source's weights, by their errors as `loading.weight_errors` gives them."""
    limit = WEIGHT_ERROR_LIMITS[bits]
    beyond = {name: error for name, error in errors.items() if not error <= limit}
    if beyond:
        worst = max(beyond, key=lambda name: beyond[name])
        detail = f"{len(beyond)} modules do not hold their source's weights, {worst} is off by {beyond[worst]:.2f}"
    else:
        detail = f"largest relative error {max(errors.values(), default=0.0):.3f} (limit {limit})"
    return Check("weights", not beyond, detail)


def _weights_with(names: set[str], endings: Iterable[str]) -> set[str]:
    """Weights that have one of these tensors beside them: `x.weight` for `x.weight.absmax` and for `x.SCB`."""
    beside = {name.removesuffix(ending) for ending in endings for name in names if name.endswith(ending)}
    return {name if name.endswith("weight") else f"{name}.weight" for name in beside}


def _tensor_names(folder: Path) -> set[str]:
    """Of all tensors in the folder's weight files."""
    return {name for file in safetensors.weight_files(folder) for name in safetensors.entries(file)}
