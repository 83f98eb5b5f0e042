"""The calibrated method: every matrix rounded by GPTQ under the Hessians of its inputs and outputs.

The model runs over calibration text one decoder layer at a time; each matrix is rounded with the Hessian of its inputs
in the model as quantized so far, and, where they fit into memory, with the Hessian of the loss at its outputs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
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
from quantize.formats.bitsandbytes.sizes import BLOCK
from quantize.methods.calibration import allocation, calibration_text
from quantize.methods.calibration.allocation import Offers, StorageOption
from quantize.methods.calibration.expert_hessians import RoutedExperts
from quantize.methods.calibration.footprint import Budget, output_hessian_bytes, require_memory, waiting_bytes
from quantize.methods.calibration.gradients import OutputGradient, output_gradients
from quantize.methods.calibration.hessian import CenteredHessianAccumulator
from quantize.methods.calibration.layers import ActivationStream, DecoderLayers, check_walk, on_device
from quantize.methods.calibration.options import CalibratedOptions
from quantize.methods.calibration.paging import PagedMemory
from quantize.methods.calibration.resume import FinishedLayers, PreparedParts, QuantizedLayer
from quantize.methods.method import Job
from quantize.methods.rounding import gptq, learned_rounding
from quantize.methods.rounding.gptq import GptqOptions
from quantize.methods.rounding.stored import compensated
from quantize.records import CalibrationText, Checkout, Quantized, Recipe
from quantize.resume import ResumeFolder

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
    What a matrix would make the model diverge is predicted in all block sizes where they are `compared`.
    """

    recipe: Recipe
    dtype: str
    ablation: Ablation
    gradients: Mapping[str, OutputGradient]
    block_sizes: Mapping[str, int]
    compared: bool = False

    def names(self, layer: str) -> list[str]:
        """The matrices of a decoder layer that are quantized, by their names in it."""
        inside = [name for name, block in self.block_sizes.items() if block != allocation.HALF_PRECISION]
        return [name.removeprefix(f"{layer}.") for name in inside if name.startswith(f"{layer}.")]

    def gptq(self, block: int) -> GptqOptions:
        return dataclasses.replace(self.ablation.gptq, block=block)


@dataclass(frozen=True)
class Prepared:
    """A source on the CPU, ready for a walk through its decoder layers.

    `tokens` [windows, length] run in micro-batches of `batch` windows; matrices `names` are to be quantized.
    """

    model: Any
    decoder: DecoderLayers
    names: list[str]
    tokens: torch.Tensor
    record: CalibrationText
    batch: int
    bfloat16: bool


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
    common = shared_parts(job, options, ablation)
    block_sizes = None
    if options.size_budget > 1:
        block_sizes = offers(job, options, ablation).within(options.size_budget)
    fingerprint = {**_inputs(job, ablation), "recipe": recipe, "block sizes": block_sizes}
    finished = FinishedLayers.begin(job.resume_folder / "layers", fingerprint)
    quantized = _quantize_model(job, options, ablation, dtype, common, finished, block_sizes)
    devices.release(device)
    half_precision = quantized.with_block_size(allocation.HALF_PRECISION)
    skipping = dataclasses.replace(recipe, skip_modules=(*recipe.skip_modules, *half_precision))
    precomputed = {name: layer.tensors() for name, layer in quantized.layers.items()}
    files = ResumeFolder.begin(
        job.resume_folder / "files", {**fingerprint, "device": device, "precomputed": finished.hashes}
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


def offers(job: Job, options: CalibratedOptions, ablation: Ablation | None = None) -> Offers:
    """What each matrix makes the model diverge in each form that it can be stored in, as this recipe rounds it.

    All are rounded in a walk of their own, and their errors weighed by the Hessians of inputs and outputs. Every
    attempt on the same text shares the result.
    """
    dtype = checkpoint.choose_dtype(job.checkout, job.recipe, job.progress)
    ablation = ablation or Ablation(GptqOptions(passes=options.passes))
    common = shared_parts(job, options, ablation)
    return common.offers(lambda: _compare_forms(job, options, ablation, dtype, common))


def _compare_forms(
    job: Job, options: CalibratedOptions, ablation: Ablation, dtype: str, common: PreparedParts
) -> Offers:
    unlearned = dataclasses.replace(options, epochs=0)
    prepared = _prepared(job, unlearned, ablation, dtype, common, gradients=True)
    shapes = {name: matrix(prepared.model.get_submodule(name)).shape for name in prepared.names}
    others = 2 * (prepared.model.num_parameters() - sum(shape.numel() for shape in shapes.values()))
    plan = Plan(job.recipe, dtype, ablation, {}, dict.fromkeys(prepared.names, BLOCK), compared=True)
    inputs = {**_inputs(job, ablation), "common": common.hashes}
    finished = FinishedLayers.begin(common.folder / "layers", inputs)
    layers = _walk(prepared, plan, 0, common, finished, job)
    compared: dict[str, tuple[StorageOption, ...]] = {}
    for name, (rows, width) in shapes.items():
        divergences = layers[name].divergences
        if divergences is None:
            others += allocation.stored_bytes(rows, width, BLOCK, job.recipe.double_quant)
        else:
            of_blocks = dict(zip(allocation.block_sizes(width), divergences.tolist(), strict=True))
            compared[name] = allocation.options(rows, width, job.recipe.double_quant, of_blocks)
    return Offers(compared, others)


def _inputs(job: Job, ablation: Ablation) -> dict[str, Any]:
    """What decides about a walk besides its recipe."""
    return {
        "source": job.checkout.source.fingerprint(),
        "recipe": dataclasses.replace(job.recipe, options={}),
        "device": torch.device(job.device).type,
        "ablation": ablation,
        "corpus": hashlib.sha256(job.corpus.encode()).hexdigest(),
    }


def shared_parts(job: Job, options: CalibratedOptions, ablation: Ablation) -> PreparedParts:
    """What all attempts on the same text share; begun, or as far as it was finished."""
    inputs = {
        **_inputs(job, dataclasses.replace(ablation, gptq=GptqOptions())),
        "text": dataclasses.replace(options, size_budget=1.0, passes=0, epochs=0),
        "calibration": calibration_text.content_hash(options),
    }
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=dataclasses.asdict).encode()).hexdigest()
    return PreparedParts.begin(job.shared_folder / f"text-{digest[:12]}", inputs)


