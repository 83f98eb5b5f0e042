"""Is the package what its recipe says? Facts that are checked before anything is scored."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import CorruptModel
from quantize.evidence import Check
from quantize.formats import safetensors
from quantize.formats.safetensors import weight_bytes
from quantize.parity.models import load_tokenizer

if TYPE_CHECKING:
    import torch

QUANTIZED_CLASSES = {4: "Linear4bit", 8: "Linear8bitLt"}
WEIGHT_ERROR_LIMITS = {4: 0.25, 8: 0.05}
"""Relative RMS error of a module: nearest NF4 gives about 0.09, FP4 0.13, int8 0.01, a wrong matrix above 1."""
ARITHMETIC_LIMIT = 0.001
"""Mean KLD in nats, a sixth of what the grade lossless allows."""
SIZE_TOLERANCE = 0.02
TOKENIZER_SAMPLE = (
    "Plain words, numbers 3.14159 and 1,000,000; CamelCase, snake_case.\n\tdef f(x): return x**2  # code\n"
    "Ünïcödé, 中文字, 日本語, العربية, emoji 🙂👩‍👩‍👧, a  b   c, <|endoftext|> <s> </s>"
)


@dataclass(frozen=True)
class Expected:
    """What the recipe, or the checkpoint's own config, says about it.

    `skips` tells by a module's name whether it stays as it is; a recipe leaves the head alone besides, while a
    config that lists modules means those and no others.
    """

    bits: int
    quant_type: str
    double_quant: bool
    skips: Callable[[str], bool]
    skips_head: bool = True


def expected_from(folder: Path) -> Expected | None:
    """What config.json in `folder` promises; None when it promises no bitsandbytes quantization."""
    config = json.loads((folder / "config.json").read_text("utf-8")).get("quantization_config") or {}
    if not (config.get("load_in_4bit") or config.get("load_in_8bit")):
        return None
    skipped = config.get("llm_int8_skip_modules")
    return Expected(
        bits=4 if config.get("load_in_4bit") else 8,
        quant_type=config.get("bnb_4bit_quant_type", "fp4"),
        double_quant=bool(config.get("bnb_4bit_use_double_quant")),
        skips=lambda name: _listed(name, skipped or []),
        skips_head=skipped is None,
    )


def promise_of(folder: Path) -> Expected | None:
    """What a checkpoint's own config promises, None also where that cannot be read."""
    try:
        return expected_from(folder)
    except (OSError, ValueError, AttributeError):
        return None


def same_code(source: Path, candidate: Path) -> bool:
    """Whether the candidate brings no other code than the source's, which alone was trusted."""
    return all(
        (source / path.relative_to(candidate)).is_file()
        and (source / path.relative_to(candidate)).read_bytes() == path.read_bytes()
        for path in candidate.rglob("*.py")
    )


def check_files(folder: Path, expected: Expected | None) -> list[Check]:
    """What can be seen without loading a model: config against recipe and tensors, and every value finite."""
    try:
        return _check_files(folder, expected)
    except (CorruptModel, OSError, ValueError, AttributeError) as error:
        return [Check("files", False, f"unreadable: {str(error).splitlines()[0]}")]


def _check_files(folder: Path, expected: Expected | None) -> list[Check]:
    names = _names(folder)
    configured = expected_from(folder)
    if expected is None or configured is None:
        found = "quantized tensors" if _weights_with(names, ".absmax", ".SCB") else "16-bit weights"
        detail = f"config.json has no bitsandbytes quantization_config; the files hold {found}"
        return [Check("config", False, detail)]
    checks = [_config_check(configured, expected, names)]
    if expected.bits == 4:
        checks.append(_state_check(expected, names))
    checks.append(_finite_check(folder))
    return checks


def check_models(reference: Any, candidate: Any, folder: Path, expected: Expected) -> list[Check]:
    """What the reloaded model shows: modules, ties, size."""
    return [
        _module_check(reference, candidate, expected),
        _tie_check(reference, candidate),
        _size_check(reference, candidate, folder, expected),
    ]


def weight_errors(reference: Any, candidate: Any) -> dict[str, float]:
    """Relative RMS error of every quantized module: |dequantized - source| / |source|, Frobenius norms."""
    from accelerate.utils import align_module_device
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    originals = dict(_linear_modules(reference))
    errors = {}
    for name, module in candidate.named_modules():
        if type(module).__name__ in QUANTIZED_CLASSES.values() and name in originals and _holds_codes(module):
            stored = dequantize_bnb_weight(module.weight, state=getattr(module, "state", None)).float()
            with align_module_device(originals[name]):  # an offloaded weight comes to memory for this
                source = _input_major(originals[name]).to(stored.device).float()
            distance = (stored - source).norm() if stored.shape == source.shape else math.inf
            errors[name] = float(distance / source.norm().clamp_min(1e-30))
    return errors


