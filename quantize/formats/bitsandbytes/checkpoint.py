"""A quantized checkpoint as stock transformers and bitsandbytes write it: which modules, which config, which files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quantize.errors import CorruptModel, DeviceError, UnsupportedModel, storage_errors
from quantize.formats import safetensors
from quantize.formats.bitsandbytes import tensor_plan, writer
from quantize.formats.bitsandbytes.modules import matrix
from quantize.formats.bitsandbytes.tensor_plan import NotKnown
from quantize.formats.bitsandbytes.writer import MatrixRounding
from quantize.progress import Progress
from quantize.records import Checkout, Recipe

MAX_SHARD = 5_000_000_000
QUANTIZED_CLASSES = ("Linear4bit", "Linear8bitLt")
MOST_STACKED = 0.1
LINEAR_CLASSES = ("Linear", "Conv1D")
PrecomputedTensors = Mapping[str, Mapping[str, Any]]
"""Tensors by the names of the modules that have them, and by what they are called there."""
CODES, BIAS = "weight", "bias"
"""Of what is precomputed for a module."""
HALF_TYPES = {"F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Written:
    """What a checkpoint holds: names of the modules that are quantized, and of linear ones that are not."""

    modules: tuple[str, ...]
    kept_modules: tuple[str, ...]


def write(
    checkout: Checkout,
    output: Path,
    recipe: Recipe,
    dtype: str,
    device: str,
    progress: Progress,
    resume: Path,
    precomputed: PrecomputedTensors = MappingProxyType({}),
    rounding: MatrixRounding | None = None,
) -> Written:
    """Write the package's weights and config into `output`.

    Matrices become what `rounding` makes of them, nearest codes where none is given; modules whose tensors are
    `precomputed` get those. Tensors are streamed, so that the model need not fit into memory; where the architecture
    asks for more than that, the model is loaded and saved. Finished files are kept in the folder `resume`.
    """
    import torch

    model = _skeleton(checkout, dtype)
    modules = _becoming(checkout, model, recipe)
    _require_some(modules, checkout)
    _require_mostly_linear(model, checkout.source.name)
    try:
        planned = tensor_plan.plan(checkout, model, modules, getattr(torch, dtype), precomputed)
    except NotKnown as reason:
        progress.note(f"{reason}: the model is loaded as a whole")
        if rounding is not None:
            precomputed = _rounded_whole(checkout, recipe, dtype, device, rounding)
        return _load_and_save(checkout, output, recipe, dtype, device, progress, precomputed)
    writer.write(planned, output, resume, recipe, device, MAX_SHARD, progress, rounding)
    model.config.quantization_config = _bitsandbytes_config(checkout, recipe, dtype)
    model.config.dtype, model.config.architectures = dtype, [type(model).__name__]
    with storage_errors(output):
        model.config.save_pretrained(output)
        if model.can_generate():
            _generation_config(model, checkout).save_pretrained(output)
    return Written(modules, tuple(name for name in kept_modules(model) if name not in modules))


def _rounded_whole(
    checkout: Checkout, recipe: Recipe, dtype: str, device: str, rounding: MatrixRounding
) -> PrecomputedTensors:
    """What `rounding` makes of every matrix of a source that is loaded as a whole."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkout.folder,
        dtype=getattr(torch, dtype),
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=checkout.source.remote_code,
    )
    modules = {name: model.get_submodule(name) for name in _becoming(checkout, model, recipe)}
    return {name: rounding(matrix(module).to(device)) for name, module in modules.items()}


def _load_and_save(
    checkout: Checkout,
    output: Path,
    recipe: Recipe,
    dtype: str,
    device: str,
    progress: Progress,
    precomputed: PrecomputedTensors,
) -> Written:
    if _half_type(checkout, recipe):  # the weights were not looked at before
        choose_dtype(checkout, recipe, progress)
    model = load_quantized(checkout, recipe, dtype, device)
    for name, parts in precomputed.items():
        _put(model.get_submodule(name), parts, device)
    return Written(save(model, checkout, output), kept_modules(model))


def _put(module: Any, parts: Mapping[str, Any], device: str) -> None:
    """Give a 4-bit module other contents."""
    from bitsandbytes.nn import Params4bit

    stats = {name: tensor for name, tensor in parts.items() if name not in (CODES, BIAS)}
    module.weight = Params4bit.from_prequantized(parts[CODES], stats, device=device, module=module)
    if BIAS in parts:
        module.bias.data = parts[BIAS].to(module.bias)


def half_precision(checkout: Checkout, recipe: Recipe, progress: Progress) -> str:
    """The type of what stays in half precision; looks at every weight where that depends on them."""
    return _half_type(checkout, recipe) or choose_dtype(checkout, recipe, progress)


def _half_type(checkout: Checkout, recipe: Recipe) -> str | None:
    """The type of what stays in half precision, None where that depends on the weights."""
    return HALF_TYPES.get(checkout.source.dtype) if recipe.compute_dtype == "auto" else recipe.compute_dtype


def choose_dtype(checkout: Checkout, recipe: Recipe, progress: Progress) -> str:
    """The type of what stays in half precision, after a look at every weight; raises CorruptModel."""
    suitable = _inspect_weights(checkout, progress)
    return suitable if recipe.compute_dtype == "auto" else recipe.compute_dtype


