"""Better codes and scales for the same file: rounding that looks at what each error does to the model's outputs.

The model runs over calibration text block by block; each matrix is rounded with the second moments of its inputs in the
model as it is quantized so far, and, where they fit into memory, those of the loss's gradient at its outputs.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from quantize import devices
from quantize.formats.bitsandbytes import checkpoint, packing
from quantize.formats.bitsandbytes.modules import laid_out, matrix
from quantize.methods.calibration import allocation, calibration_text
from quantize.methods.calibration.gradients import Gradient, gradients
from quantize.methods.calibration.layers import Blocks, Stream, on_device
from quantize.methods.calibration.options import CalibratedOptions
from quantize.methods.calibration.resume import FinishedParts, QuantizedLayer
from quantize.methods.method import Job
from quantize.methods.rounding import learned_rounding
from quantize.methods.rounding.gptq import Moments, Search
from quantize.methods.rounding.stored import compensated
from quantize.records import CalibrationText, Checkout, Quantized, Recipe

TOKENS_AT_ONCE = 4096
"""How many run through a block side by side."""
MOST_OUTPUT_MOMENTS = 4 << 30
"""Bytes for the moments of all gradients; a model that needs more is rounded without them."""


@dataclass(frozen=True)
class Method:
    """Which parts of the recipe are used; all of them, unless an experiment leaves some out.

    `coupled`: rounding minds the moments of the loss's gradient at the outputs. `weighed`: tokens count by that
    gradient's energy. `centred`: where there is a bias, it takes over what rounding shifts on average.
    """

    search: Search = field(default_factory=Search)
    coupled: bool = True
    weighed: bool = True
    centred: bool = True
    temperatures: tuple[float, ...] = calibration_text.TEMPERATURES


def quantize(job: Job, options: CalibratedOptions, method: Method | None = None) -> Quantized:
    """Write the source with chosen codes, scales and biases into `job.output`, in the stock files.

    Finished layers are kept in the resume folder, so that a killed run goes on there.
    """
    started = time.monotonic()
    checkout, recipe, device = job.checkout, job.recipe, job.device
    dtype = checkpoint.choose_dtype(checkout, recipe, job.progress)
    method = method or Method(search=Search(sweeps=options.passes))
    made_of = {
        "source": checkout.source.fingerprint(),
        "recipe": recipe,
        "device": torch.device(device).type,
        "method": method,
    }
    work = FinishedParts.begin(job.resume_folder, made_of)
    chosen, forms, record = _choose(job, options, dtype, work, method)
    devices.release(device)
    spared = tuple(name for name, block in forms.items() if block == allocation.HALF)
    skipping = dataclasses.replace(recipe, skip_modules=(*recipe.skip_modules, *spared))
    precomputed = {name: one.tensors() for name, one in chosen.items()}
    files = FinishedParts.begin(
        work.folder / "files", {**made_of, "device": device, "precomputed": sorted(precomputed)}
    )
    written = checkpoint.write(checkout, job.output, skipping, dtype, device, job.progress, files.folder, precomputed)
    return Quantized(
        modules=written.modules,
        kept_modules=written.kept_modules,
        dtype=dtype,
        device=device,
        seconds=round(time.monotonic() - started, 3),
        calibration_text=record,
        half_precision_modules=spared,
        block_32_modules=tuple(name for name, block in forms.items() if block == allocation.FINE),
    )


def _choose(
    job: Job, options: CalibratedOptions, dtype: str, work: FinishedParts, method: Method
) -> tuple[dict[str, QuantizedLayer], dict[str, int], CalibrationText]:
    checkout, recipe, device, progress = job.checkout, job.recipe, job.device, job.progress
    names = checkpoint.quantized_names(checkout, recipe)
    model = _load_source(checkout, dtype, device)
    fast = next(model.parameters()).dtype == torch.float32 and _computes_bfloat16(device)
    model.to(device)
    tokens, record = work.text(lambda: _text(job, options, model, fast, method))
    batch = math.gcd(len(tokens), max(1, TOKENS_AT_ONCE // tokens.shape[1]))
    blocks = Blocks.of(model, names)
    inside = [name for name in names if name.startswith(f"{blocks.path}.")]
    felt_blocks = [blocks.name(index) for index in range(len(blocks.layers)) if options.epochs]
    slopes: dict[str, Gradient] = {}
    wanted = method.coupled or method.weighed
    fits = _output_moment_bytes(model, inside, len(felt_blocks)) <= MOST_OUTPUT_MOMENTS
    if wanted and fits:
        slopes = gradients(
            model, [*inside, *felt_blocks], tokens, device, batch, fast, options.calibration_seed, progress
        )
    elif wanted:
        progress.note("the gradients' moments would take too much memory: rows are rounded each for itself")
    forms = dict.fromkeys(inside, method.search.block)
    if options.size_budget > 1:
        forms = work.forms(
            lambda: allocation.allocate(model, inside, tokens, recipe, options.size_budget, dtype, device, progress)
        )
    model.to("cpu")
    devices.release(device)
    stream = Stream(model, blocks, tokens, device, batch, fast)
    original = copy.copy(stream) if options.epochs else None
    chosen: dict[str, QuantizedLayer] = {}
    with progress.task("choosing codes and scales", len(blocks.layers) * (1 + options.epochs), "passes") as advance:
        for index, layer in enumerate(blocks.layers):
            own = [name.removeprefix(f"{blocks.name(index)}.") for name in inside if _in(name, blocks.name(index))]
            rounded = [name for name in own if forms[f"{blocks.name(index)}.{name}"] != allocation.HALF]
            with on_device(layer, device):
                if original:
                    original.advance(index)
                found = work.block(index)
                if found or not rounded:
                    advance(1 + options.epochs)
                else:
                    weights = {name: matrix(layer.get_submodule(name)) for name in rounded} if original else {}
                    found = _round_block(stream, index, rounded, slopes, forms, recipe, dtype, method)
                    advance(1)
                    if original and found:
                        aims, slope = original.hidden, slopes.get(blocks.name(index))
                        found = learned_rounding.learn(
                            stream, index, aims, weights, found, slope, options.epochs, advance
                        )
                    work.keep(index, found)
                for name, one in found.items():
                    _replace(layer.get_submodule(name), one)
                if index + 1 < len(blocks.layers):
                    stream.advance(index)
            chosen |= {f"{blocks.name(index)}.{name}": one for name, one in found.items()}
    return chosen, forms, record


def _round_block(
    stream: Stream,
    index: int,
    names: list[str],
    slopes: Mapping[str, Gradient],
    forms: Mapping[str, int],
    recipe: Recipe,
    dtype: str,
    method: Method,
) -> dict[str, QuantizedLayer]:
    """Matrix after matrix in forward order, each on the inputs that the ones before it leave."""
    layer, found = stream.blocks.layers[index], {}
    for group in stream.order(index, names):
        modules = {name: layer.get_submodule(name) for name in group}
        slope = {name: slopes.get(f"{stream.blocks.name(index)}.{name}") for name in group}
        alike = not any(slope.values())  # then what one of the group sees is what all see
        watched = group[:1] if alike else group
        gathered = {name: Seen(matrix(modules[name]).shape[1], stream.device) for name in watched}
        start = 0
        for inputs in stream.inputs(index, group[0]):
            for name, moments in gathered.items():
                one = slope[name] if method.weighed else None
                energy = None if one is None else one.energy[start : start + len(inputs)].to(stream.device)
                moments.add(inputs, energy)
            start += len(inputs)
        for name, module in modules.items():
            seen = gathered[group[0] if alike else name]
            search = dataclasses.replace(method.search, block=forms[f"{stream.blocks.name(index)}.{name}"])
            found[name] = _choose_matrix(
                module, seen, slope[name], recipe, dtype, dataclasses.replace(method, search=search)
            )
            _replace(module, found[name])
    return found


def _choose_matrix(
    module: Any, seen: Seen, slope: Gradient | None, recipe: Recipe, dtype: str, method: Method
) -> QuantizedLayer:
    """Codes and scales for one matrix, nearest ones where nothing ever reached it, and a bias for what they shift."""
    weight, stored = matrix(module).float(), getattr(torch, dtype)
    if not seen.weight or not bool(seen.covariance.diagonal().mean() > 0):
        packed = packing.nearest(weight.to(stored), recipe.quant_type, recipe.double_quant, method.search.block)
        return QuantizedLayer(packed, None if module.bias is None else module.bias.detach().to(stored))
    coupling = slope.moments.to(weight.device) if slope and method.coupled else None
    centred = method.centred and module.bias is not None
    moments = seen.covariance if centred else seen.moments
    packed = compensated(weight, moments, recipe.quant_type, recipe.double_quant, stored, method.search, coupling)
    if not centred:
        return QuantizedLayer(packed, None if module.bias is None else module.bias.detach().to(stored))
    shift = (weight - packed.weight()) @ seen.mean
    return QuantizedLayer(packed, (module.bias.detach().float() + shift).to(stored))


class Seen:
    """Second moments of a module's inputs around a point near their mean, so that float32 keeps the small ones."""

    def __init__(self, inputs: int, device: str) -> None:
        self._around, self._first = torch.zeros(inputs, device=device), torch.zeros(inputs, device=device)
        self._second = Moments(inputs, device)

    @property
    def weight(self) -> float:
        return self._second.weight

    def add(self, inputs: torch.Tensor, energy: torch.Tensor | None) -> None:
        """Count `inputs` [tokens, inputs], each as much as its `energy` [tokens] says."""
        if not self.weight:
            self._around = inputs.mean(0)
        near = inputs - self._around
        self._second.add(near, energy)
        self._first += near.sum(0) if energy is None else energy @ near

    @property
    def mean(self) -> torch.Tensor:
        return self._around + self._first / self.weight

    @property
    def covariance(self) -> torch.Tensor:
        off = self._first / self.weight
        return self._second.mean - torch.outer(off, off)

    @property
    def moments(self) -> torch.Tensor:
        return self.covariance + torch.outer(self.mean, self.mean)


