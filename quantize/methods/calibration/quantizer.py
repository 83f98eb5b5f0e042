"""The calibrated method: every matrix rounded by GPTQ under the Hessians of its inputs and outputs.

The model runs over calibration text one decoder layer at a time; each matrix is rounded with the Hessian of its inputs
in the model as quantized so far, and, where they fit into memory, with the Hessian of the loss at its outputs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from quantize import devices
from quantize.errors import UnsupportedModel
from quantize.files import require_space
from quantize.formats import experts, source_model
from quantize.formats.bitsandbytes import checkpoint, packing
from quantize.formats.bitsandbytes.modules import laid_out, matrix
from quantize.methods.calibration import allocation, calibration_text
from quantize.methods.calibration.expert_hessians import RoutedExperts
from quantize.methods.calibration.footprint import Budget, output_hessian_bytes, require_memory, waiting_bytes
from quantize.methods.calibration.gradients import OutputGradient, output_gradients
from quantize.methods.calibration.hessian import CenteredHessianAccumulator
from quantize.methods.calibration.layers import ActivationStream, DecoderLayers, check_walk, on_device
from quantize.methods.calibration.options import CalibratedOptions
from quantize.methods.calibration.paging import PagedMemory
from quantize.methods.calibration.resume import FinishedParts, QuantizedLayer
from quantize.methods.method import Job
from quantize.methods.rounding import learned_rounding
from quantize.methods.rounding.gptq import GptqOptions
from quantize.methods.rounding.stored import compensated
from quantize.records import CalibrationText, Checkout, Quantized, Recipe

WEIGHT_TOLERANCE = 1e-3
"""Of the norm of a matrix before and after the model ran, possibly on two devices."""
TOKENS_AT_ONCE = {"cpu": 1024, "gpu": 4096}
"""Tokens that run through a decoder layer together: a CPU gains nothing from more. The number does not depend on what
memory is free, so that the same recipe always gives the same bytes."""
MAX_OUTPUT_HESSIAN_BYTES = 4 << 30
"""For the output Hessians of all matrices; a model that needs more is rounded without them."""


@dataclass(frozen=True)
class Ablation:
    """Which parts of the method are used; all of them, unless an experiment leaves some out.

    `output_hessians`: rounding is two-sided. `token_weights`: a token counts by the squared norm of its gradient.
    `bias_correction`: where there is a bias, it takes over the mean shift that rounding causes.
    """

    gptq: GptqOptions = field(default_factory=GptqOptions)
    output_hessians: bool = True
    token_weights: bool = True
    bias_correction: bool = True
    temperatures: tuple[float, ...] = calibration_text.TEMPERATURES


@dataclass(frozen=True)
class Plan:
    """How each matrix is to be rounded.

    `gradients` of one decoder layer and its matrices, and `block_sizes` of all matrices, by their names in the model.
    """

    recipe: Recipe
    dtype: str
    ablation: Ablation
    gradients: Mapping[str, OutputGradient]
    block_sizes: Mapping[str, int]

    def names(self, layer: str) -> list[str]:
        """The matrices of a decoder layer that are quantized, by their names in it."""
        inside = [name for name, block in self.block_sizes.items() if block != allocation.HALF_PRECISION]
        return [name.removeprefix(f"{layer}.") for name in inside if name.startswith(f"{layer}.")]

    def gptq(self, name: str) -> GptqOptions:
        return dataclasses.replace(self.ablation.gptq, block=self.block_sizes[name])


@dataclass(frozen=True)
class QuantizedModel:
    """Quantized layers and block sizes of all matrices by their names, and the record of the calibration text."""

    layers: dict[str, QuantizedLayer]
    block_sizes: Mapping[str, int]
    text: CalibrationText

    def with_block_size(self, block: int) -> tuple[str, ...]:
        return tuple(name for name, size in self.block_sizes.items() if size == block)


def quantize(job: Job, options: CalibratedOptions, ablation: Ablation | None = None) -> Quantized:
    """Write the source with chosen codes, scales and biases into `job.output`, in the stock files.

    Finished layers are kept in the resume folder, so that a killed run continues there.
    """
    started = time.monotonic()
    checkout, recipe, device = job.checkout, job.recipe, job.device
    dtype = checkpoint.choose_dtype(checkout, recipe, job.progress)
    ablation = ablation or Ablation(GptqOptions(passes=options.passes))
    fingerprint = {
        "source": checkout.source.fingerprint(),
        "recipe": recipe,
        "device": torch.device(device).type,
        "ablation": ablation,
        "corpus": hashlib.sha256(job.corpus.encode()).hexdigest(),
        "calibration": calibration_text.content_hash(options),
    }
    finished = FinishedParts.begin(job.resume_folder, fingerprint)
    quantized = _quantize_model(job, options, ablation, dtype, finished)
    devices.release(device)
    half_precision = quantized.with_block_size(allocation.HALF_PRECISION)
    skipping = dataclasses.replace(recipe, skip_modules=(*recipe.skip_modules, *half_precision))
    precomputed = {name: layer.tensors() for name, layer in quantized.layers.items()}
    files = FinishedParts.begin(
        finished.folder / "files", {**fingerprint, "device": device, "precomputed": finished.hashes}
    )
    written = checkpoint.write(checkout, job.output, skipping, dtype, device, job.progress, files, precomputed)
    return Quantized(
        modules=written.modules,
        kept_modules=written.kept_modules,
        dtype=dtype,
        device=device,
        seconds=round(time.monotonic() - started, 3),
        calibration_text=quantized.text,
        half_precision_modules=half_precision,
        block_32_modules=quantized.with_block_size(allocation.SMALL_BLOCK),
    )


def _quantize_model(
    job: Job, options: CalibratedOptions, ablation: Ablation, dtype: str, finished: FinishedParts
) -> QuantizedModel:
    """Prepare text, gradients and block sizes on the whole model, then quantize layer after layer."""
    device, budget = job.device, Budget.of(job.checkout.source.name, job.device)
    tokens_at_once = TOKENS_AT_ONCE[devices.kind(device)]
    model = _load_source(job.checkout, dtype, budget)
    linear = checkpoint.quantized_names(job.checkout, job.recipe)
    decoder = DecoderLayers.of(model, linear)
    names = [name for name in linear if name.startswith(f"{decoder.path}.")]
    by_gradient = _reads_gradients(job, options, ablation, model, decoder, names)
    require_memory(budget, model, decoder, names, options, tokens_at_once, by_gradient)
    bfloat16 = next(model.parameters()).dtype == torch.float32 and _computes_bfloat16(device)
    sizes = _sizes(model, names)
    model.to(device)
    tokens, record = finished.text(lambda: _calibration_text(job, options, model, bfloat16, ablation))
    batch = math.gcd(len(tokens), max(1, tokens_at_once // tokens.shape[1]))
    check_walk(model, decoder, tokens, device, bfloat16)
    _require_unchanged(sizes, _sizes(model, names))
    model.to(device)
    if by_gradient and not finished.has_gradients:
        require_space(finished.folder, output_hessian_bytes(model, names, len(decoder.layers)), "gradients")
        finished.save_gradients(_gradients(job, options, model, decoder, names, tokens, batch, bfloat16))
    block_sizes = dict.fromkeys(names, ablation.gptq.block)
    if options.size_budget > 1:
        block_sizes = finished.allocation(
            lambda: allocation.allocate(
                model, names, tokens, job.recipe, options.size_budget, dtype, device, job.progress
            )
        )
    model.to("cpu")
    devices.release(device)
    require_space(finished.folder, waiting_bytes(model, options), "hidden states")
    plan, paged = Plan(job.recipe, dtype, ablation, {}, block_sizes), PagedMemory(finished.folder)
    with ExitStack() as streams:
        stream, *source_stream = [
            streams.enter_context(ActivationStream(model, decoder, tokens, device, batch, bfloat16, paged))
            for _ in range(2 if options.epochs else 1)
        ]
        layers = _quantize_layers(
            stream, source_stream[0] if source_stream else None, plan, options.epochs, finished, job
        )
    finished.drop_gradients(len(decoder.layers))
    return QuantizedModel(layers, block_sizes, record)


def _reads_gradients(
    job: Job, options: CalibratedOptions, ablation: Ablation, model: Any, decoder: DecoderLayers, names: list[str]
) -> bool:
    """Whether the gradients are used, and are of a size that is worth while."""
    if not (ablation.output_hessians or ablation.token_weights):
        return False
    layers = len(decoder.layers) if options.epochs else 0
    if output_hessian_bytes(model, names, layers) <= MAX_OUTPUT_HESSIAN_BYTES:
        return True
    job.progress.note("output Hessians would take too much memory: each row is rounded on its own")
    return False


def _gradients(
    job: Job,
    options: CalibratedOptions,
    model: Any,
    decoder: DecoderLayers,
    names: list[str],
    tokens: torch.Tensor,
    batch: int,
    bfloat16: bool,
) -> Iterator[tuple[int, dict[str, OutputGradient]]]:
    """Of each layer's named matrices, and where rounding is learned of the layer itself, by their names."""
    inside = {
        index: [name for name in names if name.startswith(f"{decoder.name(index)}.")]
        for index in range(len(decoder.layers))
    }
    layer_of = {name: index for index, matrices in inside.items() for name in matrices}
    if options.epochs:
        layer_of |= {decoder.name(index): index for index in inside}
    ordered = sorted(layer_of, key=lambda name: layer_of[name])
    seed = options.calibration_seed
    gradients = output_gradients(
        model, decoder.layers, ordered, tokens, job.device, batch, bfloat16, seed, job.progress
    )
    for index, group in itertools.groupby(gradients, key=lambda named: layer_of[named[0]]):
        yield index, dict(group)