def save(model: Any, checkout: Checkout, output: Path) -> tuple[str, ...]:
    """Write a quantized model as `save_pretrained` does; the names of its quantized modules.

    Raises UnsupportedModel where there are none, or where most weights are not in linear layers.
    """
    modules = _modules_of(model, QUANTIZED_CLASSES)
    _require_some(modules, checkout)
    _require_mostly_linear(model, checkout.source.name)
    model.generation_config = _generation_config(model, checkout)
    with storage_errors(output):
        model.save_pretrained(output, max_shard_size=MAX_SHARD)
    return modules


def _require_some(modules: tuple[str, ...], checkout: Checkout) -> None:
    if not modules:
        raise UnsupportedModel(f"{checkout.source.name} has no linear layer left to quantize: skip fewer modules")


def _generation_config(model: Any, checkout: Checkout) -> Any:
    """The source's own is copied, even one that saving would refuse, so nothing is written in its place."""
    from transformers import GenerationConfig

    has_own = any(file.path == "generation_config.json" for file in checkout.source.files)
    return GenerationConfig() if has_own else model.generation_config


def kept_modules(model: Any) -> tuple[str, ...]:
    """Names of the linear modules that are not quantized."""
    return _modules_of(model, LINEAR_CLASSES)


def quantized_names(checkout: Checkout, recipe: Recipe) -> tuple[str, ...]:
    """Names of the modules that become 4-bit, in the order of the model; nothing is loaded for it."""
    return _becoming(checkout, _skeleton(checkout), recipe)


def _becoming(checkout: Checkout, model: Any, recipe: Recipe) -> tuple[str, ...]:
    """Names of the linear modules of the source's `model` that become 4-bit (or 8-bit)."""
    skipped = set(_skipped(checkout, model, recipe))
    return tuple(name for name in _modules_of(model, LINEAR_CLASSES) if not _under(name, skipped))


def _under(name: str, skipped: set[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in skipped)


def skipped_modules(checkout: Checkout, recipe: Recipe) -> list[str]:
    """Full names of what stays as it is: the head and what is tied to it, always, and what the recipe skips.

    Stock `llm_int8_skip_modules` replaces the default list, so a skip list of one's own would quantize the head.
    """
    return _skipped(checkout, _skeleton(checkout), recipe)


def _skeleton(checkout: Checkout, dtype: str = "float32") -> Any:
    """The source's model without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = checkout.source.remote_code
    config = AutoConfig.from_pretrained(checkout.folder, local_files_only=True, trust_remote_code=trust)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=trust)


def _skipped(checkout: Checkout, model: Any, recipe: Recipe) -> list[str]:
    from transformers.quantizers.base import get_keys_to_not_convert

    linear = _modules_of(model, LINEAR_CLASSES)
    for wanted in recipe.skip_modules:
        if not any(Recipe(skip_modules=(wanted,)).skips(name) for name in linear):
            raise UnsupportedModel(f"--skip-modules {wanted}: {checkout.source.name} has no linear module of that name")
    return sorted({*get_keys_to_not_convert(model), *filter(recipe.skips, linear)})


def _require_mostly_linear(model: Any, name: str) -> None:
    """Mixture-of-experts models may stack their experts in one tensor, which bitsandbytes passes over."""
    sizes = [(parameter.ndim, parameter.numel()) for parameter in model.parameters()]
    stacked = sum(size for dimensions, size in sizes if dimensions > 2)
    if stacked > MOST_STACKED * sum(size for _, size in sizes):
        raise UnsupportedModel(
            f"{name} keeps most weights in stacked expert tensors, which bitsandbytes leaves in half precision: "
            f"mixture-of-experts models of this kind cannot be quantized here"
        )


def _modules_of(model: Any, classes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name, module in model.named_modules() if type(module).__name__ in classes)


def load_quantized(checkout: Checkout, recipe: Recipe, dtype: str, device: str) -> Any:
    """The source as stock transformers and bitsandbytes quantize it; raises DeviceError."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            checkout.folder,
            quantization_config=_bitsandbytes_config(checkout, recipe, dtype),
            dtype=getattr(torch, dtype),
            device_map={"": device},
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=checkout.source.remote_code,
        )
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"{checkout.source.name} does not fit on {device}: try --device cpu") from error


def _bitsandbytes_config(checkout: Checkout, recipe: Recipe, dtype: str) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    skip = skipped_modules(checkout, recipe) if recipe.skip_modules else None
    if recipe.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=recipe.quant_type,
        bnb_4bit_use_double_quant=recipe.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=skip,
    )


def _inspect_weights(checkout: Checkout, progress: Progress) -> str:
    """The half-precision type that suits the source; raises CorruptModel at the first NaN or infinity.

    Half-precision sources keep their type. Float32 ones become float16, which has three more bits of precision
    than bfloat16, unless a value lies beyond its range.
    """
    import torch

    source, largest = checkout.source, 0.0
    with progress.task("reading weights", source.parameters, "weights") as advance:
        for shard in (file.path for file in source.files if file.path.endswith(".safetensors")):
            for name, values in safetensors.parts(checkout.folder / shard):
                if values.is_floating_point() and values.numel():
                    bound = float(values.abs().max())
                    if not bound < float("inf"):
                        raise CorruptModel(f"{name} in {shard} holds NaN or infinity: the source is damaged")
                    largest = max(largest, bound)
                advance(values.numel())
    if source.dtype in HALF_TYPES:
        return HALF_TYPES[source.dtype]
    return "float16" if largest <= torch.finfo(torch.float16).max else "bfloat16"
