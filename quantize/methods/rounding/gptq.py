"""Which of the 16 levels each weight takes: the choice that changes a layer's outputs least on calibration inputs.

For a matrix W [rows, inputs] that becomes Q, with E = W - Q, the outputs on inputs X change by tr(E H E^T), where
H = X^T X / tokens. Columns are rounded one after the other, and each one's error moves the target of those that follow
by what H says makes up for it best (GPTQ, Frantar et al. 2022). For each block of columns,
scales of many sizes and both signs are tried in full, so that a scale is chosen together with its codes. Sweeps then
choose each block anew, the others given, wherever that makes the change smaller.

Not all changes of outputs are alike to the model's loss. With the second moments A [rows, rows] of the loss's gradient
at the outputs, the loss changes by about tr(A E H E^T) / 2, and rows are rounded in groups, each group's error moving
the targets of the rows that follow, as among columns (the two-sided rounding of Tseng et al. 2025).

Inside, matrices are transposed, [inputs, rows]: a column of W is then one contiguous row of memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from quantize.methods.rounding.cuda_graph import Recorded

LEAF = 8
"""Columns that are compensated one by one; beyond, errors move on by products of matrices."""
TRIED_AT_ONCE = {"cpu": 1 << 13}
TRIED_AT_ONCE_ELSEWHERE = 1 << 19
"""Rows x scales that are rounded together: on a CPU few enough to stay in its cache."""

Snap = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Scales [..., rows] and the places [rows] of their blocks in the flattened matrix -> what is left after storing."""
Pass = Callable[..., tuple[torch.Tensor, ...]]
"""Places and scales for a group of rows."""


def keep(scales: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """The `Snap` of scales that are stored as they are."""
    return scales


@dataclass(frozen=True)
class Search:
    """How hard to look.

    `factors` times the largest weight of a block are the scales that are tried first, with both signs if `signed`;
    each of `sweeps` tries `steps` times the present scale. `damping` is added to H's diagonal, as a part of its mean,
    and `output_damping` to that of A, by which `group` rows at a time are rounded.
    """

    factors: tuple[float, ...] = (0.74, 0.80, 0.86, 0.92, 0.98, 1.04)
    steps: tuple[float, ...] = (0.95, 0.98, 1.0, 1.02, 1.05, -0.97)
    signed: bool = True
    sweeps: int = 1
    damping: float = 0.01
    output_damping: float = 0.1
    block: int = 64
    group: int = 64


@dataclass(frozen=True)
class Levels:
    """The table in ascending order: `values` [16], the uint8 `codes` [16] for them, and the `middles` [15] between."""

    values: torch.Tensor
    codes: torch.Tensor
    middles: torch.Tensor

    @classmethod
    def of(cls, table: torch.Tensor) -> Levels:
        values, codes = table.float().sort(stable=True)
        return cls(values, codes.to(torch.uint8), (values[1:] + values[:-1]) / 2)

    def nearest(self, relative: torch.Tensor) -> torch.Tensor:
        """Places 0..15 of the values nearest to `relative`, int32."""
        return torch.bucketize(relative, self.middles, out_int32=True)


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
    weight: torch.Tensor,
    moments: torch.Tensor,
    levels: Levels,
    snap: Snap = keep,
    search: Search | None = None,
    output_moments: torch.Tensor | None = None,
) -> Rounded:
    """The levels for `weight` [rows, inputs] whose inputs have the second `moments` [inputs, inputs].

    `output_moments` [rows, rows] are those of the loss's gradient at the outputs; without them rows are rounded each
    for itself. Blocks must not run across rows. No row comes out worse than by `round_nearest` under the same `snap`,
    or, with `output_moments`, the matrix does not.
    """
    search = search or Search()
    work = _Work(weight, moments, levels, snap, search, output_moments)
    work.round()
    nearest = round_nearest(weight, levels, snap, search.block)
    return _better(work.result(), nearest, weight, moments, levels, output_moments)


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
    """Round `target` [inputs, rows] under `scales` [rows], each column's error moved on to those that follow.

    `factor` [inputs, inputs] is the `inverse_factor` of the moments. Returns the places of the levels, int32, and the
    errors in units of which the squares sum to what the layer's outputs change by; both [inputs, rows].
    """
    if target.is_cuda and _has_triton():
        from quantize.methods.rounding import triton_kernel

        return triton_kernel.compensate(target, factor, scales, levels.values, levels.middles)
    return _compensate(target, factor, scales, levels)


