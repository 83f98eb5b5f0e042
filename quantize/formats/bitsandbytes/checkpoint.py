"""Writes a quantized checkpoint as stock transformers and bitsandbytes do: weights, config, generation config."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quantize.documents import read_json
from quantize.errors import CorruptModel, memory_errors, storage_errors
from quantize.files import CONFIG, GENERATION_CONFIG
from quantize.formats import experts, safetensors, source_model
from quantize.formats.bitsandbytes import config, modules, tensor_plan, writer
from quantize.formats.bitsandbytes.sizes import MatrixFormat
from quantize.formats.bitsandbytes.tensor_plan import NotKnown, PrecomputedTensors
from quantize.formats.bitsandbytes.writer import MatrixRounding
from quantize.formats.bounds import are_bounds
from quantize.formats.ties import distinct_parameters
from quantize.progress import Progress
from quantize.records import Checkout, Recipe
from quantize.resume import ResumeFolder

MAX_SHARD = 5_000_000_000
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
    resume: ResumeFolder,
    precomputed: PrecomputedTensors = MappingProxyType({}),
    rounding: MatrixRounding | None = None,
) -> Written:
    """Write the package's weights and config into `output`.

    Matrices become what `rounding` makes of them, nearest codes where none is given; modules whose tensors are
    `precomputed` get those. Tensors are streamed, so that the model need not fit into memory; where the architecture
    asks for more than that, the model is loaded and saved. Finished files are kept in `resume`.
    """
    import torch

    model = experts.unstacked(source_model.skeleton(checkout, dtype))
    names = modules.to_quantize(model, recipe, checkout.source.name)
    modules.require_quantized(names, model, checkout.source.name)
    modules.require_mostly_linear(model, checkout.source.name)
    tensor_plan.require_readable(model, checkout.source.name)
    try:
        plans = tensor_plan.plan(checkout, model, names, getattr(torch, dtype), precomputed)
    except NotKnown as reason:
        if experts.has_linear_experts(model):
            raise tensor_plan.without_whole_model(checkout.source.name, str(reason)) from None
        progress.note(f"{reason}: the model is loaded as a whole")
        if rounding is not None:
            precomputed = _rounded_whole(checkout, recipe, dtype, device, rounding)
        return _load_and_save(checkout, output, recipe, dtype, device, progress, precomputed)
    writer.write(plans, output, resume, recipe, device, MAX_SHARD, progress, rounding)
    with storage_errors(output):
        config.write(checkout, output, model, _quantization_config(model, checkout, recipe, dtype), dtype)
        if experts.has_linear_experts(model):
            experts.add_code(output)
        if model.can_generate():
            _write_generation_config(checkout, output)
    return Written(names, _kept(model, names))


def _rounded_whole(
    checkout: Checkout, recipe: Recipe, dtype: str, device: str, rounding: MatrixRounding
) -> PrecomputedTensors:
    """What `rounding` makes of every matrix of a source that is loaded as a whole."""
    import torch

    source = checkout.source
    model = source_model.load(
        checkout.folder, source.name, dtype=getattr(torch, dtype), trust_remote_code=source.remote_code
    )
    names = modules.to_quantize(model, recipe, checkout.source.name)
    return {name: rounding(modules.matrix(model.get_submodule(name)).to(device)) for name in names}


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
        _replace_contents(model.get_submodule(name), parts, device)
    names = save(model, checkout, output)
    return Written(names, _kept(model, names))


def _kept(model: Any, quantized: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the linear modules that are not quantized, those that transformers passes over last."""
    linear = (*modules.linear_names(model), *modules.passed_over(model))
    return tuple(name for name in linear if name not in quantized)


def _replace_contents(module: Any, parts: Mapping[str, Any], device: str) -> None:
    """Give a 4-bit module other weights, and another bias where there is one."""
    from bitsandbytes.nn import Params4bit

    stats = {name: tensor for name, tensor in parts.items() if name not in (CODES, BIAS)}
    module.weight = Params4bit.from_prequantized(parts[CODES], stats, device=device, module=module)
    if BIAS in parts:
        module.bias.data = parts[BIAS].to(module.bias)


def half_precision(checkout: Checkout, recipe: Recipe, progress: Progress) -> str:
    """The type of what stays in half precision; looks at every weight where that depends on them."""
    return _half_type(checkout, recipe) or choose_dtype(checkout, recipe, progress)


def _half_type(checkout: Checkout, recipe: Recipe) -> str | None:
    """The type of what stays in half precision, None where the weights have to be looked at for it."""
    own, requested = HALF_TYPES.get(checkout.source.dtype), recipe.compute_dtype
    if requested in ("auto", own):
        return own
    return requested if own == "float16" else None  # every float16 fits into bfloat16