def logical_parameters(model: Any) -> int:
    """Parameters of a model, with what is tied counted once."""
    return sum(parameter.numel() for _, _, parameter in _distinct_parameters(model))


def weight_check(errors: dict[str, float], bits: int) -> Check:
    limit = WEIGHT_ERROR_LIMITS[bits]
    beyond = {name: error for name, error in errors.items() if not error <= limit}
    if beyond:
        worst = max(beyond, key=lambda name: beyond[name])
        detail = f"{len(beyond)} modules do not hold their source's weights, {worst} is off by {beyond[worst]:.2f}"
    else:
        detail = f"largest relative error {max(errors.values(), default=0.0):.3f} (limit {limit})"
    return Check("weights", not beyond, detail)


def arithmetic_check(at_once: float, one_by_one: float) -> Check:
    """Whether float32 sums of the stored weights say what the package's own type and kernels say.

    Both are mean KLDs in nats: of windows that are read at once, and of one that is read token by token with the
    cache, for which bitsandbytes may have another kernel.
    """
    detail = (
        f"mean KLD {at_once:.6f} (read at once) and {one_by_one:.6f} (one token at a time) between the package's own "
        f"arithmetic on this CPU and float32 sums, which are used from here on (limit {ARITHMETIC_LIMIT})"
    )
    return Check("arithmetic", max(at_once, one_by_one) <= ARITHMETIC_LIMIT, detail)


def predicted_bytes(reference: Any, candidate: Any, expected: Expected, modules: set[str]) -> int:
    """Size of the tensors that the recipe leads one to expect, in bytes, with ties counted once."""
    total = 0
    for name, key, parameter in _distinct_parameters(reference):
        if name in modules and key == "weight":
            total += _quantized_bytes(parameter.shape, expected, _block(candidate.get_submodule(name)))
        else:
            total += parameter.numel() * int(getattr(candidate.get_submodule(name), key).element_size())
    return total


def _distinct_parameters(model: Any) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Module name, parameter name and parameter, with what is tied met once.

    Weights that were offloaded are on no device and have lost their ties; then the config's word counts.
    """
    seen = set()
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            place = parameter.data_ptr() or (name, key)
            repeated = parameter.is_meta and module is model.get_output_embeddings() and _is_tied(model)
            if place not in seen and not repeated:
                yield name, key, parameter
            seen.add(place)


def _block(module: Any) -> int:
    """Weights that share a scale."""
    return int(getattr(getattr(module.weight, "quant_state", None), "blocksize", 64))


def _quantized_bytes(shape: torch.Size, expected: Expected, block: int) -> int:
    count = math.prod(shape)
    if expected.bits == 8:
        return count + 4 * min(shape)
    blocks = math.ceil(count / block)
    scales = blocks + 4 * math.ceil(blocks / 256) + 4 * 256 if expected.double_quant else 4 * blocks
    return math.ceil(count / 2) + scales + 4 * 16 + 200


def _weights_with(names: set[str], *marks: str) -> set[str]:
    """Weights that have one of these tensors beside them: `x.weight` for `x.weight.absmax` and for `x.SCB`."""
    beside = {name.removesuffix(mark) for name in names for mark in marks if name.endswith(mark)}
    return {name if name.endswith("weight") else f"{name}.weight" for name in beside}


def _config_check(configured: Expected, expected: Expected, names: set[str]) -> Check:
    promise = f"config.json says {_words(configured)}"
    if _words(configured) != _words(expected):
        return Check("config", False, f"{promise}, the recipe {_words(expected)}")
    if not _weights_with(names, ".absmax" if expected.bits == 4 else ".SCB"):
        return Check("config", False, f"{promise}, the files hold 16-bit weights only")
    return Check("config", True, f"{promise}, so do the files")


def _words(expected: Expected) -> str:
    if expected.bits == 8:
        return "8-bit"
    return f"4-bit {expected.quant_type}{' with double quantization' if expected.double_quant else ''}"


def _state_check(expected: Expected, names: set[str]) -> Check:
    state = f".quant_state.bitsandbytes__{expected.quant_type}"
    parts = [".absmax", ".quant_map", state]
    if expected.double_quant:
        parts += [".nested_absmax", ".nested_quant_map"]
    weights = _weights_with(names, *parts)
    missing = sorted(weight + part for weight in weights for part in parts if weight + part not in names)
    detail = f"missing {missing[0]} ({len(missing)} in all)" if missing else f"complete for {len(weights)} weights"
    return Check("quant_state", not missing, detail)


def _finite_check(folder: Path) -> Check:
    import torch

    for file in _weight_files(folder):
        for name, part in safetensors.parts(file):
            if part.is_floating_point() and not bool(torch.isfinite(part).all()):
                return Check("finite", False, f"{name} holds NaN or infinity")
    return Check("finite", True, f"no NaN or infinity in {len(_names(folder))} tensors")


def _module_check(reference: Any, candidate: Any, expected: Expected) -> Check:
    from transformers.quantizers.base import get_keys_to_not_convert

    linear = {name for name, _ in _linear_modules(reference)}
    head = get_keys_to_not_convert(reference) if expected.skips_head else []
    head += reference._keep_in_fp32_modules or []
    wanted = {name for name in linear if not (expected.skips(name) or _listed(name, head))}
    found = _quantized_modules(candidate, expected.bits)
    if left := sorted(wanted - found):
        return Check("modules", False, f"{left[0]} was left in 16 bits ({len(left)} of {len(wanted)} were)")
    if extra := sorted(found - wanted):
        return Check("modules", False, f"{extra[0]} was quantized and should not be ({len(extra)} such)")
    return Check(
        "modules",
        True,
        f"{len(found)} modules are {expected.bits}-bit, {len(linear - found)} are not by design",
    )


def _listed(name: str, patterns: list[str]) -> bool:
    """Whether transformers takes a module for one of a skip list's."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    return not should_convert_module(name, patterns)


