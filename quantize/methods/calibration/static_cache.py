"""A key-value cache that has room from the beginning, where the library's own copies all of it for each token."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [..., tokens, width] of at most `room` tokens, as views of memory taken once."""

    def __init__(self, begun: DynamicLayer, room: int) -> None:
        super().__init__()
        self._held = [one.new_empty(*one.shape[:-2], room, one.shape[-1]) for one in (begun.keys, begun.values)]
        self.lazy_initialization(begun.keys, begun.values)
        self.update(begun.keys, begun.values)

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Take over what is new, and return all that there is."""
        before = self.get_seq_length()
        after = before + keys.shape[-2]
        for held, new in zip(self._held, (keys, values), strict=True):
            held[..., before:after, :] = new
        self.keys, self.values = (held[..., :after, :] for held in self._held)
        return self.keys, self.values


def make_room(cache: Any, room: int) -> Any:
    """The cache that a model began, with layers that hold up to `room` tokens in place of those that would grow."""
    layers = getattr(cache, "layers", [])
    for index, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            layers[index] = RoomyLayer(layer, room)
    return cache
