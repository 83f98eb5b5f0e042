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
OTHER_NAMES = {
    **dict.fromkeys(("mixtral", "phimoe", "lfm2_moe", "kimi_linear"), ("w1", "w3", "w2")),
    **dict.fromkeys(("minimax", "minimax_m2", "minimax_m3_vl_text"), ("w1", "w3", "w2")),
    **dict.fromkeys(("deepseek_v4", "mistral_large4_text"), ("w1", "w3", "w2")),
}
"""What checkpoints call the linear layers of an expert, by the type of the model."""


class LinearExperts(nn.Module):
    """The experts of one layer, called 0, 1, 2 ..., in the place of a module that stacks them.

    Weights are views of the stacked ones. Whatever else that module had, such as its activation, is taken over.
    """

    act_fn: Any
    gating: Any
    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool
    counted_by = "num_experts"
    """What a module that stacks experts calls their number."""
    has_post_expert_norm = False
    """Which no model of transformers before 5.20 has, nor names."""
    post_expert_norm: Any

    def __init__(self, stacked: Any) -> None:
        super().__init__()
        self.__dict__.update({name: value for name, value in vars(stacked).items() if not name.startswith("_")})
        for name, module in stacked.named_children():
            self.add_module(name, module)
        self.gating = getattr(type(stacked), "_apply_gate", None)
        self.num_experts = getattr(stacked, self.counted_by)
        for number in range(self.num_experts):
            self.add_module(str(number), nn.ModuleDict(self._linear_layers(stacked, number)))

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
            return self.activated(both)
        result: torch.Tensor = self.act_fn(outputs[0])
        return result

    def activated(self, both: torch.Tensor) -> torch.Tensor:
        """The gated values of an expert, from its gates and what they let through."""
        result: torch.Tensor = self.gating(self, both)
        return result

    def choices(self, _: torch.Tensor, top_k_index: torch.Tensor, *__: Any) -> Any:
        """What says which tokens are sent to which expert, of the arguments of `forward`."""
        return top_k_index

    def tokens(self, number: int, choices: Any) -> torch.Tensor | None:
        """The tokens that are sent to an expert, in the order in which it gets them; None where that is not known."""
        return torch.where(choices == number)[0]

    def inputs(self, number: int, *arguments: Any) -> torch.Tensor:
        """The hidden states [tokens, width] that an expert gets, of the arguments of `forward`."""
        inputs: torch.Tensor = arguments[0][self.tokens(number, self.choices(*arguments))]
        return inputs

    def all_inputs(self, *arguments: Any) -> torch.Tensor:
        """The hidden states [tokens, width] that any of the experts get."""
        inputs: torch.Tensor = arguments[0]
        return inputs

    def linear_names(self) -> tuple[str, ...]:
        """What the linear layers of an expert are called, in the order in which they run."""
        config = getattr(self, "config", None)
        gate, up, down = OTHER_NAMES.get(getattr(config, "model_type", ""), USUAL_NAMES)
        return (gate, up, down) if self.has_gate else (up, down)

    def stacked_tensors(self) -> dict[str, list[tuple[str, str]]]:
        """By the names of the stacked tensors, those of one expert's linear layers, as pairs of layer and tensor."""
        *inner, down = self.linear_names()
        first = "gate_up_proj" if self.has_gate else "up_proj"
        names = {first: [(name, "weight") for name in inner], "down_proj": [(down, "weight")]}
        if self.has_bias:
            names |= {f"{first}_bias": [(name, "bias") for name in inner], "down_proj_bias": [(down, "bias")]}
        return names

    def _linear_layers(self, stacked: Any, number: int) -> dict[str, nn.Module]:
        """The linear layers of one expert, by their names."""
        tensors: dict[str, dict[str, nn.Parameter]] = {}
        for name, targets in self.stacked_tensors().items():
            parameter = getattr(stacked, name)
            for (layer, kind), part in zip(targets, self._split(name, parameter.detach()[number]), strict=True):
                tensors.setdefault(layer, {})[kind] = nn.Parameter(part, requires_grad=parameter.requires_grad)
        return {layer: _linear(**parts) for layer, parts in tensors.items()}

    def _split(self, name: str, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What one expert's part `values` of a stacked tensor holds for each of its linear layers, as views."""
        rows = values.T if self.is_transposed and values.ndim == 2 else values
        if len(self.stacked_tensors()[name]) == 1:
            return (rows,)
        half = len(rows) // 2
        return (rows[:half], rows[half:]) if self.is_concatenated else (rows[::2], rows[1::2])


class _Llama4Experts(LinearExperts):
    """Experts that get a copy of all tokens each, scaled by their weights: zeros where a token is not theirs."""

    has_gate = is_transposed = is_concatenated = True
    has_bias = False

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """The outputs [experts * tokens, width], zeros for zeros."""
        total = torch.zeros_like(hidden_states)
        places = self.choices(hidden_states)
        for number in range(self.num_experts):
            token = self.tokens(number, places)
            if len(token):
                total[number * places.shape[1] + token] = self.expert(number, self.inputs(number, hidden_states))
        return total

    def activated(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1)
        result: torch.Tensor = up * self.act_fn(gate)
        return result

    def choices(self, hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
        return hidden_states.detach().any(-1).view(self.num_experts, -1)

    def tokens(self, number: int, choices: torch.Tensor) -> torch.Tensor:
        return torch.where(choices[number])[0]

    def inputs(self, number: int, *arguments: Any) -> torch.Tensor:
        count = len(arguments[0]) // self.num_experts
        inputs: torch.Tensor = arguments[0][number * count + self.tokens(number, self.choices(*arguments))]
        return inputs

    def all_inputs(self, *arguments: Any) -> torch.Tensor:
        inputs: torch.Tensor = arguments[0][self.choices(*arguments).flatten()]
        return inputs


class _JetMoeExperts(LinearExperts):
    """Experts of one linear layer, which get the tokens of one after the other."""

    has_gate = has_bias = is_transposed = is_concatenated = False

    def forward(self, inputs: torch.Tensor, expert_size: list[int]) -> torch.Tensor:  # type: ignore[override]
        """The outputs [tokens, width], in the order of the inputs."""
        parts = enumerate(torch.split(inputs, expert_size))
        return torch.cat([self.expert(number, part) for number, part in parts if len(part)])

    def gated(self, _: int, states: torch.Tensor) -> torch.Tensor:
        return states

    def choices(self, _: torch.Tensor, expert_size: list[int], *__: Any) -> list[int]:  # type: ignore[override]
        return expert_size

    def tokens(self, _: int, __: Any) -> None:
        return None

    def inputs(self, number: int, *arguments: Any) -> torch.Tensor:
        inputs: torch.Tensor = torch.split(arguments[0], arguments[1])[number]
        return inputs

    def linear_names(self) -> tuple[str, ...]:
        return ("proj",)

    def stacked_tensors(self) -> dict[str, list[tuple[str, str]]]:
        return {"weight": [("proj", "weight")]}


class _LongcatExperts(LinearExperts):
    """Experts of which the last ones, without weights, return what they get."""

    has_gate = is_concatenated = True
    has_bias = is_transposed = False
    counted_by = "num_routed_experts"

    def expert(self, number: int, states: torch.Tensor) -> torch.Tensor:
        return super().expert(number, states) if number < self.num_experts else states

    def activated(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1)
        result: torch.Tensor = self.act_fn(gate) * up
        return result


OWN_KINDS = {
    "Llama4TextExperts": _Llama4Experts,
    "JetMoeParallelExperts": _JetMoeExperts,
    "LongcatFlashExperts": _LongcatExperts,
}
"""What takes the place of modules that are called, or stacked, in a way of their own, by the names of their classes."""


def is_stacked(module: nn.Module) -> bool:
    """Whether a module is what transformers makes of experts that it stacks."""
    if type(module).__name__ in OWN_KINDS:
        return any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts")
    weight = getattr(module, "down_proj", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 3 and all(hasattr(module, flag) for flag in flags)


def linear(stacked: nn.Module) -> LinearExperts:
    """Linear experts that take the place of a module that stacks them."""
    return OWN_KINDS.get(type(stacked).__name__, LinearExperts)(stacked)


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
        model.set_submodule(name, linear(model.get_submodule(name)))
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
    """Whether a conversion does nothing but stack experts, or turn them round."""
    operations = {type(operation).__name__ for operation in getattr(conversion, "operations", ())}
    return bool(operations & {"MergeModulelist", "Transpose"}) and any(
        "experts" in target for target in conversion.target_patterns
    )


def __getattr__(name: str) -> Any:
    """The classes that config.json names."""
    if name.startswith(PREFIX) and hasattr(transformers, name.removeprefix(PREFIX)):
        return unstacking(getattr(transformers, name.removeprefix(PREFIX)))
    raise AttributeError(f"{__name__} has no {name}")
