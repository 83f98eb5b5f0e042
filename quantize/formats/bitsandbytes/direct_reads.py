"""Linear modules whose weights a model reads without running them: codes in their place would be taken for numbers."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

TOKENS = 3


@dataclass(frozen=True)
class _Described:
    """A class of models and what its config says; the config itself is there to build one."""

    kind: Any
    content: str
    config: Any = field(compare=False)


def names(model: Any, linear: Iterable[str]) -> tuple[str, ...]:
    """Those of the modules `linear` of the source's `model`, as far as that runs without weights.

    Mamba multiplies by the weight of `dt_proj`, to add the bias elsewhere; RWKV divides weights, and would round codes
    again, to FP4. Shapes show it: nothing is computed.
    """
    read = _read(_Described(type(model), str(model.config.to_dict()), model.config))
    return tuple(name for name in linear if name in read)


@functools.lru_cache(maxsize=4)
def _read(described: _Described) -> frozenset[str]:
    """The modules whose weights a model reads by itself; a run asks for the same model several times."""
    try:
        with torch.device("meta"):  # a model like it: running changes some
            shapes = described.kind(copy.deepcopy(described.config)).eval()
    except Exception:  # noqa: BLE001 - code of a model's own may want its weights at once
        return frozenset()
    known = {name: module for name, module in shapes.named_modules() if hasattr(module, "weight")}
    reads = _Reads({id(module.weight): name for name, module in known.items()})
    for name in reads.owners.values():
        known[name].register_forward_pre_hook(lambda *_, name=name: reads.running.add(name))
        known[name].register_forward_hook(lambda *_, name=name: reads.running.discard(name))
    with _foreign_code(), _said_to_be_quantized(shapes), torch.no_grad(), reads:
        shapes(torch.zeros(1, TOKENS, dtype=torch.int64, device="meta"), use_cache=False)
    return frozenset(reads.read)


@contextlib.contextmanager
def _foreign_code() -> Iterator[None]:
    """Within, neither warnings nor failures are heard: as far as a model ran, its reads are known."""
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _said_to_be_quantized(model: Any) -> Iterator[None]:
    """Some architectures compute otherwise when transformers has marked their config so."""
    from transformers import PreTrainedModel

    configs = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    for config in configs.values():
        config._is_quantized = True
    try:
        yield
    finally:
        for config in configs.values():
            del config._is_quantized


class _Reads(TorchFunctionMode):
    """Watches what is computed of weights, by their `owners`, while these are not `running`."""

    def __init__(self, owners: dict[int, str]) -> None:
        super().__init__()
        self.owners = owners
        self.running: set[str] = set()
        self.read: set[str] = set()

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        if isinstance(result, torch.Tensor):
            values = map(id, (*arguments, *(named or {}).values()))
            self.read |= {self.owners[value] for value in values if value in self.owners} - self.running
        return result