def _load_source(checkout: Checkout, dtype: str, device: str) -> Any:
    """The source on the CPU: float32 where gradients are to be taken, else in the half precision of the package."""
    from transformers import AutoModelForCausalLM

    small = checkout.source.parameters * 4 <= MOST_OUTPUT_MOMENTS
    model = AutoModelForCausalLM.from_pretrained(
        checkout.folder,
        dtype=torch.float32 if small or torch.device(device).type == "cpu" else getattr(torch, dtype),
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=checkout.source.remote_code,
    )
    return model.eval().requires_grad_(False)


def _text(
    job: Job, options: CalibratedOptions, model: Any, fast: bool, method: Method
) -> tuple[torch.Tensor, CalibrationText]:
    from transformers import AutoTokenizer

    trust = job.checkout.source.remote_code
    tokenizer = AutoTokenizer.from_pretrained(job.checkout.folder, local_files_only=True, trust_remote_code=trust)
    return calibration_text.prepare(
        options, model, tokenizer, job.corpus, job.device, fast, job.progress, method.temperatures
    )


def _replace(module: Any, one: QuantizedLayer) -> None:
    """Let a module of the source compute with the 4-bit values from now on."""
    module.weight.data = laid_out(module, one.packed.weight())
    if one.bias is not None:
        module.bias.data = one.bias.to(module.bias)


def _in(name: str, block: str) -> bool:
    return name.startswith(f"{block}.")


def _output_moment_bytes(model: Any, names: list[str], blocks: int) -> int:
    """Of the gradients at the outputs of the named matrices and of so many whole blocks."""
    widths = [len(matrix(model.get_submodule(name))) for name in names]
    return sum(4 * width**2 for width in [*widths, *[model.config.get_text_config().hidden_size] * blocks])


def _computes_bfloat16(device: str) -> bool:
    """Whether products in bfloat16 are fast there; emulated ones would be slower than float32."""
    kind = torch.device(device).type
    if kind == "cpu":
        return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    return kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
