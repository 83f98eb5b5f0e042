"""A static key-value cache: memory for all tokens is taken once, where the library's own copies the cache per token."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer


class StaticLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [..., tokens, width] of at most `max_tokens` tokens, as views of memory taken once."""

    def __init__(self, layer: DynamicLayer, max_tokens: int) -> None:
        super().__init__()
        self._buffers = [
            tensor.new_empty(*tensor.shape[:-2], max_tokens, tensor.shape[-1]) for tensor in (layer.keys, layer.values)
        ]
        self.lazy_initialization(layer.keys, layer.values)
        self.update(layer.keys, layer.values)

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new keys and values, and return all of them."""
        before = self.get_seq_length()
        after = before + keys.shape[-2]
        for buffer, new in zip(self._buffers, (keys, values), strict=True):
            buffer[..., before:after, :] = new
        self.keys, self.values = (buffer[..., :after, :] for buffer in self._buffers)
        return self.keys, self.values


def make_static(cache: Any, max_tokens: int) -> Any:
    """The cache of a model with static layers of up to `max_tokens` tokens in place of growing ones."""
    layers = getattr(cache, "layers", [])
    for index, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            layers[index] = StaticLayer(layer, max_tokens)
    return cache