def _quantize_model(
    job: Job,
    options: CalibratedOptions,
    ablation: Ablation,
    dtype: str,
    common: PreparedParts,
    finished: FinishedLayers,
    block_sizes: Mapping[str, int] | None,
) -> QuantizedModel:
    """Quantize layer after layer, in blocks of one size where there are no `block_sizes`."""
    prepared = _prepared(job, options, ablation, dtype, common, gradients=block_sizes is not None)
    sizes = dict.fromkeys(prepared.names, ablation.gptq.block) | dict(block_sizes or {})
    plan = Plan(job.recipe, dtype, ablation, {}, sizes)
    return QuantizedModel(_walk(prepared, plan, options.epochs, common, finished, job), sizes, prepared.record)


def _prepared(
    job: Job, options: CalibratedOptions, ablation: Ablation, dtype: str, common: PreparedParts, gradients: bool
) -> Prepared:
    """Load the source, and have its text and gradients; `gradients` are read even where Hessians are too large."""
    device, budget = job.device, Budget.of(job.checkout.source.name, job.device)
    tokens_at_once = TOKENS_AT_ONCE[devices.kind(device)]
    model = _load_source(job.checkout, dtype, budget)
    linear = checkpoint.quantized_names(job.checkout, job.recipe)
    decoder = DecoderLayers.of(model, linear)
    names = [name for name in linear if name.startswith(f"{decoder.path}.")]
    hessians = _reads_hessians(job, options, ablation, model, decoder, names)
    learning = options.epochs > 0
    require_memory(budget, model, decoder, names, options, tokens_at_once, hessians)
    bfloat16 = next(model.parameters()).dtype == torch.float32 and _computes_bfloat16(device)
    sizes = _sizes(model, names)
    model.to(device)
    tokens, record = common.text(lambda: calibration_text.of_job(job, options, model, bfloat16, ablation.temperatures))
    batch = math.gcd(len(tokens), max(1, tokens_at_once // tokens.shape[1]))
    check_walk(model, decoder, tokens, device, bfloat16)
    _require_unchanged(sizes, _sizes(model, names))
    model.to(device)
    prepared = Prepared(model, decoder, names, tokens, record, batch, bfloat16)
    if (hessians or gradients) and not common.has_gradients(learning):
        require_space(common.folder, output_hessian_bytes(model, names, len(decoder.layers)), "gradients")
        common.save_gradients(_gradients(job, options, prepared, hessians), learning)
    model.to("cpu")
    devices.release(device)
    require_space(common.folder, waiting_bytes(model, options), "hidden states")
    return prepared


def _walk(
    prepared: Prepared, plan: Plan, epochs: int, common: PreparedParts, finished: FinishedLayers, job: Job
) -> dict[str, QuantizedLayer]:
    """All matrices by their names in the model, which computes with the quantized ones afterwards."""
    paged = PagedMemory(finished.folder)
    with ExitStack() as streams:
        stream, *source_stream = [
            streams.enter_context(
                ActivationStream(
                    prepared.model,
                    prepared.decoder,
                    prepared.tokens,
                    job.device,
                    prepared.batch,
                    prepared.bfloat16,
                    paged,
                )
            )
            for _ in range(2 if epochs else 1)
        ]
        return _quantize_layers(
            stream, source_stream[0] if source_stream else None, plan, epochs, common, finished, job
        )


def _reads_hessians(
    job: Job, options: CalibratedOptions, ablation: Ablation, model: Any, decoder: DecoderLayers, names: list[str]
) -> bool:
    """Whether output Hessians are used, and are of a size that is worth while."""
    if not (ablation.output_hessians or ablation.token_weights):
        return False
    layers = len(decoder.layers) if options.epochs else 0
    if output_hessian_bytes(model, names, layers) <= MAX_OUTPUT_HESSIAN_BYTES:
        return True
    job.progress.note("output Hessians would take too much memory: each row is rounded on its own")
    return False


def _gradients(
    job: Job, options: CalibratedOptions, prepared: Prepared, hessians: bool
) -> Iterator[tuple[int, dict[str, OutputGradient]]]:
    """Of each layer's named matrices, and where rounding is learned of the layer itself, by their names."""
    decoder = prepared.decoder
    inside = {
        index: [name for name in prepared.names if name.startswith(f"{decoder.name(index)}.")]
        for index in range(len(decoder.layers))
    }
    layer_of = {name: index for index, matrices in inside.items() for name in matrices}
    if options.epochs:
        layer_of |= {decoder.name(index): index for index in inside}
    ordered = sorted(layer_of, key=lambda name: layer_of[name])
    gradients = output_gradients(
        prepared.model,
        decoder.layers,
        ordered,
        prepared.tokens,
        job.device,
        prepared.batch,
        prepared.bfloat16,
        options.calibration_seed,
        job.progress,
        hessians,
    )
    for index, group in itertools.groupby(gradients, key=lambda named: layer_of[named[0]]):
        yield index, dict(group)


def _quantize_layers(
    stream: ActivationStream,
    source_stream: ActivationStream | None,
    plan: Plan,
    epochs: int,
    common: PreparedParts,
    finished: FinishedLayers,
    job: Job,
) -> dict[str, QuantizedLayer]:
    """All matrices, one decoder layer on the device at a time; finished ones are taken from the resume folder.

    Rounding is learned where there is a `source_stream`, in which all layers stay the source's.
    """
    decoder = stream.decoder
    quantized: dict[str, QuantizedLayer] = {}
    total = len(decoder.layers) * (1 + epochs)
    task = "comparing block sizes" if plan.compared else "choosing codes and scales"
    with job.progress.task(task, total, "passes") as advance:
        for index, layer in enumerate(decoder.layers):
            with on_device(layer, stream.device):
                targets = source_stream.advance(index) if source_stream else None
                matrices = finished.layer(index)
                if matrices or not plan.names(decoder.name(index)):
                    advance(1 + epochs)
                else:
                    of_layer = dataclasses.replace(plan, gradients=common.gradients(index))
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
    block = plan.block_sizes[name]
    bias = None if module.bias is None else module.bias.detach()
    if not inputs.weight or not bool(inputs.covariance.diagonal().mean() > 0):
        packed = packing.nearest(weight.to(stored), recipe.quant_type, recipe.double_quant, block)
        return QuantizedLayer(packed, None if bias is None else bias.to(stored))
    gradient = plan.gradients.get(name)
    output_hessian = None
    if gradient and gradient.hessian is not None and plan.ablation.output_hessians:
        output_hessian = gradient.hessian.to(weight.device)
    corrected = plan.ablation.bias_correction and bias is not None
    hessian = inputs.covariance if corrected else inputs.hessian

    def rounded(block: int) -> packing.Packed:
        return compensated(
            weight, hessian, recipe.quant_type, recipe.double_quant, stored, plan.gptq(block), output_hessian
        )

    packed, divergences = rounded(block), None
    if plan.compared and gradient:
        others = (rounded(size) for size in allocation.block_sizes(weight.shape[1])[1:])
        errors = [weight - form.weight().float() for form in (packed, *others)]
        losses = [float(gptq.loss(error, hessian, output_hessian)) for error in errors]
        divergences = torch.tensor(losses) * float(gradient.magnitude) / 2
    if bias is not None and corrected:
        bias = bias.float() + (weight - packed.weight()) @ inputs.mean
    return QuantizedLayer(packed, None if bias is None else bias.to(stored), divergences)


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
