"""A function on a GPU as a CUDA graph: its kernel launches are captured once and replayed.

Where a function launches hundreds of small kernels, that takes a fraction of the time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

Tensors = tuple[torch.Tensor, ...]


class GraphedFunction:
    """A function of tensors to a tuple of tensors that always launches the same for the same shapes.

    Its first call for given shapes runs plainly, so that kernels get built; the second captures, and all later ones
    replay. On a CPU every call runs plainly. The function must not wait for the GPU.
    """

    def __init__(self, function: Callable[..., Tensors]) -> None:
        self._function = function
        self._graphs: dict[tuple[torch.Size, ...], _CapturedGraph | None] = {}

    def __call__(self, *inputs: torch.Tensor) -> Tensors:
        shapes = tuple(tensor.shape for tensor in inputs)
        if not inputs[0].is_cuda or shapes not in self._graphs:
            self._graphs[shapes] = None
            return self._function(*inputs)
        graph = self._graphs[shapes] or _CapturedGraph(self._function, inputs)
        self._graphs[shapes] = graph
        return graph.replay(inputs)


class _CapturedGraph:
    def __init__(self, function: Callable[..., Tensors], inputs: Tensors) -> None:
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        self._graph = torch.cuda.CUDAGraph()
        current_stream, capture_stream = torch.cuda.current_stream(inputs[0].device), _capture_stream(inputs[0].device)
        torch.cuda.empty_cache()  # while it captures, torch would rather fail than do that
        capture_stream.wait_stream(current_stream)
        with torch.cuda.stream(capture_stream):
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._outputs = function(*self._inputs)
            finally:
                self._graph.capture_end()
        current_stream.wait_stream(capture_stream)

    def replay(self, inputs: Tensors) -> Tensors:
        for own, tensor in zip(self._inputs, inputs, strict=True):
            own.copy_(tensor)
        self._graph.replay()
        return tuple(tensor.clone() for tensor in self._outputs)


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings, because cuBLAS keeps memory for each."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
