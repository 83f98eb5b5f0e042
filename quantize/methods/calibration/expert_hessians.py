"""Hessians of the experts of a layer: of the tokens that are sent to each, or of all where those are too few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantize.methods.calibration.hessian import CenteredHessianAccumulator
from quantize.methods.calibration.layers import ActivationStream, autocast

LEAST_TOKENS_PER_INPUT = 1
"""From so many tokens on, for each input of an expert, its own tokens count alone. The Hessian of fewer tokens than
inputs is singular: what no token showed would cost nothing, and rounding would spoil it for the tokens to come."""
MAX_HESSIAN_BYTES = 2 << 30
"""Of the experts that are rounded together; the layer runs again for the next ones."""
FLOAT = 4

TokenWeights = Mapping[str, torch.Tensor]
"""Of all tokens of the text, by the names of matrices."""


@dataclass(frozen=True)
class Entering:
    """Hessians by the names of matrices, and the numbers of the experts that were given those of all tokens."""

    hessians: Mapping[str, CenteredHessianAccumulator]
    shared: frozenset[int]


@dataclass(frozen=True)
class RoutedExperts:
    """Linear experts of the layer `index`, which are called `path` in it, as text streams through them."""

    stream: ActivationStream
    index: int
    path: str

    @property
    def module(self) -> Any:
        return self.stream.decoder.layers[self.index].get_submodule(self.path)

    def number(self, name: str) -> int:
        """The expert that a matrix of the layer belongs to."""
        return int(name.removeprefix(f"{self.path}.").partition(".")[0])

    def together(self, names: list[str]) -> Iterator[tuple[list[str], list[str]]]:
        """The matrices of as many experts as are rounded together: those that run first, and those that run last."""
        by_number: dict[int, list[str]] = {}
        for name in names:
            by_number.setdefault(self.number(name), []).append(name)
        experts = list(by_number.values())
        layer = self.stream.decoder.layers[self.index]
        size = max((FLOAT * sum(_inputs(layer, name) ** 2 for name in expert) for expert in experts), default=1)
        count = max(1, MAX_HESSIAN_BYTES // size)
        for first in range(0, len(experts), count):
            chosen = [name for expert in experts[first : first + count] for name in expert]
            last = [name for name in chosen if self._runs_last(name)]
            yield [name for name in chosen if name not in set(last)], last

    def entering(self, names: list[str], weights: TokenWeights) -> Entering:
        """Of the matrices that experts begin with."""
        if not names:
            return Entering({}, frozenset())
        width, device = _inputs(self.stream.decoder.layers[self.index], names[0]), self.stream.device
        all_tokens, counts = CenteredHessianAccumulator(width, device), Counter[int]()
        own = {name: CenteredHessianAccumulator(width, device) for name in names}
        for start, states, choices in self._routing():
            all_tokens.add(states.float(), None)
            for number in {self.number(name) for name in names}:
                counts[number] += int((choices == number).sum())
            for name in names:
                _add(own[name], states, _tokens(choices, self.number(name)), start, weights.get(name))
        numbers = {self.number(name) for name in names}
        few = frozenset(number for number in numbers if counts[number] < LEAST_TOKENS_PER_INPUT * width)
        return Entering({name: all_tokens if self.number(name) in few else own[name] for name in names}, few)

    def leaving(
        self, names: list[str], shared: frozenset[int], weights: TokenWeights
    ) -> dict[str, CenteredHessianAccumulator]:
        """Of the matrices that experts end with, in the model as their first ones are now."""
        layer, device = self.stream.decoder.layers[self.index], self.stream.device
        own = {name: CenteredHessianAccumulator(_inputs(layer, name), device) for name in names}
        for start, states, choices in self._routing():
            for name in names:
                number = self.number(name)
                every = number in shared
                token = torch.arange(len(states), device=device) if every else _tokens(choices, number)
                if len(token):
                    with torch.no_grad(), autocast(device, self.stream.bfloat16):
                        inputs = self.module.gated(number, states[token])
                    weight = None if every else weights.get(name)
                    own[name].add(inputs.float(), None if weight is None else weight[start + token.cpu()].to(device))
        return own

    def _runs_last(self, name: str) -> bool:
        *_, last = self.module.get_submodule(str(self.number(name))).named_children()
        return name.endswith(f".{last[0]}")

    def _routing(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Of each micro-batch its first token, hidden states [tokens, width], and choices of experts [tokens, few]."""
        start = 0
        for states, choices, *_ in self.stream.arguments(self.index, self.path):
            yield start, states.flatten(0, -2), choices
            start += len(choices)


def _inputs(layer: Any, name: str) -> int:
    return int(layer.get_submodule(name).in_features)


def _tokens(choices: torch.Tensor, number: int) -> torch.Tensor:
    """The tokens of a micro-batch that are sent to an expert, in the order in which it gets them."""
    return torch.where(choices == number)[0]


def _add(
    hessian: CenteredHessianAccumulator,
    states: torch.Tensor,
    token: torch.Tensor,
    start: int,
    weights: torch.Tensor | None,
) -> None:
    if len(token):
        weight = None if weights is None else weights[start + token.cpu()].to(states.device)
        hessian.add(states[token].float(), weight)
