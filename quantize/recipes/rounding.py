"""Which of the 16 levels each weight takes: the choice that changes a layer's outputs least on calibration inputs.

For a matrix W [rows, inputs] that becomes Q, the outputs on inputs X change by tr((W - Q) H (W - Q)^T) with
H = X^T X / tokens. Columns are rounded one after the other, and each one's error moves the target of those that follow
by what H says makes up for it best (Frantar et al. 2022, after Hassibi and Stork 1993). For each block of columns,
scales of many sizes and both signs are tried in full, so that a scale is chosen together with its codes. Sweeps then
choose each block anew, the others given, wherever that makes the change smaller.

Inside, matrices are transposed, [inputs, rows]: a column of W is then one contiguous row of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

LEAF = 8
"""Columns that are compensated one by one; beyond, errors move on by products of matrices."""
TRIED_AT_ONCE = {"cpu": 1 << 13, "cuda": 1 << 19}
"""Rows x scales that are rounded together: on a CPU few enough to stay in its cache."""

Snap = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Scales [..., rows] and the places [rows] of their blocks in the flattened matrix -> what is left after storing."""


def keep(scales: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """The `Snap` of scales that are stored as they are."""
    return scales


@dataclass(frozen=True)
class Search:
    """How hard to look.

    `factors` times the largest weight of a block are the scales that are tried first, with both signs if `signed`;
    each of `sweeps` tries `steps` times the present scale. `damping` is added to H's diagonal, as a part of its mean.
    """

    factors: tuple[float, ...] = tuple(0.70 + 0.04 * step for step in range(11))
    steps: tuple[float, ...] = (0.92, 0.96, 0.98, 1.0, 1.02, 1.04, 1.08, -0.95, -1.0, -1.05)
    signed: bool = True
    sweeps: int = 3
    damping: float = 0.01
    block: int = 64


@dataclass(frozen=True)
class Levels:
    """The table in ascending order: `values` [16] and the uint8 `codes` [16] that stand for them."""

    values: torch.Tensor
    codes: torch.Tensor

    @classmethod
    def of(cls, table: torch.Tensor) -> Levels:
        values, codes = table.float().sort(stable=True)
        return cls(values, codes.to(torch.uint8))

    def nearest(self, relative: torch.Tensor) -> torch.Tensor:
        """Places 0..15 of the values nearest to `relative`, int32."""
        return torch.bucketize(relative, (self.values[1:] + self.values[:-1]) / 2, out_int32=True)


@dataclass(frozen=True)
class Rounded:
    """`codes` uint8 [rows, inputs], `scales` float32 [rows, blocks] as they are after storing, and `change` [rows]:
    the mean squared change of each output on the calibration inputs."""

    codes: torch.Tensor
    scales: torch.Tensor
    change: torch.Tensor


class Moments:
    """The mean of x x^T over calibration inputs x, gathered in parts; float32 [inputs, inputs]."""

    def __init__(self, inputs: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(inputs, inputs, device=device)
        self.weight = 0.0

    def add(self, inputs: torch.Tensor, importance: torch.Tensor | None = None) -> None:
        """Count `inputs` [tokens, inputs], each as much as its `importance` [tokens] says."""
        inputs = inputs.float()
        weighed = inputs if importance is None else inputs * importance[:, None]
        self.total.addmm_(weighed.T, inputs)
        self.weight += len(inputs) if importance is None else float(importance.sum())

    @property
    def mean(self) -> torch.Tensor:
        return self.total / max(self.weight, 1e-30)


def round_nearest(weight: torch.Tensor, levels: Levels, snap: Snap = keep, block: int = 64) -> Rounded:
    """Each weight of `weight` [rows, inputs] to its nearest level under scale = absmax; `change` is left zero."""
    rows, inputs = weight.shape
    blocks = weight.float().contiguous().view(rows, inputs // block, block)
    places = torch.arange(rows * inputs // block, device=weight.device).view(rows, -1)
    scales = snap(blocks.abs().amax(2), places)
    codes = levels.codes[levels.nearest(blocks * _inverse(scales)[..., None])]
    return Rounded(codes.view(rows, inputs), scales, torch.zeros(rows, device=weight.device))


def round_compensated(
    weight: torch.Tensor, moments: torch.Tensor, levels: Levels, snap: Snap = keep, search: Search | None = None
) -> Rounded:
    """The levels for `weight` [rows, inputs] whose inputs have the second `moments` [inputs, inputs].

    Blocks must not run across rows. No row comes out worse than by `round_nearest` under the same `snap`.
    """
    search = search or Search()
    work = _Work(weight, damped(moments, search.damping), levels, snap, search)
    work.first_pass()
    for _ in range(search.sweeps):
        work.sweep()
    return _better(work.result(moments), round_nearest(weight, levels, snap, search.block), weight, moments, levels)


def output_change(error: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """e H e^T for each row e of `error` [rows, inputs]: the mean squared change of each output, float32 [rows]."""
    change: torch.Tensor = (error @ moments * error).sum(1)
    return change


def damped(moments: torch.Tensor, damping: float) -> torch.Tensor:
    """`moments` with `damping` x its mean diagonal added to the diagonal; inputs that never fire cannot divide by 0."""
    diagonal = moments.diagonal()
    return moments + torch.diag((damping * diagonal.mean()).clamp(min=1e-20).expand(len(diagonal)))


def inverse_factor(moments: torch.Tensor) -> torch.Tensor:
    """The upper triangle U with U^T U = `moments`^-1, damped further where float32 cannot tell it from singular."""
    for damping in (0.0, 1e-4, 1e-3, 1e-2, 1e-1):
        lower, failed = torch.linalg.cholesky_ex(damped(moments, damping))
        if not failed:
            upper: torch.Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
    raise ValueError("the second moments of a layer's inputs are not positive definite")


def compensate(
    target: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, levels: Levels
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round `target` [inputs, rows] under `scales` (of that shape), each column's error moved on to those that follow.

    `factor` [inputs, inputs] is the `inverse_factor` of the moments. Returns the places of the levels, int32, and the
    errors in units of which the squares sum to what the layer's outputs change by; both [inputs, rows].
    """
    inputs = len(target)
    if inputs <= LEAF:
        return _compensate_leaf(target, factor, scales, levels)
    half = inputs // 2
    places, errors = compensate(target[:half], factor[:half, :half], scales[:half], levels)
    rest = torch.addmm(target[half:], factor[:half, half:].T, errors, alpha=-1)
    later_places, later_errors = compensate(rest, factor[half:, half:], scales[half:], levels)
    return torch.cat([places, later_places]), torch.cat([errors, later_errors])


def _compensate_leaf(
    target: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, levels: Levels
) -> tuple[torch.Tensor, torch.Tensor]:
    target, inverse = target.clone(), _inverse(scales)
    places = torch.empty(target.shape, dtype=torch.int32, device=target.device)
    errors = torch.empty_like(target)
    for column in range(len(target)):
        place = levels.nearest(target[column] * inverse[column])
        error = (target[column] - levels.values[place] * scales[column]) / factor[column, column]
        target[column + 1 :].addr_(factor[column, column + 1 :], error, alpha=-1)
        places[column], errors[column] = place, error
    return places, errors


class _Work:
    """One matrix while it is rounded: its columns in the order of their weight in H, blocks kept together."""

    def __init__(
        self,
        weight: torch.Tensor,
        moments: torch.Tensor,
        levels: Levels,
        snap: Snap,
        search: Search,
        row_places: torch.Tensor | None = None,
    ) -> None:
        self.levels, self.snap, self.search = levels, snap, search
        self.order = _by_importance(moments.diagonal(), search.block)
        self.target = weight.T.float()[self.order].contiguous()
        self.moments = moments[self.order][:, self.order]
        self.block_of = (self.order[:: search.block] // search.block).tolist()
        inputs, rows = self.target.shape
        row_places = torch.arange(rows, device=weight.device) if row_places is None else row_places
        self.first_places = row_places * (inputs // search.block)
        self.places = torch.zeros(self.target.shape, dtype=torch.int32, device=weight.device)
        self.scales = torch.zeros(inputs // search.block, rows, device=weight.device)

    def first_pass(self) -> None:
        """Round block after block, each block's errors made up for by the blocks that follow."""
        factor, target = inverse_factor(self.moments), self.target.clone()
        factors = [sign * size for sign in ((1, -1) if self.search.signed else (1,)) for size in self.search.factors]
        for index, part in self._parts():
            desired, within = target[part], factor[part, part]
            base = desired.abs().amax(0)
            scales, _ = self._best_scales(index, desired, within, [size * base for size in factors])
            self.places[part], errors = compensate(desired, within, scales.expand_as(desired), self.levels)
            self.scales[index] = scales
            target[part.stop :].addmm_(factor[part, part.stop :].T, errors, alpha=-1)

    def sweep(self) -> None:
        """Choose each block anew, the others given, and keep what is better."""
        error = self.target - self._values()
        for index, part in self._parts():
            moments, present = self.moments[part, part], self.scales[index].clone()
            pull = self.moments[part] @ error  # half the gradient
            wanted_move = torch.linalg.solve(moments, pull)
            desired = self.target[part] - error[part] + wanted_move
            factor = inverse_factor(moments)
            steps = [step for step in self.search.steps if step > 0 or self.search.signed]
            scales, change = self._best_scales(index, desired, factor, [step * present for step in steps])
            better = change < (wanted_move * (moments @ wanted_move)).sum(0) * (1 - 1e-5)
            places, _ = compensate(desired, factor, scales.expand_as(desired), self.levels)
            self.places[part] = torch.where(better, places, self.places[part])
            self.scales[index] = torch.where(better, scales, present)
            error[part] = self.target[part] - self.levels.values[self.places[part]] * self.scales[index]

    def result(self, moments: torch.Tensor) -> Rounded:
        """Codes and scales in the matrix's own order."""
        back = self.order.argsort()
        blocks = torch.tensor(self.block_of, device=back.device).argsort()
        change = output_change((self.target - self._values())[back].T, moments)
        return Rounded(self.levels.codes[self.places[back].T].contiguous(), self.scales[blocks].T.contiguous(), change)

    def _best_scales(
        self, index: int, desired: torch.Tensor, factor: torch.Tensor, candidates: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of `candidates` (each [rows]) those whose rounding changes outputs least, and that change; both [rows]."""
        rows = desired.shape[1]
        tried = self.snap(torch.stack(candidates), self.first_places + self.block_of[index])
        best = torch.full((rows,), torch.inf, device=desired.device)
        scales = torch.zeros_like(best)
        for part in torch.split(tried, max(1, TRIED_AT_ONCE[desired.device.type] // rows)):
            _, errors = compensate(
                desired.repeat(1, len(part)), factor, part.reshape(-1).expand(len(desired), -1), self.levels
            )
            change, which = errors.square_().sum(0).view(len(part), rows).min(0)
            scales = torch.where(change < best, part.gather(0, which[None])[0], scales)
            best = torch.minimum(change, best)
        return scales, best

    def _values(self) -> torch.Tensor:
        return self.levels.values[self.places] * self.scales.repeat_interleave(self.search.block, 0)

    def _parts(self) -> Iterator[tuple[int, slice]]:
        for index in range(len(self.scales)):
            yield index, slice(index * self.search.block, (index + 1) * self.search.block)


def _by_importance(diagonal: torch.Tensor, block: int) -> torch.Tensor:
    """The order of columns: blocks by their sum of `diagonal`, the largest first, and so inside each block.

    What is rounded late has few columns left that could make up for it, so the weightiest go first.
    """
    blocks = diagonal.view(-1, block)
    inside = (
        blocks.argsort(dim=1, descending=True, stable=True)
        + block * torch.arange(len(blocks), device=blocks.device)[:, None]
    )
    return inside[blocks.sum(1).argsort(descending=True, stable=True)].reshape(-1)


def _better(first: Rounded, other: Rounded, weight: torch.Tensor, moments: torch.Tensor, levels: Levels) -> Rounded:
    """Each row from that of the two which changes its output less."""
    values = torch.empty_like(levels.values).scatter_(0, levels.codes.long(), levels.values)
    block = weight.shape[1] // other.scales.shape[1]
    other_weight = values[other.codes.int()] * other.scales.repeat_interleave(block, 1)
    change = output_change(weight.float() - other_weight, moments)
    take = first.change <= change
    return Rounded(
        torch.where(take[:, None], first.codes, other.codes),
        torch.where(take[:, None], first.scales, other.scales),
        torch.where(take, first.change, change),
    )


def _inverse(scales: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 for the scale 0 of a block of zeros."""
    return torch.where(scales == 0, torch.zeros_like(scales), 1 / scales)
