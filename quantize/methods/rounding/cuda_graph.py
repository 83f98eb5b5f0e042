"""The launches of a function on a GPU, recorded once and replayed: small ones need not wait to be asked for each.

Where a function takes hundreds of them, a CUDA graph takes a fraction of the time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

Tensors = tuple[torch.Tensor, ...]


class Recorded:
    """A function of tensors to a tuple of tensors that always launches the same for the same shapes.

    Its first call for given shapes runs plainly, so that kernels get built; the second records, and all later ones
    replay. On a CPU every call runs plainly. The function must not wait for the GPU.
    """

    def __init__(self, function: Callable[..., Tensors]) -> None:
        self._function = function
        self._recordings: dict[tuple[torch.Size, ...], _Recording | None] = {}

    def __call__(self, *given: torch.Tensor) -> Tensors:
        shapes = tuple(one.shape for one in given)
        if not given[0].is_cuda or shapes not in self._recordings:
            self._recordings[shapes] = None
            return self._function(*given)
        recording = self._recordings[shapes] or _Recording(self._function, given)
        self._recordings[shapes] = recording
        return recording.replay(given)


class _Recording:
    def __init__(self, function: Callable[..., Tensors], given: Tensors) -> None:
        self._given = tuple(one.clone() for one in given)
        self._graph = torch.cuda.CUDAGraph()
        here, aside = torch.cuda.current_stream(given[0].device), _aside(given[0].device)
        torch.cuda.empty_cache()  # while it records, torch would rather fail than do that
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._found = function(*self._given)
            finally:
                self._graph.capture_end()
        here.wait_stream(aside)

    def replay(self, given: Tensors) -> Tensors:
        for own, one in zip(self._given, given, strict=True):
            own.copy_(one)
        self._graph.replay()
        return tuple(one.clone() for one in self._found)


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings, because cuBLAS keeps memory for each."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
