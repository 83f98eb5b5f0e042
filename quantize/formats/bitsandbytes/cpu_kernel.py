"""Nearest 4-bit codes on a CPU, many times faster than bitsandbytes finds them there, and the same to the bit.

Weights are scaled by their block's largest and looked up in a table of fine bins, in chunks that stay in the cache. The
few weights whose bin holds a boundary between two codes are compared with the boundaries themselves.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch

CHUNK = 1 << 19
"""Weights that a thread looks at together: few enough for its cache, enough that threads seldom wait for each other."""
SHARED = 1 << 18
"""Weights that are worth a second thread."""
BLOCKS = 4096
"""A multiple of every block size."""
BINS = 1 << 15
"""On either side of zero."""
UNDECIDED, ANY_UNDECIDED = 0x80, -0x7F7F7F7F7F7F7F80


@dataclass(frozen=True)
class LookupTable:
    """For every bin the code of what lies in it, UNDECIDED where a boundary does; `boundaries` [15] lie between the 16
    values in ascending order, whose codes are `codes`."""

    bins: torch.Tensor
    boundaries: torch.Tensor
    codes: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor) -> LookupTable:
        """Of the 16 `values` of a 4-bit type, in the order of their codes."""
        order = torch.argsort(values)
        boundaries, codes = (values[order[:-1]] + values[order[1:]]) / 2, order.to(torch.uint8)
        held = _bin(boundaries, torch.empty_like(boundaries), torch.empty_like(boundaries, dtype=torch.int32))
        bins = codes[torch.bucketize(torch.arange(2 * BINS), held)]
        for near in (-1, 0, 1):  # vectors and single numbers may be rounded differently
            bins[held + near] = UNDECIDED
        return cls(bins, boundaries, codes)


def quantize(weight: torch.Tensor, values: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes uint8 [n / 2, 1] and scales float32 [n / block] of a contiguous half or float32 `weight` on the CPU.

    `values` [16] are those of the 4-bit type. `block` divides the number of weights. A scale is NaN or infinite where a
    weight is; the codes of its block mean nothing then.
    """
    flat, table = weight.view(-1), _table(tuple(values.tolist()))
    packed, scales = torch.empty(len(flat) // 2, dtype=torch.uint8), torch.empty(len(flat) // block)
    threads = torch.get_num_threads() if len(flat) >= SHARED else 1
    share = BLOCKS * max(1, math.ceil(len(flat) / threads / BLOCKS))

    def work(start: int) -> None:
        end = min(start + share, len(flat))
        buffers = _Buffers(table, block, min(CHUNK, end - start))
        for first in range(start, end, CHUNK):
            part = flat[first : min(first + CHUNK, end)]
            half, blocks = (slice(first // size, (first + len(part)) // size) for size in (2, block))
            buffers.round(part, packed[half], scales[blocks])

    starts = range(0, len(flat), share)
    if len(starts) < 2:
        for start in starts:
            work(start)
    else:
        with ThreadPoolExecutor(len(starts), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, starts))
    return packed[:, None], scales


class _Buffers:
    """Memory for what lies between a chunk of weights and its codes, used again for every chunk of a thread."""

    def __init__(self, table: LookupTable, block: int, size: int) -> None:
        self.table, self.block = table, block
        self.bits, self.shifted = (torch.empty(size, dtype=torch.int16) for _ in range(2))
        self.scaled, self.floats = torch.empty(size), torch.empty(size)
        self.bin, self.codes = torch.empty(size, dtype=torch.int32), torch.empty(size, dtype=torch.uint8)
        self.undecided = torch.empty(size // 8, dtype=torch.int64)

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
        torch.index_select(self.table.bins, 0, _bin(scaled, self.floats[:count], self.bin[:count]), out=codes)
        undecided = torch.bitwise_and(
            codes.view(torch.int64), ANY_UNDECIDED, out=self.undecided[: count // 8]
        ).nonzero()[:, 0]
        if len(undecided):
            exact = torch.bucketize(scaled.view(-1, 8)[undecided], self.table.boundaries)
            codes.view(-1, 8)[undecided] = self.table.codes[exact]
        pairs, first, second = codes.view(torch.int16), self.bits[: count // 2], self.shifted[: count // 2]
        torch.bitwise_left_shift(pairs, 4, out=first)
        packed.copy_(first.bitwise_or_(torch.bitwise_right_shift(pairs, 8, out=second)))

    def _largest(self, part: torch.Tensor) -> torch.Tensor:
        """The largest absolute value of each block, NaN where one is: but for their sign, floats are ordered as their
        bits are."""
        if part.dtype == torch.float32:
            return torch.abs(part, out=self.floats[: len(part)]).view(-1, self.block).amax(1)
        bits = torch.bitwise_and(part.view(torch.int16), 0x7FFF, out=self.bits[: len(part)])
        return bits.view(-1, self.block).amax(1).view(part.dtype)


def _bin(scaled: torch.Tensor, floats: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Bins 1 .. 2 BINS - 1 of numbers in [-1, 1], in the order of the numbers; `floats` is memory to work in."""
    return out.copy_(torch.add(torch.tensor(float(BINS)), scaled, alpha=BINS - 1, out=floats))


@cache
def _table(values: tuple[float, ...]) -> LookupTable:
    return LookupTable.of(torch.tensor(values))