def choose_dtype(checkout: Checkout, recipe: Recipe, progress: Progress) -> str:
    """The type of what stays in half precision, after a look at every weight.

    Half-precision sources keep their type. Float32 ones become float16, which has three more bits of precision than
    bfloat16, unless a value lies beyond its range. Raises CorruptModel at the first NaN or infinity, and
    UnsupportedModel where the type that was asked for is too small.
    """
    name, largest = _largest_weight(checkout, progress)
    dtype = recipe.compute_dtype
    if dtype == "auto":
        suitable = "float16" if writer.fits(largest, "float16") else "bfloat16"
        dtype = HALF_TYPES.get(checkout.source.dtype, suitable)
    if not writer.fits(largest, dtype):
        raise writer.overflow(name, largest, dtype)
    return dtype


def save(model: Any, checkout: Checkout, output: Path) -> tuple[str, ...]:
    """Write a quantized model as `save_pretrained` does; the names of its quantized modules.

    Raises UnsupportedModel where there are none, or where most weights are not in linear layers.
    """
    from transformers import GenerationConfig

    names = modules.quantized_names(model)
    modules.require_quantized(names, model, checkout.source.name)
    modules.require_mostly_linear(model, checkout.source.name)
    quantization, dtype = model.config.quantization_config, str(model.dtype).removeprefix("torch.")
    model.generation_config = GenerationConfig()  # saving would refuse some that sources have
    with storage_errors(output):
        model.save_pretrained(output, max_shard_size=MAX_SHARD)
        config.write(checkout, output, model, quantization, dtype)
        (output / GENERATION_CONFIG).unlink(missing_ok=True)
        if model.can_generate():
            _write_generation_config(checkout, output)
    return names


def _write_generation_config(checkout: Checkout, output: Path) -> None:
    """Write generation_config.json where the source has none, of what its config.json says of generation.

    Stock transformers does so as well. What it would refuse to write stays in config.json alone, where it reads it.
    """
    from transformers import GenerationConfig

    if any(file.path == GENERATION_CONFIG for file in checkout.source.files):
        return
    own = read_json(checkout.folder / CONFIG, CONFIG, CorruptModel, finite=False)
    with suppress(ValueError):
        GenerationConfig.from_model_config(own).save_pretrained(output)


def quantized_names(checkout: Checkout, recipe: Recipe) -> tuple[str, ...]:
    """Names of the modules that become 4-bit, in the order of the model; nothing is loaded for it."""
    model = experts.unstacked(source_model.skeleton(checkout))
    return modules.to_quantize(model, recipe, checkout.source.name)


def plain_bytes(checkout: Checkout, recipe: Recipe) -> int:
    """Bytes of the tensors that nearest codes would make of a source; nothing is loaded for it.

    What stays in half precision counts two bytes a parameter, and the headers of files are left out.
    """
    import torch

    model = experts.unstacked(source_model.skeleton(checkout, "float16"))
    names = set(modules.to_quantize(model, recipe, checkout.source.name))
    total = 0
    for module, key, parameter in distinct_parameters(model):
        if module in names and key == "weight":
            total += MatrixFormat.of(recipe).stored_bytes(*modules.matrix(model.get_submodule(module)).shape)
        else:
            total += parameter.numel() * torch.float16.itemsize
    return total


def load_quantized(checkout: Checkout, recipe: Recipe, dtype: str, device: str) -> Any:
    """The source as stock transformers and bitsandbytes quantize it; raises DeviceError."""
    import torch

    with memory_errors(f"loading {checkout.source.name} on {device}", "try --device cpu"):
        return source_model.load(
            checkout.folder,
            checkout.source.name,
            quantization_config=_quantization_config(source_model.skeleton(checkout), checkout, recipe, dtype),
            dtype=getattr(torch, dtype),
            device_map={"": device},
            trust_remote_code=checkout.source.remote_code,
        )


def _quantization_config(model: Any, checkout: Checkout, recipe: Recipe, dtype: str) -> Any:
    """The skip list is left to transformers unless more stays as it is than it leaves alone itself."""
    towers = modules.towers(model) and not recipe.quantize_towers
    own_list = recipe.skip_modules or modules.kept_besides(model) or towers
    skip_list = modules.to_skip(model, recipe, checkout.source.name) if own_list else None
    return config.build(recipe, dtype, skip_list)


def _largest_weight(checkout: Checkout, progress: Progress) -> tuple[str, float]:
    """The largest absolute value of the source and its tensor; raises CorruptModel at the first NaN or infinity."""
    source, largest = checkout.source, ("", 0.0)
    with progress.task("reading weights", source.parameters, "weights") as advance:
        for shard in (file.path for file in source.files if safetensors.is_weights(file.path)):
            for name, values in safetensors.parts(checkout.folder / shard):
                if values.is_floating_point() and values.numel():
                    bound = float(values.abs().max())
                    if bound < float("inf"):
                        largest = max(largest, (f"{name} in {shard}", bound), key=lambda named: named[1])
                    elif not are_bounds(values):
                        raise CorruptModel(f"{name} in {shard} holds NaN or infinity: the source is damaged")
                advance(values.numel())
    return largest
