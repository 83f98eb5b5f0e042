"""Parameters that a model has under several names: a file holds them once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def is_tied(model: Any) -> bool:
    """Whether the output head of a model is its input embeddings."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight.is_meta:
        return bool(model.config.get_text_config().tie_word_embeddings)
    return head is not None and head.weight.data_ptr() == embeddings.weight.data_ptr()


def distinct_parameters(model: Any) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Module name, parameter name and parameter, with what is tied given once.

    Weights that were offloaded are on no device and have lost their ties; then the config's word counts.
    """
    seen = set()
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            identity = parameter.data_ptr() or (name, key)
            repeated = parameter.is_meta and module is model.get_output_embeddings() and is_tied(model)
            if identity not in seen and not repeated:
                yield name, key, parameter
            seen.add(identity)


def distinct_count(model: Any) -> int:
    """The number of a model's parameters, with what is tied counted once."""
    return sum(parameter.numel() for _, _, parameter in distinct_parameters(model))
