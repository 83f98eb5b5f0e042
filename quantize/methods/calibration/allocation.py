"""Allocation of bytes: block size 32, or half precision, for the matrices where extra bytes help most."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from quantize.formats.bitsandbytes.sizes import BLOCK, MatrixFormat

HALF_PRECISION = 0
"""In place of a block size: the matrix is kept in half precision."""
SMALL_BLOCK = 32
STEP = 1e-3
"""Of a budget that is looked for, as a multiple of the plain bytes."""


@dataclass(frozen=True)
class StorageOption:
    """One way to store a matrix: its block size or HALF_PRECISION, its bytes and its predicted divergence (nats)."""

    block: int
    size: int
    divergence: float


@dataclass(frozen=True)
class Offers:
    """The ways to store each matrix by its name, the plain one first, and the bytes of all other weights.

    Divergences of single matrices add up to that of the model, in nats a token.
    """

    options: Mapping[str, tuple[StorageOption, ...]]
    other_bytes: int

    @property
    def plain_bytes(self) -> int:
        return self.other_bytes + sum(options[0].size for options in self.options.values())

    def within(self, times: float) -> dict[str, int]:
        """The block size, or HALF_PRECISION, of each matrix in the best file of at most `times` the plain bytes."""
        return _blocks(spend(self.options, (times - 1) * self.plain_bytes))

    def divergence(self, times: float) -> float:
        """The predicted divergence (nats) of that file."""
        chosen = spend(self.options, (times - 1) * self.plain_bytes)
        return sum(option.divergence for option in chosen.values())

    def smallest(self, divergence: float) -> float:
        """The smallest budget, a multiple of the plain bytes, whose file is predicted to diverge no more (nats)."""
        largest = {name: max(options, key=lambda option: option.size) for name, options in self.options.items()}
        whole = self.other_bytes + sum(option.size for option in largest.values())
        low, high = 0, math.ceil((whole / self.plain_bytes - 1) / STEP)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.divergence(1 + middle * STEP) <= divergence else (middle + 1, high)
        return round(1 + low * STEP, 3)


def options(rows: int, inputs: int, double_quant: bool, divergences: Mapping[int, float]) -> tuple[StorageOption, ...]:
    """The ways to store a matrix [rows, inputs]; `divergences` are those of its block sizes."""
    blocks = {**divergences, HALF_PRECISION: 0.0}
    return tuple(
        StorageOption(block, stored_bytes(rows, inputs, block, double_quant), divergence)
        for block, divergence in blocks.items()
    )


def block_sizes(inputs: int) -> tuple[int, ...]:
    """Those in which rows of so many inputs may be stored: blocks that run across rows are rounded to nearest."""
    return (BLOCK,) if inputs % SMALL_BLOCK else (BLOCK, SMALL_BLOCK)


def stored_bytes(rows: int, inputs: int, block: int, double_quant: bool) -> int:
    """The bytes of a matrix in a file."""
    if block == HALF_PRECISION:
        return 2 * rows * inputs
    return MatrixFormat(double_quant=double_quant, block=block).stored_bytes(rows, inputs)


def spend(offers: Mapping[str, Sequence[StorageOption]], extra: float) -> dict[str, StorageOption]:
    """The option of each matrix that saves most divergence with at most `extra` bytes over the first ones.

    Steps that save most for their bytes are taken first, and those that do not fit are passed over, which is the
    optimum but for what is left at the end.
    """
    chosen = {name: options[0] for name, options in offers.items()}
    steps = [(name, *step) for name, options in offers.items() for step in _steps(options)]
    for name, now, then in sorted(steps, key=lambda step: -_gain(*step[1:])):
        if chosen[name] is now and then.size - now.size <= extra:
            chosen[name] = then
            extra -= then.size - now.size
    return chosen


def _steps(options: Sequence[StorageOption]) -> Iterator[tuple[StorageOption, StorageOption]]:
    """From one option to the next along the convex hull of divergence over bytes, from the first one on."""
    now = options[0]
    while larger := [option for option in options if option.size > now.size and option.divergence < now.divergence]:
        then = max(larger, key=lambda option: _gain(now, option))
        yield now, then
        now = then


def _blocks(chosen: Mapping[str, StorageOption]) -> dict[str, int]:
    return {name: option.block for name, option in chosen.items()}


def _gain(now: StorageOption, then: StorageOption) -> float:
    return (now.divergence - then.divergence) / (then.size - now.size)
