"""How much of a model is quantized, and what stays in half precision, as shares of its parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

from quantize.errors import UnsupportedModel
from quantize.evidence import Coverage
from quantize.formats.bitsandbytes import modules
from quantize.records import Recipe

LEAST_SHARE = 0.1
"""Of the parameters in neither embeddings nor output head, ties counted once: a model of which less is quantized is
refused. A large vocabulary makes a package larger, and is no fault of the model."""
NAMED = 3
"""Kinds of parameters that an error names, the largest first."""
HEAD, EMBEDDINGS, SKIPPED, REST = "output head", "embeddings", "linear layers that are skipped", "norms and biases"


def of(model: Any, quantized: Collection[str]) -> Coverage:
    """Shares of the parameters of `model`, with or without weights, whose modules `quantized` hold codes."""
    names, kinds = set(quantized), _Kinds(model)
    inside, kept = 0, Counter[str]()
    for name, key, count in _parameters(model):
        if name in names and key == "weight":
            inside += count
        else:
            kept[kinds.of(name, key)] += count
    total = max(1, inside + kept.total())
    return Coverage(_share(inside, total), {kind: _share(count, total) for kind, count in kept.most_common()})


def require(model: Any, recipe: Recipe, name: str) -> None:
    """Raise UnsupportedModel where less than LEAST_SHARE of the layers of the source's `model` can be quantized.

    What the recipe skips counts as quantized: who skips it knows that.
    """
    quantized = modules.to_quantize(model, Recipe(bits=recipe.bits, quantize_towers=recipe.quantize_towers), name)
    modules.require_quantized(quantized, model, name)
    coverage = of(model, quantized)
    layers = 1 - coverage.kept.get(EMBEDDINGS, 0) - coverage.kept.get(HEAD, 0)
    if coverage.quantized < LEAST_SHARE * layers:
        kinds = ", ".join(f"{kind} {share:.1%}" for kind, share in list(coverage.kept.items())[:NAMED])
        raise UnsupportedModel(
            f"only {coverage.quantized:.1%} of the parameters of {name} can be quantized, and {LEAST_SHARE:.0%} of "
            f"those beside embeddings and output head is the least: bitsandbytes leaves the rest in half precision "
            f"({kinds}), so use the original"
        )


class _Kinds:
    """Tells what a parameter of a model is that stays in half precision."""

    def __init__(self, model: Any) -> None:
        import torch

        self.modules, self.head = dict(model.named_modules()), model.get_output_embeddings()
        self.towers = modules.towers(model)
        self.linear = set(modules.linear_names(model))
        self.embedding = torch.nn.Embedding

    def of(self, name: str, key: str) -> str:
        module = self.modules[name]
        if module is self.head:
            return HEAD
        if tower := next((tower for tower in self.towers if f"{name}.".startswith(f"{tower}.")), None):
            return tower
        if isinstance(module, self.embedding):
            return EMBEDDINGS
        if getattr(module, key).ndim < 2:
            return REST
        return SKIPPED if name in self.linear else f"layers of the class {type(module).__name__}"


def _parameters(model: Any) -> Iterator[tuple[str, str, int]]:
    """Module name, parameter name and number of elements, each parameter once."""
    ties, seen = model.all_tied_weights_keys, set()
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen and f"{name}.{key}" not in ties:
                yield name, key, parameter.numel()
            seen.add(id(parameter))


def _share(count: int, total: int) -> float:
    return round(count / total, 4)