def changes(target: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, levels: Levels) -> torch.Tensor:
    """How much outputs would change if `target` [inputs, rows] were rounded under each of `scales` [tries, rows]."""
    if target.is_cuda and _has_triton():
        from quantize.methods.rounding import triton_kernel

        return triton_kernel.changes(target, factor, scales, levels.values, levels.middles)
    rows = target.shape[1]
    at_once = max(1, TRIED_AT_ONCE.get(target.device.type, TRIED_AT_ONCE_ELSEWHERE) // rows)
    found = []
    for part in torch.split(scales, at_once):
        _, errors = _compensate(target.repeat(1, len(part)), factor, part.reshape(-1), levels)
        found.append(errors.square_().sum(0).view(len(part), rows))
    return torch.cat(found)


def _compensate(
    target: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, levels: Levels
) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = len(target)
    if inputs <= LEAF:
        return _compensate_leaf(target, factor, scales, levels)
    half = inputs // 2
    places, errors = _compensate(target[:half], factor[:half, :half], scales, levels)
    rest = torch.addmm(target[half:], factor[:half, half:].T, errors, alpha=-1)
    later_places, later_errors = _compensate(rest, factor[half:, half:], scales, levels)
    return torch.cat([places, later_places]), torch.cat([errors, later_errors])


def _compensate_leaf(
    target: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, levels: Levels
) -> tuple[torch.Tensor, torch.Tensor]:
    target, inverse = target.clone(), _inverse(scales)
    places = torch.empty(target.shape, dtype=torch.int32, device=target.device)
    errors = torch.empty_like(target)
    for column in range(len(target)):
        place = levels.nearest(target[column] * inverse)
        error = (target[column] - levels.values[place] * scales) / factor[column, column]
        target[column + 1 :].addr_(factor[column, column + 1 :], error, alpha=-1)
        places[column], errors[column] = place, error
    return places, errors


@functools.cache
def _has_triton() -> bool:
    """Whether kernels can be built here: Triton comes with torch for CUDA on Linux, and needs a C compiler."""
    try:
        from quantize.methods.rounding import triton_kernel

        one = torch.ones(32, 32, device="cuda")
        triton_kernel.compensate(one, one, one[0], torch.arange(16.0, device="cuda"), one[0])
    except Exception:  # noqa: BLE001 - whatever stands in the way, the plain way works
        return False
    return True


class _Work:
    """One matrix while it is rounded; columns and rows in the order of their weight in H and A, blocks together."""

    def __init__(
        self,
        weight: torch.Tensor,
        moments: torch.Tensor,
        levels: Levels,
        snap: Snap,
        search: Search,
        output_moments: torch.Tensor | None,
    ) -> None:
        self.levels, self.snap, self.search = levels, snap, search
        rows, inputs = weight.shape
        self.order = _by_importance(moments.diagonal(), search.block)
        self.moments = damped(moments, search.damping)[self.order][:, self.order]
        self.row_order = torch.arange(rows, device=weight.device)
        self.metric = None
        if output_moments is not None:
            self.row_order = output_moments.diagonal().argsort(descending=True, stable=True)
            self.metric = damped(output_moments, search.output_damping)[self.row_order][:, self.row_order]
        self.target = weight.T.float()[self.order][:, self.row_order].contiguous()
        self.block_order = self.order[:: search.block] // search.block
        self.places = torch.zeros(self.target.shape, dtype=torch.int32, device=weight.device)
        self.scales = torch.zeros(inputs // search.block, rows, device=weight.device)
        signs = (1, -1) if search.signed else (1,)
        self.factors = self.target.new_tensor([sign * size for sign in signs for size in search.factors])[:, None]
        self.steps = self.target.new_tensor([step for step in search.steps if step > 0 or search.signed])[:, None, None]

    def round(self) -> None:
        """Groups of rows one after the other, then sweeps over them."""
        factor = inverse_factor(self.moments)
        row_factor = None if self.metric is None else inverse_factor(self.metric)
        goal = self.target.clone()
        first_pass = self._repeated(functools.partial(self._first_pass, factor))
        for rows in self._groups():
            places, scales = first_pass(goal[:, rows].contiguous(), self._block_places(rows))
            self.places[:, rows], self.scales[:, rows] = places, scales
            if row_factor is not None:
                error, within = goal[:, rows] - self._values(places, scales), row_factor[rows, rows]
                spread = torch.linalg.solve_triangular(within, error, upper=True, left=False)
                goal[:, rows.stop :].addmm_(spread, row_factor[rows, rows.stop :], alpha=-1)
        if self.search.sweeps:
            factors = [inverse_factor(self.moments[part, part]) for part in self._blocks()]
            sweep = self._repeated(functools.partial(self._sweep, factors))
            for rows in list(self._groups()) * self.search.sweeps:
                self._sweep_group(rows, sweep)

    def result(self) -> Rounded:
        """Codes and scales in the matrix's own order; the change is not yet known."""
        back, rows_back, blocks_back = self.order.argsort(), self.row_order.argsort(), self.block_order.argsort()
        codes = self.levels.codes[self.places[back][:, rows_back].T]
        scales = self.scales[blocks_back][:, rows_back].T
        return Rounded(codes.contiguous(), scales.contiguous(), torch.zeros_like(scales[:, 0]))

    def _repeated(self, function: Pass) -> Pass:
        """`function`, to be called for one group after the other: recorded where there can be several."""
        return function if self.metric is None else Recorded(function)

    def _sweep_group(self, rows: slice, sweep: Pass) -> None:
        """`sweep` over the group `rows` towards what it would best be, given the errors of the other rows."""
        kept = self.places[:, rows].contiguous(), self.scales[:, rows].contiguous()
        tried = self.snap(self.steps * kept[1], self._block_places(rows))
        if self.metric is None:
            self.places[:, rows], self.scales[:, rows] = sweep(self.target[:, rows].contiguous(), *kept, tried)
            return
        error, within = self.target - self._values(self.places, self.scales), self.metric[rows, rows]
        own, pull = error[:, rows].contiguous(), error @ self.metric[:, rows]
        found = sweep(self.target[:, rows] + pull / within.diagonal() - own, *kept, tried)
        after = self.target[:, rows] - self._values(*found)
        rest = 2 * (pull - own @ within)
        before, loss = (((one @ within + rest) * (self.moments @ one)).sum() for one in (own, after))
        better = loss <= before  # rows of one group move at the same time, which can be too far
        self.places[:, rows], self.scales[:, rows] = (
            torch.where(better, new, old) for new, old in zip(found, kept, strict=True)
        )

    def _first_pass(
        self, factor: torch.Tensor, target: torch.Tensor, block_places: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Round block after block of `target` [inputs, rows], each block's errors made up for by those that follow."""
        rest, places, scales = target.clone(), [], []
        for index, part in enumerate(self._blocks()):
            desired, within = rest[part], factor[part, part]
            tried = self.snap(self.factors * desired.abs().amax(0), block_places[index])
            scale, _ = self._best_scales(desired, within, tried)
            place, errors = compensate(desired, within, scale, self.levels)
            rest[part.stop :].addmm_(factor[part, part.stop :].T, errors, alpha=-1)
            places.append(place)
            scales.append(scale)
        return torch.cat(places), torch.stack(scales)

    def _sweep(
        self,
        factors: list[torch.Tensor],
        goal: torch.Tensor,
        places: torch.Tensor,
        scales: torch.Tensor,
        tried: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Choose each block anew, the others given, and keep what comes closer to `goal` [inputs, rows].

        `tried` [steps, blocks, rows] are the scales to choose from.
        """
        places, scales = places.clone(), scales.clone()
        error = goal - self._values(places, scales)
        for index, (part, factor) in enumerate(zip(self._blocks(), factors, strict=True)):
            pull = factor @ (self.moments[part] @ error)
            desired = goal[part] - error[part] + factor.T @ pull
            scale, change = self._best_scales(desired, factor, tried[:, index])
            better = change < pull.square().sum(0) * (1 - 1e-5)
            place, _ = compensate(desired, factor, scale, self.levels)
            places[part] = torch.where(better, place, places[part])
            scales[index] = torch.where(better, scale, scales[index])
            error[part] = goal[part] - self.levels.values[places[part]] * scales[index]
        return places, scales

    def _best_scales(
        self, desired: torch.Tensor, factor: torch.Tensor, tried: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the scales `tried` [tries, rows] those that change outputs least, and that change; both [rows]."""
        change, which = changes(desired, factor, tried, self.levels).min(0)
        return tried.gather(0, which[None])[0], change

    def _block_places(self, rows: slice) -> torch.Tensor:
        """Where the blocks [blocks, rows] of some rows lie in the flattened matrix."""
        return self.row_order[rows] * len(self.scales) + self.block_order[:, None]

    def _values(self, places: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return self.levels.values[places] * scales.repeat_interleave(self.search.block, 0)

    def _blocks(self) -> Iterator[slice]:
        for start in range(0, len(self.target), self.search.block):
            yield slice(start, start + self.search.block)

    def _groups(self) -> Iterator[slice]:
        rows = self.target.shape[1]
        size = rows if self.metric is None else self.search.group
        for start in range(0, rows, size):
            yield slice(start, min(start + size, rows))


def _by_importance(diagonal: torch.Tensor, block: int) -> torch.Tensor:
    """The order of columns: blocks by their sum of `diagonal`, the largest first, and so inside each block.

    What is rounded late has few columns left that could make up for it, so the weightiest go first.
    """
    blocks = diagonal.view(-1, block)
    first = block * torch.arange(len(blocks), device=blocks.device)
    inside = blocks.argsort(dim=1, descending=True, stable=True) + first[:, None]
    return inside[blocks.sum(1).argsort(descending=True, stable=True)].reshape(-1)


def _better(
    found: Rounded,
    nearest: Rounded,
    weight: torch.Tensor,
    moments: torch.Tensor,
    levels: Levels,
    output_moments: torch.Tensor | None,
) -> Rounded:
    """Of the two what changes outputs less: row by row, or all rows together where `output_moments` couple them."""
    errors = [weight.float() - _matrix(one, levels) for one in (found, nearest)]
    changes = [output_change(error, moments) for error in errors]
    take = changes[0] <= changes[1]
    if output_moments is not None:
        losses = [(output_moments @ error @ moments * error).sum() for error in errors]
        take = (losses[0] <= losses[1]).expand_as(take)
    return Rounded(
        torch.where(take[:, None], found.codes, nearest.codes),
        torch.where(take[:, None], found.scales, nearest.scales),
        torch.where(take, changes[0], changes[1]),
    )


def _matrix(rounded: Rounded, levels: Levels) -> torch.Tensor:
    values = torch.empty_like(levels.values).scatter_(0, levels.codes.long(), levels.values)
    block = rounded.codes.shape[1] // rounded.scales.shape[1]
    return values[rounded.codes.int()] * rounded.scales.repeat_interleave(block, 1)


def _inverse(scales: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 for the scale 0 of a block of zeros."""
    return torch.where(scales == 0, torch.zeros_like(scales), 1 / scales)
