"""A causal model as a row of blocks, through which text streams with one block at a time on the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantize import devices
from quantize.errors import UnsupportedModel


class _Reached(Exception):
    """What was wanted has been seen; the rest of the model need not run."""


@dataclass(frozen=True)
class Blocks:
    """The decoder blocks of a model: their common name and the list that holds them."""

    path: str
    layers: torch.nn.ModuleList

    @classmethod
    def of(cls, model: torch.nn.Module, linear: Iterable[str]) -> Blocks:
        """The list of modules that holds most of the modules named in `linear`; raises UnsupportedModel."""
        names = list(linear)
        lists = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
        held = {name: sum(one.startswith(f"{name}.") for one in names) for name in lists}
        best = max(held, key=lambda name: (held[name], -len(name)), default="")
        if not best or not held[best]:
            raise UnsupportedModel("the model is not a row of blocks: the calibrated recipe cannot walk it")
        return cls(best, lists[best])

    def name(self, index: int) -> str:
        return f"{self.path}.{index}"


class Stream:
    """Calibration text on its way through the blocks.

    `hidden` are micro-batches [batch, length, width] in front of the block that is to run next, on the CPU; `calls`
    are the further arguments that the model gives to each block, such as masks and position embeddings.
    """

    def __init__(self, model: Any, blocks: Blocks, tokens: torch.Tensor, device: str, batch: int, fast: bool) -> None:
        self.blocks, self.device, self.fast = blocks, device, fast
        parts = [part for part in torch.split(tokens, batch) if len(part) == batch]
        _move_rest(model, blocks, device)
        self.hidden = [self._first_input(model, part.to(device)) for part in parts]
        self.calls = self._further_arguments(model, parts[0].to(device))

    def inputs(self, index: int, name: str) -> Iterator[torch.Tensor]:
        """What the module `name` of a block gets, micro-batch after micro-batch, float [tokens, inputs]."""
        caught: list[torch.Tensor] = []

        def catch(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            caught.append(arguments[0])
            raise _Reached

        hook = self.blocks.layers[index].get_submodule(name).register_forward_pre_hook(catch)
        try:
            for part in self.hidden:
                with contextlib.suppress(_Reached):
                    self._run(index, part)
                if caught:
                    yield caught.pop().flatten(0, -2).float()
        finally:
            hook.remove()

    def order(self, index: int, names: Iterable[str]) -> list[list[str]]:
        """The linear modules `names` of a block as they run; those that get the very same tensor stand together."""
        seen: dict[str, torch.Tensor] = {}
        layer = self.blocks.layers[index]

        def note(name: str) -> Callable[..., None]:
            def keep(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
                seen.setdefault(name, arguments[0])

            return keep

        hooks = [layer.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
        self._run(index, self.hidden[0])
        for hook in hooks:
            hook.remove()
        groups: list[list[str]] = []
        last: torch.Tensor | None = None
        for name, tensor in seen.items():
            if tensor is last:
                groups[-1].append(name)
            else:
                groups.append([name])
            last = tensor
        return groups

    def advance(self, index: int) -> None:
        """Run all text through a block."""
        self.hidden = [_tensor(self._run(index, part)).cpu() for part in self.hidden]

    def answer(self, index: int, part: int, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What a block makes of one micro-batch with other `weights`, by their names in it; with their gradients."""
        arguments, named = self.calls[index]
        given = (self.hidden[part].to(self.device), *arguments)
        with autocast(self.device, self.fast):
            return _tensor(torch.func.functional_call(self.blocks.layers[index], dict(weights), given, named))

    def _run(self, index: int, hidden: torch.Tensor) -> Any:
        arguments, named = self.calls[index]
        with torch.no_grad(), autocast(self.device, self.fast):
            return self.blocks.layers[index](hidden.to(self.device), *arguments, **named)

    def _first_input(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        caught: list[torch.Tensor] = []

        def catch(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            caught.append(arguments[0] if arguments else named["hidden_states"])
            raise _Reached

        hook = self.blocks.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
        with contextlib.suppress(_Reached), torch.no_grad(), autocast(self.device, self.fast):
            model(tokens, use_cache=False)
        hook.remove()
        return caught[0].cpu()

    def _further_arguments(self, model: Any, tokens: torch.Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What each block is called with besides the hidden state: none of it depends on weights, so none runs."""
        calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        own = [layer.forward for layer in self.blocks.layers]
        wrap = self._shape_of_an_answer(model, tokens)
        for index, layer in enumerate(self.blocks.layers):
            layer.forward = _recorder(calls, index, wrap)
        try:
            with torch.no_grad(), autocast(self.device, self.fast):
                model(tokens, use_cache=False)
        finally:
            for layer, forward in zip(self.blocks.layers, own, strict=True):
                layer.forward = forward
        return [calls[index] for index in range(len(own))]

    def _shape_of_an_answer(self, model: Any, tokens: torch.Tensor) -> Callable[[torch.Tensor], Any]:
        """Whether blocks answer with a tensor or with a tuple that begins with it: the first one tells."""
        answers: list[Any] = []
        first = self.blocks.layers[0].to(self.device)

        def keep(_: Any, __: Any, answer: Any) -> None:
            answers.append(answer)
            raise _Reached

        hook = first.register_forward_hook(keep)
        with contextlib.suppress(_Reached), torch.no_grad(), autocast(self.device, self.fast):
            model(tokens, use_cache=False)
        hook.remove()
        first.to("cpu")
        is_tuple = isinstance(answers[0], tuple)
        return lambda hidden: (hidden, *answers[0][1:]) if is_tuple else hidden


@contextlib.contextmanager
def on_device(layer: torch.nn.Module, device: str) -> Iterator[None]:
    """One block on the device, and back on the CPU afterwards."""
    layer.to(device)
    try:
        yield
    finally:
        layer.to("cpu")
        devices.empty(device)


def autocast(device: str, fast: bool) -> torch.autocast:
    """bfloat16 products over float32 weights where `fast`; otherwise everything as it is stored."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=fast)


def _recorder(calls: dict[int, Any], index: int, wrap: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
    """Stands in for a block: notes how it is called, and answers with its input."""

    def forward(*arguments: Any, **named: Any) -> Any:
        hidden = arguments[0] if arguments else named.pop("hidden_states")
        calls[index] = (arguments[1:], named)
        return wrap(hidden)

    return forward


def _move_rest(model: torch.nn.Module, blocks: Blocks, device: str) -> None:
    """Everything but the blocks onto the device."""
    inside = f"{blocks.path}."
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not name.startswith(inside):
            tensor.data = tensor.data.to(device)


def _tensor(answer: Any) -> torch.Tensor:
    found: torch.Tensor = answer[0] if isinstance(answer, tuple) else answer
    return found
