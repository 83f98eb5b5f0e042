"""Nearest 4-bit codes on a CPU, many times faster than bitsandbytes finds them there, and the same to the bit.

Weights are scaled by their block's largest and looked up in a table of fine cells, in pieces that stay in the cache.
The few weights whose cell holds a boundary between two codes are compared with the boundaries themselves.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch

PIECE = 1 << 19
"""Weights that a thread looks at together: few enough for its cache, enough that threads seldom wait for each other."""
SHARED = 1 << 18
"""Weights that are worth a second thread."""
BLOCKS = 4096
"""A multiple of every block size."""
CELLS = 1 << 15
"""On either side of zero."""
UNSURE, ANY_UNSURE = 0x80, -0x7F7F7F7F7F7F7F80


@dataclass(frozen=True)
class Cells:
    """For every cell the code of what lies in it, UNSURE where a boundary does; `middles` [15] and `codes` [16] as in
    `rounding.Levels`."""

    table: torch.Tensor
    middles: torch.Tensor
    codes: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor) -> Cells:
        """Of the 16 `values` of a 4-bit type, in the order of their codes."""
        order = torch.argsort(values)
        middles, codes = (values[order[:-1]] + values[order[1:]]) / 2, order.to(torch.uint8)
        bounds = _cell(middles, torch.empty_like(middles), torch.empty_like(middles, dtype=torch.int32))
        table = codes[torch.bucketize(torch.arange(2 * CELLS), bounds)]
        for near in (-1, 0, 1):  # vectors and single numbers may be rounded differently
            table[bounds + near] = UNSURE
        return cls(table, middles, codes)


def quantize(weight: torch.Tensor, values: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes uint8 [n / 2, 1] and scales float32 [n / block] of a contiguous half or float32 `weight` on the CPU.

    `values` [16] are those of the 4-bit type. `block` divides the number of weights. A scale is NaN or infinite where a
    weight is; the codes of its block mean nothing then.
    """
    flat, cells = weight.view(-1), _cells(tuple(values.tolist()))
    packed, scales = torch.empty(len(flat) // 2, dtype=torch.uint8), torch.empty(len(flat) // block)
    threads = torch.get_num_threads() if len(flat) >= SHARED else 1
    share = BLOCKS * max(1, math.ceil(len(flat) / threads / BLOCKS))

    def work(start: int) -> None:
        end = min(start + share, len(flat))
        desk = _Desk(cells, block, min(PIECE, end - start))
        for first in range(start, end, PIECE):
            part = flat[first : min(first + PIECE, end)]
            half, blocks = (slice(first // size, (first + len(part)) // size) for size in (2, block))
            desk.round(part, packed[half], scales[blocks])

    starts = range(0, len(flat), share)
    if len(starts) < 2:
        for start in starts:
            work(start)
    else:
        with ThreadPoolExecutor(len(starts), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, starts))
    return packed[:, None], scales


class _Desk:
    """Room for what lies between a piece of weights and its codes, used again for every piece of a thread."""

    def __init__(self, cells: Cells, block: int, size: int) -> None:
        self.cells, self.block = cells, block
        self.bits, self.shifted = (torch.empty(size, dtype=torch.int16) for _ in range(2))
        self.scaled, self.places = torch.empty(size), torch.empty(size)
        self.cell, self.codes = torch.empty(size, dtype=torch.int32), torch.empty(size, dtype=torch.uint8)
        self.unsure = torch.empty(size // 8, dtype=torch.int64)

    def round(self, part: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> None:
        """Fill `packed` [n / 2] and `scales` [n / block] for `part` [n]."""
        count = len(part)
        scaled, codes = self.scaled[:count], self.codes[:count]
        largest = scales.copy_(self._largest(part))
        if not math.isfinite(scales.sum()):
            part = part.nan_to_num(0.0, 0.0, 0.0)
            largest = self._largest(part).float()
        inverse = largest.clamp(min=1e-38).reciprocal_()
        scaled.copy_(part).view(-1, self.block).mul_(inverse[:, None])
        torch.index_select(self.cells.table, 0, _cell(scaled, self.places[:count], self.cell[:count]), out=codes)
        unsure = torch.bitwise_and(codes.view(torch.int64), ANY_UNSURE, out=self.unsure[: count // 8]).nonzero()[:, 0]
        if len(unsure):
            exact = torch.bucketize(scaled.view(-1, 8)[unsure], self.cells.middles)
            codes.view(-1, 8)[unsure] = self.cells.codes[exact]
        pairs, first, second = codes.view(torch.int16), self.bits[: count // 2], self.shifted[: count // 2]
        torch.bitwise_left_shift(pairs, 4, out=first)
        packed.copy_(first.bitwise_or_(torch.bitwise_right_shift(pairs, 8, out=second)))

    def _largest(self, part: torch.Tensor) -> torch.Tensor:
        """The largest absolute value of each block, NaN where one is: but for their sign, floats are ordered as their
        bits are."""
        if part.dtype == torch.float32:
            return torch.abs(part, out=self.places[: len(part)]).view(-1, self.block).amax(1)
        bits = torch.bitwise_and(part.view(torch.int16), 0x7FFF, out=self.bits[: len(part)])
        return bits.view(-1, self.block).amax(1).view(part.dtype)


def _cell(scaled: torch.Tensor, places: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Cells 1 .. 2 CELLS - 1 of numbers in [-1, 1], in the order of the numbers; `places` is room to work in."""
    return out.copy_(torch.add(torch.tensor(float(CELLS)), scaled, alpha=CELLS - 1, out=places))


@cache
def _cells(values: tuple[float, ...]) -> Cells:
    return Cells.of(torch.tensor(values))
