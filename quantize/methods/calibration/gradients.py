"""Output Hessians and token weights: gradients of the loss at the outputs of modules, on calibration text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from quantize.formats.experts import linear_experts
from quantize.logits import SlicedLogits
from quantize.methods.calibration import sampling
from quantize.methods.calibration.layers import autocast, first_tensor, uncached
from quantize.methods.rounding.gptq import HessianAccumulator
from quantize.progress import Progress

MAX_TOKEN_WEIGHT = 10_000.0
"""Times the median: no token, such as the first one of a text, may count for all the others."""


@dataclass(frozen=True)
class OutputGradient:
    """Of the loss, at the outputs of a matrix or a decoder layer.

    `hessian` [outputs, outputs] is the second moment of the gradient, with a mean diagonal of 1;
    `token_weights` [tokens] are its squared norms at the calibration tokens, with mean 1. A matrix of an expert has
    them at the tokens that are sent there; others have 1, as they may be sent there when the model is quantized.
    `magnitude` [] is that mean diagonal before, over all tokens, in nats^2 by the square of an output. There is no
    `hessian` where those of all matrices take too much memory.
    """

    token_weights: torch.Tensor
    magnitude: torch.Tensor
    hessian: torch.Tensor | None = None


def output_gradients(
    model: Any,
    layers: Iterable[torch.nn.Module],
    names: list[str],
    tokens: torch.Tensor,
    device: str,
    batch: int,
    bfloat16: bool,
    seed: int,
    progress: Progress,
    hessians: bool = True,
) -> Iterator[tuple[str, OutputGradient]]:
    """For each named module of `model` on the device, from the loss at tokens drawn from the model's own prediction.

    With those the Hessians are the Fisher information, the curvature of the KL divergence, whatever text comes next.
    Of the decoder `layers` only inputs are kept for the backward pass, and of the logits one slice at a time.
    """
    with torch.no_grad(), autocast(device, bfloat16):
        sliced = SlicedLogits.of(model, tokens[:1].to(device))
    hooks = _GradientHooks(model, names, device, tokens.numel(), hessians)
    shares = sampling.shares(len(tokens), tokens.shape[1], seed)
    with (
        _recomputed(layers),
        uncached(),
        embeddings_with_gradients(model),
        progress.task("reading gradients", len(tokens), "windows") as advance,
    ):
        for part, share in zip(torch.split(tokens, batch), torch.split(shares, batch), strict=True):
            go_back(sliced, part.to(device), share.to(device), bfloat16)
            hooks.start += part.numel()
            advance(len(part))
    return hooks.results()


def go_back(sliced: SlicedLogits, tokens: torch.Tensor, share: torch.Tensor, bfloat16: bool) -> None:
    """Run one micro-batch forwards, draw a token at each position, and take the gradients of their loss."""
    device = str(tokens.device)
    with torch.enable_grad():
        with autocast(device, bfloat16):
            states = sliced.states(tokens)
        last = states.detach().requires_grad_(True)
        with autocast(device, bfloat16):
            for part, logits in sliced.slices(last, tokens):
                rows = logits.float().flatten(0, 1)
                drawn = sampling.draw(torch.softmax(rows.detach(), -1), share[:, part].flatten())
                torch.autograd.backward(torch.nn.functional.cross_entropy(rows, drawn, reduction="sum"))
        torch.autograd.backward(states, last.grad)


@contextmanager
def _recomputed(layers: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Let layers keep nothing but their inputs for the backward pass, in which they run a second time."""
    changed = list(layers)
    for layer in changed:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward


@contextmanager
def embeddings_with_gradients(model: Any) -> Iterator[None]:
    """Let gradients reach as far as the embeddings of tokens, whose weights themselves need none."""
    hook = model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_(True).clone())
    try:
        yield
    finally:
        hook.remove()


class _GradientHooks:
    """Hooks that gather the gradients at each module's outputs."""

    def __init__(self, model: Any, names: list[str], device: str, tokens: int, hessians: bool) -> None:
        self.squared_norms: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        self.places: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        self.hessians: dict[str, HessianAccumulator] = {}
        self.device, self.start, self.tokens, self.with_hessians = device, 0, tokens, hessians
        self.widths: dict[str, int] = {}
        self.experts = dict(linear_experts(model))
        self.choices: dict[str, Any] = {}
        self.hooks = [model.get_submodule(name).register_forward_hook(self._hook(name)) for name in names]
        for path, module in self.experts.items():
            self.hooks.append(module.register_forward_pre_hook(self._keep_choices(path)))

    def results(self) -> Iterator[tuple[str, OutputGradient]]:
        """The gradients by name, each given away as soon as it is made; none that is zero or not finite."""
        for hook in self.hooks:
            hook.remove()
        for name, squared_norms in self.squared_norms.items():
            if name in self.widths:
                norms = torch.cat(squared_norms)
                magnitude = norms.sum(dtype=torch.float64).float() / self.tokens / self.widths[name]
                hessian = self.hessians.pop(name, None)
                gradient = _scaled(hessian, self._placed(name, norms), magnitude)
                squared_norms.clear()
                if gradient is not None:
                    yield name, gradient

    def _hook(self, name: str) -> Callable[..., None]:
        def accumulate(gradient: torch.Tensor) -> None:
            flat = gradient.reshape(-1, gradient.shape[-1]).float()
            self.squared_norms[name].append(flat.square().sum(1).cpu())
            self._keep_places(name)
            self.widths[name] = flat.shape[1]
            if not self.with_hessians:
                return
            if name not in self.hessians:
                self.hessians[name] = HessianAccumulator(flat.shape[1], self.device)
            self.hessians[name].add(flat)

        def watch(_: Any, __: Any, output: Any) -> None:
            # a backward hook of the module would forbid the model to add to its outputs in place
            tensor = first_tensor(output)
            if tensor.requires_grad:
                tensor.register_hook(accumulate)  # type: ignore[no-untyped-call]

        return watch

    def _keep_choices(self, path: str) -> Callable[..., None]:
        def keep(module: Any, arguments: tuple[Any, ...]) -> None:
            self.choices[path] = module.choices(*arguments)

        return keep

    def _keep_places(self, name: str) -> None:
        """Of the tokens that a module of an expert runs on, in the order in which it gets them."""
        for path, choices in self.choices.items():
            if name.startswith(f"{path}."):
                number = int(name.removeprefix(f"{path}.").partition(".")[0])
                token = self.experts[path].tokens(number, choices)
                if token is not None:
                    self.places[name].append(self.start + token.cpu())

    def _placed(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """A value for every token, NaN for those that an expert did not get."""
        if not self.places[name]:
            return values
        return torch.full((self.tokens,), torch.nan).index_copy_(0, torch.cat(self.places[name]), values)


def _scaled(
    accumulator: HessianAccumulator | None, token_weights: torch.Tensor, magnitude: torch.Tensor
) -> OutputGradient | None:
    """Both with a mean of 1; None where the gradient is zero or not finite."""
    if not 0 < float(magnitude) < float("inf"):
        return None
    hessian = None if accumulator is None else accumulator.total.div_(max(accumulator.weight, 1e-30)).cpu()
    if hessian is not None:
        size = float(hessian.diagonal().mean())
        if not 0 < size < float("inf"):
            return None
        hessian.div_(size)
    token_weights = token_weights.clamp(max=MAX_TOKEN_WEIGHT * float(token_weights.nanmedian()))
    relative = token_weights / token_weights.nanmean().clamp(min=1e-30)
    return OutputGradient(relative.nan_to_num(nan=1.0), magnitude, hessian)
