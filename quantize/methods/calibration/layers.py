"""Calibration text streams through a model's decoder layers, with one layer at a time on the device."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantize import devices
from quantize.errors import UnsupportedModel
from quantize.formats.bitsandbytes.modules import towers
from quantize.methods.calibration.paging import PagedMemory

CHECKED_WINDOWS, CHECKED_TOKENS = 2, 64
"""Of each of the two micro-batches on which the walk is compared with the whole model."""
MAX_WALK_ERROR = 0.01
"""Of hidden states, relative to their norm; products in bfloat16 differ by a few thousandths at most."""


class _StopForward(Exception):
    """The rest of the forward pass need not run."""


@dataclass(frozen=True)
class DecoderLayers:
    """The decoder layers of a model: their common name and the list that holds them."""

    path: str
    layers: torch.nn.ModuleList

    @classmethod
    def of(cls, model: torch.nn.Module, linear: Iterable[str]) -> DecoderLayers:
        """The list of modules that holds most of the modules named in `linear`, in the language model of one that has
        towers as well; raises UnsupportedModel."""
        outside = tuple(f"{tower}." for tower in towers(model))
        names = [name for name in linear if not name.startswith(outside)]
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
    """Calibration text on its way through the decoder layers, in micro-batches.

    Each micro-batch has a forward pass of the model's own, held in front of the layer that runs next: what the model
    gives to a layer besides the hidden states, and what it computes between two layers, is then its own for every
    micro-batch, on what the layers before really returned. Hidden states wait in `memory`, where there is one. To be
    closed, or used in a `with`.
    """

    def __init__(
        self,
        model: Any,
        decoder: DecoderLayers,
        tokens: torch.Tensor,
        device: str,
        batch: int,
        bfloat16: bool,
        memory: PagedMemory | None = None,
    ) -> None:
        self.decoder, self.device, self.bfloat16, self._memory = decoder, device, bfloat16, memory
        parts = [part for part in torch.split(tokens, batch) if len(part) == batch]
        self.tokens_each = batch * tokens.shape[1]
        _move_rest(model, decoder, device)
        self._forwards = [_HeldForward(self._forward(model, part.to(device))) for part in parts]
        self._standing_in = _standing_in(decoder.layers)
        self._standing_in.__enter__()
        try:
            with self._embeddings_paged(model):
                for forward in self._forwards:
                    forward.begin()
                    self._page(forward.entering)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ActivationStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all passes where they are."""
        for forward in self._forwards:
            forward.abandon()
        self._standing_in.__exit__(None, None, None)

    def inputs(self, index: int, name: str) -> Iterator[torch.Tensor]:
        """The inputs of the module `name` of a layer, micro-batch after micro-batch, float [tokens, inputs]."""
        return (arguments[0].flatten(0, -2).float() for arguments in self.arguments(index, name))

    def arguments(self, index: int, name: str) -> Iterator[tuple[torch.Tensor, ...]]:
        """What the module `name` of a layer is called with, micro-batch after micro-batch."""
        captured: list[tuple[torch.Tensor, ...]] = []

        def capture(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            captured.append(arguments)
            raise _StopForward

        hook = self.decoder.layers[index].get_submodule(name).register_forward_pre_hook(capture)
        try:
            for part in range(len(self._forwards)):
                with contextlib.suppress(_StopForward):
                    self._run(index, part)
                if captured:
                    yield captured.pop()
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
        self._run(index, 0)
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

    def advance(self, index: int) -> list[torch.Tensor]:
        """Run all text through a layer, up to the next; returns the layer's outputs, a micro-batch each, on the CPU."""
        return [self._advance(index, part) for part in range(len(self._forwards))]

    def output(self, index: int, part: int, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The output of a layer for one micro-batch under other `weights`, by their names in it, with gradients."""
        call = self._call(index, part)
        layer = self.decoder.layers[index]
        with autocast(self.device, self.bfloat16):
            return first_tensor(torch.func.functional_call(layer, dict(weights), call.arguments, call.named))

    def _advance(self, index: int, part: int) -> torch.Tensor:
        output = self._run(index, part)
        hidden = first_tensor(output).cpu()
        self._page(hidden)
        if index + 1 < len(self.decoder.layers):
            forward = self._forwards[part]
            forward.resume(output)
            if forward.entering is not hidden:
                self._page(forward.entering)
        return hidden

    def _run(self, index: int, part: int) -> Any:
        call = self._call(index, part)
        with torch.no_grad(), autocast(self.device, self.bfloat16):
            return self.decoder.layers[index](*call.arguments, **call.named)

    def _call(self, index: int, part: int) -> _LayerCall:
        if self._memory is not None:
            self._memory.release()
        call = self._forwards[part].call
        if call is None or call.layer is not self.decoder.layers[index]:
            raise UnsupportedModel(
                "the decoder layers do not run one after another, each once: the calibrated recipe does not support "
                "this model"
            )
        return call

    def _page(self, value: object) -> None:
        """Let a tensor wait where it takes none of the process's own memory; some embeddings return other things."""
        if self._memory is not None and isinstance(value, torch.Tensor):
            self._memory.take(value)

    @contextlib.contextmanager
    def _embeddings_paged(self, model: Any) -> Iterator[None]:
        """Within, embeddings are paged as well: a forward pass holds them to its end."""

        def page(_: Any, __: Any, output: object) -> None:
            self._page(output)

        modules = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
        hooks = [module.register_forward_hook(page) for module in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _forward(self, model: Any, tokens: torch.Tensor) -> Callable[[], Any]:
        def forward() -> Any:
            with torch.no_grad(), autocast(self.device, self.bfloat16):
                return model(tokens, use_cache=False)

        return forward


def check_walk(model: Any, decoder: DecoderLayers, tokens: torch.Tensor, device: str, bfloat16: bool) -> None:
    """Raise UnsupportedModel where walking through the layers gives other hidden states than the model itself.

    On two micro-batches of `tokens` [windows, length], with the whole model on the device; its layers are on the CPU
    afterwards.
    """
    sample = torch.cat([tokens[:CHECKED_WINDOWS], tokens[-CHECKED_WINDOWS:]])[:, :CHECKED_TOKENS]
    batch = len(sample) // 2
    expected = [_last_output(model, decoder, part.to(device), device, bfloat16) for part in torch.split(sample, batch)]
    decoder.layers.to("cpu")
    outputs: list[torch.Tensor] = []
    with ActivationStream(model, decoder, sample, device, batch, bfloat16) as stream:
        for index, layer in enumerate(decoder.layers):
            with on_device(layer, device):
                outputs = stream.advance(index)
    for walked, whole in zip(outputs, expected, strict=True):
        error = float((walked.float() - whole.float()).norm() / whole.float().norm().clamp(min=1e-30))
        if not error <= MAX_WALK_ERROR:
            raise UnsupportedModel(
                f"layer by layer the hidden states differ from the model's own by {error:.1%}: the calibrated recipe "
                f"does not support this model; use --recipe rtn"
            )


def _last_output(model: Any, decoder: DecoderLayers, tokens: torch.Tensor, device: str, bfloat16: bool) -> torch.Tensor:
    """What the last decoder layer returns in a forward pass of the whole model."""
    outputs: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        outputs.append(first_tensor(output).cpu())

    hook = decoder.layers[-1].register_forward_hook(keep)
    try:
        with torch.no_grad(), autocast(device, bfloat16):
            model(tokens, use_cache=False)
    finally:
        hook.remove()
    if not outputs:
        raise UnsupportedModel("the last decoder layer never runs: the calibrated recipe does not support this model")
    return outputs[-1]


@dataclass(frozen=True)
class _LayerCall:
    """A decoder layer, and what the model passes to it."""

    layer: torch.nn.Module
    arguments: tuple[Any, ...]
    named: dict[str, Any]


class _HeldForward(threading.Thread):
    """A forward pass that waits in front of each decoder layer until the layer's output is handed to it.

    A thread of its own is what lets it wait; it never runs beside the thread that resumes it. `call` is what the
    model passes to the layer that it waits for, None where the pass has ended.
    """

    def __init__(self, forward: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.call: _LayerCall | None = None
        self._forward = forward
        self._calls: queue.SimpleQueue[_LayerCall | BaseException | None] = queue.SimpleQueue()
        self._outputs: queue.SimpleQueue[Any] = queue.SimpleQueue()

    @property
    def entering(self) -> torch.Tensor | None:
        """The hidden states that wait for a layer."""
        given = (*self.call.arguments, *self.call.named.values()) if self.call else ()
        return next((value for value in given if isinstance(value, torch.Tensor)), None)

    def begin(self) -> None:
        """Run up to the first layer."""
        self.start()
        self._wait()

    def resume(self, output: Any) -> None:
        """Go on with what the layer returned, up to the next one."""
        self._outputs.put(output)
        self._wait()

    def abandon(self) -> None:
        """End here."""
        if self.is_alive():
            self._outputs.put(_StopForward())
            self.join()

    def run(self) -> None:
        try:
            self._forward()
            self._calls.put(None)
        except _StopForward:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits for it
            self._calls.put(error)

    def output_of(self, layer: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """What a layer returns, once the other thread has run it; called by the model."""
        self._calls.put(_LayerCall(layer, arguments, named))
        output = self._outputs.get()
        if isinstance(output, _StopForward):
            raise output
        return output

    def _wait(self) -> None:
        call = self._calls.get()
        if isinstance(call, BaseException):
            self.call = None
            raise call
        self.call = call


@contextlib.contextmanager
def _standing_in(layers: torch.nn.ModuleList) -> Iterator[None]:
    """Within, decoder layers that run in a held forward wait there for their output; anywhere else they run."""
    own = [layer.forward for layer in layers]
    for layer in layers:
        layer.forward = _stand_in(layer, layer.forward)
    try:
        with uncached():
            yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            layer.forward = forward


@contextlib.contextmanager
def on_device(layer: torch.nn.Module, device: str) -> Iterator[None]:
    """One layer on the device, and back on the CPU afterwards."""
    layer.to(device)
    try:
        yield
    finally:
        layer.to("cpu")
        devices.empty(device)


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Within, nothing is kept of keys and values: layers run more than once here, and XLM caches unasked."""
    from transformers.cache_utils import Cache

    own = Cache.update
    Cache.update = lambda _, keys, values, *__, **___: (keys, values)
    try:
        yield
    finally:
        Cache.update = own


def autocast(device: str, bfloat16: bool) -> torch.autocast:
    """bfloat16 products over float32 weights where `bfloat16`; otherwise everything as it is stored."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bfloat16)


def _stand_in(layer: torch.nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*arguments: Any, **named: Any) -> Any:
        thread = threading.current_thread()
        return (
            thread.output_of(layer, arguments, named) if isinstance(thread, _HeldForward) else own(*arguments, **named)
        )

    return forward


def _move_rest(model: torch.nn.Module, decoder: DecoderLayers, device: str) -> None:
    """Everything but the decoder layers onto the device."""
    inside = f"{decoder.path}."
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not name.startswith(inside):
            tensor.data = tensor.data.to(device)


def first_tensor(output: Any) -> torch.Tensor:
    """The hidden states among what a module returns."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden
