"""The launches of a function on a GPU, recorded once and replayed: small ones need not wait to be asked for each.

Where a function takes hundreds of them, a CUDA graph takes a fraction of the time.
"""

from __future__ import annotations

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
        aside = torch.cuda.Stream(given[0].device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(given[0].device))
        with torch.cuda.stream(aside):
            self._graph.capture_begin(capture_error_mode="thread_local")
            self._found = function(*self._given)
            self._graph.capture_end()
        torch.cuda.current_stream(given[0].device).wait_stream(aside)

    def replay(self, given: Tensors) -> Tensors:
        for own, one in zip(self._given, given, strict=True):
            own.copy_(one)
        self._graph.replay()
        return tuple(one.clone() for one in self._found)