def _quantize_layers(
    stream: ActivationStream,
    source_stream: ActivationStream | None,
    plan: Plan,
    epochs: int,
    finished: FinishedParts,
    job: Job,
) -> dict[str, QuantizedLayer]:
    """All matrices, one decoder layer on the device at a time; finished ones are taken from the resume folder.

    Rounding is learned where there is a `source_stream`, in which all layers stay the source's.
    """
    decoder = stream.decoder
    quantized: dict[str, QuantizedLayer] = {}
    total = len(decoder.layers) * (1 + epochs)
    with job.progress.task("choosing codes and scales", total, "passes") as advance:
        for index, layer in enumerate(decoder.layers):
            with on_device(layer, stream.device):
                targets = source_stream.advance(index) if source_stream else None
                matrices = finished.layer(index)
                if matrices or not plan.names(decoder.name(index)):
                    advance(1 + epochs)
                else:
                    of_layer = dataclasses.replace(plan, gradients=finished.gradients(index))
                    matrices = _quantize_and_learn(stream, targets, index, of_layer, epochs, advance)
                    finished.save(index, matrices)
                for name, quantized_matrix in matrices.items():
                    _replace(layer.get_submodule(name), quantized_matrix)
                if index + 1 < len(decoder.layers):
                    stream.advance(index)
            quantized |= {f"{decoder.name(index)}.{name}": matrices[name] for name in matrices}
    return quantized