def _tie_check(reference: Any, candidate: Any) -> Check:
    tied = [_is_tied(model) for model in (reference, candidate)]
    words = ["tied" if state else "separate" for state in tied]
    return Check("ties", tied[0] == tied[1], f"head and embeddings: {words[0]} in the source, {words[1]} here")


def _is_tied(model: Any) -> bool:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight.is_meta:
        return bool(model.config.get_text_config().tie_word_embeddings)
    return head is not None and head.weight.data_ptr() == embeddings.weight.data_ptr()


def _size_check(reference: Any, candidate: Any, folder: Path, expected: Expected) -> Check:
    modules = _quantized_modules(candidate, expected.bits)
    predicted = predicted_bytes(reference, candidate, expected, modules)
    actual = weight_bytes(folder)
    headers = 200 * len(_names(folder)) + 4096
    low, high = predicted * (1 - SIZE_TOLERANCE), predicted * (1 + SIZE_TOLERANCE) + headers
    detail = f"{actual / 1e6:.2f} MB, the recipe predicts {predicted / 1e6:.2f} MB"
    return Check("size", low <= actual <= high, detail)


def tokenizer_check(source: Any, folder: Path, trust_remote_code: bool) -> Check:
    """Whether the folder's tokenizer is the `source`'s."""
    try:
        own = load_tokenizer(folder, trust_remote_code)
    except Exception as error:  # noqa: BLE001 - tokenizers raises bare ones
        return Check("tokenizer", False, f"does not load: {(str(error) or type(error).__name__).splitlines()[0]}")
    if own.get_vocab() != source.get_vocab():
        return Check("tokenizer", False, "another vocabulary than the source's")
    same = own(TOKENIZER_SAMPLE).input_ids == source(TOKENIZER_SAMPLE).input_ids
    detail = "same vocabulary, same ids for a mixed sample" if same else "other ids than the source's"
    return Check("tokenizer", same, detail)


def _quantized_modules(model: Any, bits: int) -> set[str]:
    """Modules that really hold codes: of bitsandbytes' class, and with a quantized weight in it."""
    return {
        name
        for name, module in model.named_modules()
        if type(module).__name__ == QUANTIZED_CLASSES[bits] and _holds_codes(module)
    }


def _holds_codes(module: Any) -> bool:
    return getattr(module.weight, "quant_state", None) is not None or not module.weight.is_floating_point()


def _linear_modules(model: Any) -> Iterator[tuple[str, Any]]:
    """The modules that bitsandbytes can replace."""
    return ((name, module) for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D"))


def _input_major(module: Any) -> torch.Tensor:
    """A linear layer's weight as [outputs, inputs]; Conv1D keeps its transpose."""
    weight: torch.Tensor = module.weight.detach()
    return weight.t() if type(module).__name__ == "Conv1D" else weight


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _names(folder: Path) -> set[str]:
    """Of all tensors in the folder's safetensors files."""
    return {name for file in _weight_files(folder) for name in safetensors.entries(file)}
