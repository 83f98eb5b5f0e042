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
        numbers = {self.number(name) for name in names}
        for start, arguments in self._calls():
            all_tokens.add(self.module.all_inputs(*arguments).float(), None)
            sent = {number: self._sent(number, arguments) for number in numbers}
            for number, (states, _) in sent.items():
                counts[number] += len(states)
            for name in names:
                _add(own[name], *sent[self.number(name)], start, weights.get(name))
        few = frozenset(number for number in numbers if counts[number] < LEAST_TOKENS_PER_INPUT * width)
        return Entering({name: all_tokens if self.number(name) in few else own[name] for name in names}, few)

    def leaving(
        self, names: list[str], shared: frozenset[int], weights: TokenWeights
    ) -> dict[str, CenteredHessianAccumulator]:
        """Of the matrices that experts end with, in the model as their first ones are now."""
        layer, device = self.stream.decoder.layers[self.index], self.stream.device
        own = {name: CenteredHessianAccumulator(_inputs(layer, name), device) for name in names}
        for start, arguments in self._calls():
            for name in names:
                number = self.number(name)
                every = number in shared
                states, token = (self.module.all_inputs(*arguments), None) if every else self._sent(number, arguments)
                if len(states):
                    with torch.no_grad(), autocast(device, self.stream.bfloat16):
                        inputs = self.module.gated(number, states)
                    _add(own[name], inputs, token, start, weights.get(name))
        return own

    def _runs_last(self, name: str) -> bool:
        """Whether a matrix ends an expert that begins with others."""
        *others, (last, _) = self.module.get_submodule(str(self.number(name))).named_children()
        return bool(others) and name.endswith(f".{last}")

    def _calls(self) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """Of each micro-batch its first token, and what the experts are called with; hidden states [tokens, width]."""
        calls = self.stream.arguments(self.index, self.path)
        for part, (states, *others) in enumerate(calls):
            yield part * self.stream.tokens_each, (states.flatten(0, -2), *others)

    def _sent(self, number: int, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The hidden states that an expert gets, and the tokens that they belong to, where that is known."""
        return self.module.inputs(number, *arguments), self.module.tokens(number, self.module.choices(*arguments))


def _inputs(layer: Any, name: str) -> int:
    return int(layer.get_submodule(name).in_features)


def _add(
    hessian: CenteredHessianAccumulator,
    states: torch.Tensor,
    token: torch.Tensor | None,
    start: int,
    weights: torch.Tensor | None,
) -> None:
    """Add hidden states to a Hessian, each with the weight of its token where both are known."""
    if len(states):
        weight = None if weights is None or token is None else weights[start + token.cpu()].to(states.device)
        hessian.add(states.float(), weight)