def _quantize_and_learn(
    stream: ActivationStream,
    targets: list[torch.Tensor] | None,
    index: int,
    plan: Plan,
    epochs: int,
    advance: Callable[[int], None],
) -> dict[str, QuantizedLayer]:
    """The matrices of a decoder layer; where there are `targets`, the source layer's outputs, rounding is learned."""
    layer, path = stream.decoder.layers[index], stream.decoder.name(index)
    names = plan.names(path)
    originals = {name: matrix(layer.get_submodule(name)) for name in names} if targets else {}
    matrices = _quantize_layer(stream, index, names, plan)
    advance(1)
    if targets is None or not matrices:
        return matrices
    objective = learned_rounding.Objective(targets, originals, plan.gradients.get(path))
    return learned_rounding.learn(stream, index, matrices, objective, epochs, advance)


def _quantize_layer(stream: ActivationStream, index: int, names: list[str], plan: Plan) -> dict[str, QuantizedLayer]:
    """Matrix after matrix in forward order, each on the inputs that the ones before it leave; experts come last."""
    layer, path = stream.decoder.layers[index], stream.decoder.name(index)
    matrices: dict[str, QuantizedLayer] = {}
    places = [place for place, _ in experts.linear_experts(layer)]
    ordered = stream.execution_order(index, places) if len(places) > 1 else [places]
    routed = [RoutedExperts(stream, index, place) for group in ordered for place in group]
    inside = {name: part for part in routed for name in names if name.startswith(f"{part.path}.")}

    def quantize_all(hessians: Mapping[str, CenteredHessianAccumulator]) -> None:
        for name, hessian in hessians.items():
            module = layer.get_submodule(name)
            matrices[name] = _quantize_matrix(module, f"{path}.{name}", hessian, plan)
            _replace(module, matrices[name])

    for group in stream.execution_order(index, [name for name in names if name not in inside]):
        quantize_all(_input_hessians(stream, index, group, plan))
    for part in routed:
        gradients = {name: plan.gradients.get(f"{path}.{name}") for name in names if inside.get(name) is part}
        weights = {name: one.token_weights for name, one in gradients.items() if one and plan.ablation.token_weights}
        for first, last in part.together(list(gradients)):
            entering = part.entering(first, weights)
            quantize_all(entering.hessians)
            quantize_all(part.leaving(last, entering.shared, weights))
    return matrices


