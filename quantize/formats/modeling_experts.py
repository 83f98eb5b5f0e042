"""Mixture-of-experts models whose experts are linear layers, one expert beside the other, as in transformers 4.

transformers 5 keeps the experts of a layer in one tensor, and bitsandbytes quantizes linear layers only. Here every
expert has linear layers of its own. What is computed stays the same: only where the weights lie is different.

This file is a part of quantize-bnb, and of each package that needs it. Its config.json names the classes here in
`auto_map`, so transformers imports this file where it is called with `trust_remote_code=True`. It reads no files and
opens no connections. Where transformers keeps experts apart itself, it changes nothing.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

PREFIX = "Unstacked"
"""Before the name of a class of transformers, in that of the class here."""
USUAL_NAMES = ("gate_proj", "up_proj", "down_proj")
OTHER_NAMES = dict.fromkeys(
    ("mixtral", "minimax", "minimax_m2", "minimax_m3_vl_text", "phimoe", "lfm2_moe", "kimi_linear", "deepseek_v4"),
    ("w1", "w3", "w2"),
)
"""What checkpoints call the linear layers of an expert, by the type of the model."""


class LinearExperts(nn.Module):
    """The experts of one layer, called 0, 1, 2 ..., in the place of a module that stacks them.

    Weights are views of the stacked ones. Whatever else that module had, such as its activation, is taken over.
    """

    act_fn: Any
    gating: Any
    has_post_expert_norm = False
    """Which no model of transformers before 5.20 has, nor names."""
    post_expert_norm: Any

    def __init__(self, stacked: Any) -> None:
        super().__init__()
        self.__dict__.update({name: value for name, value in vars(stacked).items() if not name.startswith("_")})
        for name, module in stacked.named_children():
            self.add_module(name, module)
        self.gating = type(stacked)._apply_gate
        for number in range(stacked.num_experts):
            self.add_module(str(number), nn.ModuleDict(_linear_layers(stacked, number)))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum [tokens, width] of the experts that each token is sent to, summed in float32."""
        total = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
        for number in torch.unique(top_k_index).tolist():
            token, place = torch.where(top_k_index == number)
            output = self.expert(number, hidden_states[token]) * top_k_weights[token, place, None]
            total.index_add_(0, token, output.to(total.dtype))
        return total.to(hidden_states.dtype)

    def expert(self, number: int, states: torch.Tensor) -> torch.Tensor:
        """What one expert makes of the hidden states [tokens, width] that are sent to it."""
        *_, down = self.get_submodule(str(number)).children()
        states = down(self.gated(number, states))
        return self.post_expert_norm(states) if self.has_post_expert_norm else states

    def gated(self, number: int, states: torch.Tensor) -> torch.Tensor:
        """What the last linear layer of an expert gets."""
        *inner, _ = self.get_submodule(str(number)).children()
        outputs = [linear(states) for linear in inner]
        if self.has_gate:
            both = torch.cat(outputs, dim=-1) if self.is_concatenated else torch.stack(outputs, dim=-1).flatten(-2)
            result: torch.Tensor = self.gating(self, both)
        else:
            result = self.act_fn(outputs[0])
        return result


def is_stacked(module: nn.Module) -> bool:
    """Whether a module is what transformers makes of experts that it stacks."""
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts")
    weight = getattr(module, "down_proj", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 3 and all(hasattr(module, flag) for flag in flags)


def tensors_of(module: Any) -> dict[str, list[tuple[str, str]]]:
    """By the names of a module's stacked tensors, those of one expert's linear layers, as pairs of layer and tensor."""
    *inner, down = linear_names(module)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    names = {first: [(name, "weight") for name in inner], "down_proj": [(down, "weight")]}
    if module.has_bias:
        names |= {f"{first}_bias": [(name, "bias") for name in inner], "down_proj_bias": [(down, "bias")]}
    return names


def linear_names(module: Any) -> tuple[str, ...]:
    """What the linear layers of an expert are called, in the order in which they run."""
    gate, up, down = OTHER_NAMES.get(module.config.model_type, USUAL_NAMES)
    return (gate, up, down) if module.has_gate else (up, down)


def split(module: Any, name: str, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What one expert's part `values` of the stacked tensor `name` holds for each of its linear layers, as views."""
    rows = values.T if module.is_transposed and values.ndim == 2 else values
    if len(tensors_of(module)[name]) == 1:
        return (rows,)
    half = len(rows) // 2
    return (rows[:half], rows[half:]) if module.is_concatenated else (rows[::2], rows[1::2])


def _linear_layers(stacked: Any, number: int) -> dict[str, nn.Module]:
    """The linear layers of one expert, by their names."""
    tensors: dict[str, dict[str, nn.Parameter]] = {}
    for name, targets in tensors_of(stacked).items():
        parameter = getattr(stacked, name)
        for (layer, kind), part in zip(targets, split(stacked, name, parameter.detach()[number]), strict=True):
            tensors.setdefault(layer, {})[kind] = nn.Parameter(part, requires_grad=parameter.requires_grad)
    return {layer: _linear(**parts) for layer, parts in tensors.items()}


def _linear(weight: nn.Parameter, bias: nn.Parameter | None = None) -> nn.Linear:
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    layer.weight = weight
    layer.register_parameter("bias", bias)
    return layer


class _Unstacking:
    """Lets a model of transformers have linear experts from the beginning."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        unstack(self)


def unstack(model: Any) -> Any:
    """Give a model of transformers linear experts wherever it stacks them, and return it.

    transformers would merge them again while it loads the model: its list of conversions is taken over without those.
    """
    stacked = [name for name, module in model.named_modules() if is_stacked(module)]
    if not stacked:
        return model
    from transformers.conversion_mapping import get_model_conversion_mapping, register_checkpoint_conversion_mapping

    model.__class__ = stock_class(model)
    conversions = [item for item in get_model_conversion_mapping(model, add_legacy=False) if not _merges_experts(item)]
    for name in stacked:
        model.set_submodule(name, LinearExperts(model.get_submodule(name)))
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and any(isinstance(part, LinearExperts) for part in module.modules()):
            stock: Any = type(module)
            module.__class__ = _same_elsewhere(stock)
    model.__class__ = unstacking(stock_class(model))
    register_checkpoint_conversion_mapping(type(model).__name__, conversions, overwrite=True)
    return model


def stock_class(model: Any) -> Any:
    """The class of transformers that a model is of, with linear experts or without."""
    classes = (kind for kind in type(model).__mro__ if issubclass(kind, PreTrainedModel))
    return next(kind for kind in classes if kind.__module__ != __name__)


@functools.cache
def unstacking(stock: Any) -> Any:
    """A class of transformers whose models have linear experts."""
    return type(PREFIX + stock.__name__, (_Unstacking, stock), {"__module__": __name__})


@functools.cache
def _same_elsewhere(stock: Any) -> Any:
    """The same class in this module: transformers applies its conversions to none but its own classes."""
    return type(stock.__name__, (stock,), {"__module__": __name__})


def _merges_experts(conversion: Any) -> bool:
    return hasattr(conversion, "operations") and any("experts" in target for target in conversion.target_patterns)


def __getattr__(name: str) -> Any:
    """The classes that config.json names."""
    if name.startswith(PREFIX) and hasattr(transformers, name.removeprefix(PREFIX)):
        return unstacking(getattr(transformers, name.removeprefix(PREFIX)))
    raise AttributeError(f"{__name__} has no {name}")
