"""Calibration text streams through a model's decoder layers, with one layer at a time on the device."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantize import devices
from quantize.errors import UnsupportedModel


class _StopForward(Exception):
    """The inputs have been captured; the rest of the model need not run."""


@dataclass(frozen=True)
class DecoderLayers:
    """The decoder layers of a model: their common name and the list that holds them."""

    path: str
    layers: torch.nn.ModuleList

    @classmethod
    def of(cls, model: torch.nn.Module, linear: Iterable[str]) -> DecoderLayers:
        """The list of modules that holds most of the modules named in `linear`; raises UnsupportedModel."""
        names = list(linear)
        lists = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
        counts = {name: sum(linear_name.startswith(f"{name}.") for linear_name in names) for name in lists}
        best = max(counts, key=lambda name: (counts[name], -len(name)), default="")
        if not best or not counts[best]:
            raise UnsupportedModel(
                "the model is not a sequence of decoder layers: the calibrated recipe does not support it"
            )
        return cls(best, lists[best])

    def name(self, index: int) -> str:
        return f"{self.path}.{index}"


class ActivationStream:
    """Calibration text on its way through the decoder layers.

    `hidden` are hidden states, micro-batches [batch, length, width] in front of the layer that runs next, on the CPU;
    `calls` are the other arguments that the model passes to each layer, such as masks and position embeddings.
    """

    def __init__(
        self, model: Any, decoder: DecoderLayers, tokens: torch.Tensor, device: str, batch: int, bfloat16: bool
    ) -> None:
        self.decoder, self.device, self.bfloat16 = decoder, device, bfloat16
        parts = [part for part in torch.split(tokens, batch) if len(part) == batch]
        _move_rest(model, decoder, device)
        self.hidden = [self._first_input(model, part.to(device)) for part in parts]
        self.calls = self._layer_arguments(model, parts[0].to(device))

    def inputs(self, index: int, name: str) -> Iterator[torch.Tensor]:
        """The inputs of the module `name` of a layer, micro-batch after micro-batch, float [tokens, inputs]."""
        captured: list[torch.Tensor] = []

        def capture(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            captured.append(arguments[0])
            raise _StopForward

        hook = self.decoder.layers[index].get_submodule(name).register_forward_pre_hook(capture)
        try:
            for part in self.hidden:
                with contextlib.suppress(_StopForward):
                    self._run(index, part)
                if captured:
                    yield captured.pop().flatten(0, -2).float()
        finally:
            hook.remove()

    def execution_order(self, index: int, names: Iterable[str]) -> list[list[str]]:
        """The linear modules `names` of a layer as they run; those that get the very same tensor form a group."""
        inputs_by_name: dict[str, torch.Tensor] = {}
        layer = self.decoder.layers[index]

        def hook_for(name: str) -> Callable[..., None]:
            def keep(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
                inputs_by_name.setdefault(name, arguments[0])

            return keep

        hooks = [layer.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in names]
        self._run(index, self.hidden[0])
        for hook in hooks:
            hook.remove()
        groups: list[list[str]] = []
        last: torch.Tensor | None = None
        for name, tensor in inputs_by_name.items():
            if tensor is last:
                groups[-1].append(name)
            else:
                groups.append([name])
            last = tensor
        return groups

    def advance(self, index: int) -> None:
        """Run all text through a layer, micro-batch by micro-batch in the place of its inputs."""
        for position, part in enumerate(self.hidden):
            self.hidden[position] = _tensor(self._run(index, part)).cpu()

    def copy(self) -> ActivationStream:
        """Another stream of the same text, in front of the same layer."""
        other = copy.copy(self)
        other.hidden = list(self.hidden)
        return other

    def output(self, index: int, part: int, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The output of a layer for one micro-batch under other `weights`, by their names in it, with gradients."""
        arguments, named = self.calls[index]
        given = (self.hidden[part].to(self.device), *arguments)
        with autocast(self.device, self.bfloat16):
            return _tensor(torch.func.functional_call(self.decoder.layers[index], dict(weights), given, named))

    def _run(self, index: int, hidden: torch.Tensor) -> Any:
        arguments, named = self.calls[index]
        with torch.no_grad(), autocast(self.device, self.bfloat16):
            return self.decoder.layers[index](hidden.to(self.device), *arguments, **named)

    def _first_input(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        captured: list[torch.Tensor] = []

        def capture(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            captured.append(arguments[0] if arguments else named["hidden_states"])
            raise _StopForward

        hook = self.decoder.layers[0].register_forward_pre_hook(capture, with_kwargs=True)
        with contextlib.suppress(_StopForward), torch.no_grad(), autocast(self.device, self.bfloat16):
            model(tokens, use_cache=False)
        hook.remove()
        return captured[0].cpu()

    def _layer_arguments(self, model: Any, tokens: torch.Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The arguments of each layer besides the hidden state: none depends on weights, so no layer runs."""
        calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        own = [layer.forward for layer in self.decoder.layers]
        wrap = self._output_wrapper(model, tokens)
        last = len(own) - 1
        for index, layer in enumerate(self.decoder.layers):
            layer.forward = _stand_in(calls, index, wrap if index < last else _stop)
        try:
            with contextlib.suppress(_StopForward), torch.no_grad(), autocast(self.device, self.bfloat16):
                model(tokens, use_cache=False)
        finally:
            for layer, forward in zip(self.decoder.layers, own, strict=True):
                layer.forward = forward
        return [calls[index] for index in range(len(own))]

    def _output_wrapper(self, model: Any, tokens: torch.Tensor) -> Callable[[torch.Tensor], Any]:
        """Wraps a hidden state as layers return it, alone or in a tuple that begins with it: the first layer tells."""
        outputs: list[Any] = []
        first = self.decoder.layers[0].to(self.device)

        def keep(_: Any, __: Any, output: Any) -> None:
            outputs.append(output)
            raise _StopForward

        hook = first.register_forward_hook(keep)
        with contextlib.suppress(_StopForward), torch.no_grad(), autocast(self.device, self.bfloat16):
            model(tokens, use_cache=False)
        hook.remove()
        first.to("cpu")
        is_tuple = isinstance(outputs[0], tuple)
        return lambda hidden: (hidden, *outputs[0][1:]) if is_tuple else hidden


@contextlib.contextmanager
def on_device(layer: torch.nn.Module, device: str) -> Iterator[None]:
    """One layer on the device, and back on the CPU afterwards."""
    layer.to(device)
    try:
        yield
    finally:
        layer.to("cpu")
        devices.empty(device)


def autocast(device: str, bfloat16: bool) -> torch.autocast:
    """bfloat16 products over float32 weights where `bfloat16`; otherwise everything as it is stored."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bfloat16)


def _stop(hidden: torch.Tensor) -> Any:
    """Stands in for the end of the last layer: what follows would make logits of all positions."""
    raise _StopForward


def _stand_in(calls: dict[int, Any], index: int, wrap: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
    """Stands in for a layer: notes its arguments, and returns its input."""

    def forward(*arguments: Any, **named: Any) -> Any:
        hidden = arguments[0] if arguments else named.pop("hidden_states")
        calls[index] = (arguments[1:], named)
        return wrap(hidden)

    return forward


def _move_rest(model: torch.nn.Module, decoder: DecoderLayers, device: str) -> None:
    """Everything but the decoder layers onto the device."""
    inside = f"{decoder.path}."
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not name.startswith(inside):
            tensor.data = tensor.data.to(device)


def _tensor(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