def _input_hessians(
    stream: ActivationStream, index: int, group: list[str], plan: Plan
) -> dict[str, CenteredHessianAccumulator]:
    """The Hessians of modules that get the same inputs; one for all where no gradient weights their tokens."""
    layer, path = stream.decoder.layers[index], stream.decoder.name(index)
    gradients = {name: plan.gradients.get(f"{path}.{name}") for name in group}
    shared = not any(gradients.values())
    hessians = {
        name: CenteredHessianAccumulator(matrix(layer.get_submodule(name)).shape[1], stream.device)
        for name in (group[:1] if shared else group)
    }
    start = 0
    for inputs in stream.inputs(index, group[0]):
        stop = start + len(inputs)
        for name, hessian in hessians.items():
            gradient = gradients[name] if plan.ablation.token_weights else None
            hessian.add(inputs, gradient.token_weights[start:stop].to(stream.device) if gradient else None)
        start = stop
    return dict.fromkeys(group, hessians[group[0]]) if shared else hessians


def _quantize_matrix(module: Any, name: str, inputs: CenteredHessianAccumulator, plan: Plan) -> QuantizedLayer:
    """Codes and scales of a matrix, nearest ones where no token reached it, and a bias that corrects their mean shift.

    The bias b becomes b + (W - Q) mean(x), and then only the covariance of the inputs x counts.
    """
    weight, stored, recipe = matrix(module).float(), getattr(torch, plan.dtype), plan.recipe
    options = plan.gptq(name)
    bias = None if module.bias is None else module.bias.detach()
    if not inputs.weight or not bool(inputs.covariance.diagonal().mean() > 0):
        packed = packing.nearest(weight.to(stored), recipe.quant_type, recipe.double_quant, options.block)
        return QuantizedLayer(packed, None if bias is None else bias.to(stored))
    gradient = plan.gradients.get(name) if plan.ablation.output_hessians else None
    output_hessian = gradient.hessian.to(weight.device) if gradient else None
    corrected = plan.ablation.bias_correction and bias is not None
    hessian = inputs.covariance if corrected else inputs.hessian
    packed = compensated(weight, hessian, recipe.quant_type, recipe.double_quant, stored, options, output_hessian)
    if bias is not None and corrected:
        bias = bias.float() + (weight - packed.weight()) @ inputs.mean
    return QuantizedLayer(packed, None if bias is None else bias.to(stored))


def _load_source(checkout: Checkout, dtype: str, budget: Budget) -> Any:
    """The source on the CPU: float32 where gradients are to be taken, else in the half precision of the package."""
    small = checkout.source.parameters * 4 <= MAX_OUTPUT_HESSIAN_BYTES
    in_float32 = small or devices.kind(budget.device) == "cpu"
    budget.require("loading weights", checkout.source.parameters * (4 if in_float32 else 2))
    model = source_model.load(
        checkout.folder,
        checkout.source.name,
        dtype=torch.float32 if in_float32 else getattr(torch, dtype),
        trust_remote_code=checkout.source.remote_code,
    )
    if hasattr(model.config, "rescale_every"):
        model.config.rescale_every = 0  # RWKV would halve weights when it runs, and again when the package is loaded
    return experts.unstacked(model.eval().requires_grad_(False))


def _sizes(model: Any, names: list[str]) -> list[float]:
    """The norms of the named matrices."""
    return [float(model.get_submodule(name).weight.float().norm()) for name in names]


def _require_unchanged(before: list[float], after: list[float]) -> None:
    """Raise UnsupportedModel where running the model has changed its matrices: the files would hold them changed."""
    if not all(math.isclose(*pair, rel_tol=WEIGHT_TOLERANCE) for pair in zip(before, after, strict=True)):
        raise UnsupportedModel(
            "the model changes its weights when it runs: the calibrated recipe does not support it; use --recipe rtn"
        )


def _calibration_text(
    job: Job, options: CalibratedOptions, model: Any, bfloat16: bool, ablation: Ablation
) -> tuple[torch.Tensor, CalibrationText]:
    from transformers import AutoTokenizer

    trust = job.checkout.source.remote_code
    tokenizer = AutoTokenizer.from_pretrained(job.checkout.folder, local_files_only=True, trust_remote_code=trust)
    return calibration_text.prepare(
        options, model, tokenizer, job.corpus, job.device, bfloat16, job.progress, ablation.temperatures
    )


def _replace(module: Any, layer: QuantizedLayer) -> None:
    """Let a module of the source compute with the 4-bit values from now on."""
    module.weight.data = laid_out(module, layer.packed.weight())
    if layer.bias is not None:
        module.bias.data = layer.bias.to(module.bias)


def _computes_bfloat16(device: str) -> bool:
    """Whether products in bfloat16 are fast there; emulated ones would be slower than float32."""
    kind = torch.device(device).type
    if kind == "cpu":
        return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    return kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
