"""Compensated rounding (GPTQ) with a scale search: codes and scales that change a layer's outputs least.

For a matrix W [rows, inputs] that becomes Q, with E = W - Q, the outputs on inputs X change by tr(E H E^T), where
H = X^T X / tokens is the input Hessian. Columns are rounded one after the other, and each one's error moves the target
of those that follow by what H says makes up for it best (GPTQ, Frantar et al. 2022). For each block of columns, the
scales of a grid with both signs are tried in full, so that a scale is chosen together with its codes. Passes of
coordinate descent then choose each block again, the others fixed, wherever that makes the error smaller.

Not all output errors matter alike to the model's loss. With the output Hessian A [rows, rows], the second moment of the
loss's gradient at the outputs (the Fisher information), the loss changes by about tr(A E H E^T) / 2, and rows are
rounded in groups, each group's error moving the targets of the rows that follow, as among columns (two-sided rounding,
Tseng et al. 2025).

Inside, matrices are transposed, [inputs, rows]: a column of W is then one contiguous row of memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from quantize.methods.rounding.cuda_graph import GraphedFunction

LEAF = 8
"""Columns that are compensated one by one; with more, errors are propagated by matrix products."""
CANDIDATES_AT_ONCE = {"cpu": 1 << 13}
CANDIDATES_AT_ONCE_ON_GPU = 1 << 19
"""Rows x scales that are rounded together: on a CPU few enough to stay in its cache."""

ScaleQuantizer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Scales [..., rows] and the positions [rows] of their blocks in the flattened matrix -> the scales as stored."""
Pass = Callable[..., tuple[torch.Tensor, ...]]
"""Chooses level indices and scales for a group of rows."""


def unquantized(scales: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """The `ScaleQuantizer` of scales that are stored in float32."""
    return scales


@dataclass(frozen=True)
class GptqOptions:
    """The scales that are tried, and how errors are propagated.

    The first pass tries `scale_grid` times the largest weight of a block, with both signs if `signed`; each of the
    further `passes` of coordinate descent tries `pass_grid` times the present scale. `damping` is added to H's
    diagonal, as a fraction of its mean, and `output_damping` to that of A, by which `group` rows at a time are rounded.
    `block` weights share a scale.
    """

    scale_grid: tuple[float, ...] = (0.74, 0.80, 0.86, 0.92, 0.98, 1.04)
    pass_grid: tuple[float, ...] = (0.95, 0.98, 1.0, 1.02, 1.05, -0.97)
    signed: bool = True
    passes: int = 1
    damping: float = 0.01
    output_damping: float = 0.1
    block: int = 64
    group: int = 64


@dataclass(frozen=True)
class Levels:
    """The table in ascending order: `values` [16], their uint8 `codes` [16], and the `midpoints` [15] between them."""

    values: torch.Tensor
    codes: torch.Tensor
    midpoints: torch.Tensor

    @classmethod
    def of(cls, table: torch.Tensor) -> Levels:
        values, codes = table.float().sort(stable=True)
        return cls(values, codes.to(torch.uint8), (values[1:] + values[:-1]) / 2)

    def nearest(self, relative: torch.Tensor) -> torch.Tensor:
        """Indices 0..15 of the values nearest to `relative`, int32."""
        return torch.bucketize(relative, self.midpoints, out_int32=True)


@dataclass(frozen=True)
class Rounded:
    """`codes` uint8 [rows, inputs], `scales` float32 [rows, blocks] as stored, and `output_error` [rows]: the mean
    squared error of each output on the calibration inputs."""

    codes: torch.Tensor
    scales: torch.Tensor
    output_error: torch.Tensor


class HessianAccumulator:
    """Sums x x^T over calibration inputs x, batch by batch; float32 [inputs, inputs]."""

    def __init__(self, inputs: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(inputs, inputs, device=device)
        self.weight = 0.0

    def add(self, inputs: torch.Tensor, token_weights: torch.Tensor | None = None) -> None:
        """Add `inputs` [tokens, inputs], weighted by `token_weights` [tokens] where there are any."""
        inputs = inputs.float()
        weighted = inputs if token_weights is None else inputs * token_weights[:, None]
        self.total.addmm_(weighted.T, inputs)
        self.weight += len(inputs) if token_weights is None else float(token_weights.sum())

    @property
    def mean(self) -> torch.Tensor:
        return self.total / max(self.weight, 1e-30)


def round_nearest(
    weight: torch.Tensor, levels: Levels, quantize_scales: ScaleQuantizer = unquantized, block: int = 64
) -> Rounded:
    """Each weight of `weight` [rows, inputs] to its nearest level under scale = absmax; `output_error` is left zero."""
    rows, inputs = weight.shape
    blocks = weight.float().contiguous().view(rows, inputs // block, block)
    positions = torch.arange(rows * inputs // block, device=weight.device).view(rows, -1)
    scales = quantize_scales(blocks.abs().amax(2), positions)
    codes = levels.codes[levels.nearest(blocks * _inverse(scales)[..., None])]
    return Rounded(codes.view(rows, inputs), scales, torch.zeros(rows, device=weight.device))


def round_compensated(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    levels: Levels,
    quantize_scales: ScaleQuantizer = unquantized,
    options: GptqOptions | None = None,
    output_hessian: torch.Tensor | None = None,
) -> Rounded:
    """The codes and scales for `weight` [rows, inputs] under the input Hessian `hessian` [inputs, inputs].

    Without an `output_hessian` [rows, rows] each row is rounded on its own. Blocks must not run across rows. No row has
    a larger output error than by `round_nearest` under the same `quantize_scales`, or, with an `output_hessian`, the
    matrix has no larger loss.
    """
    options = options or GptqOptions()
    rounding = _Rounding(weight, hessian, levels, quantize_scales, options, output_hessian)
    rounding.run()
    nearest = round_nearest(weight, levels, quantize_scales, options.block)
    return _lower_error(rounding.result(), nearest, weight, hessian, levels, output_hessian)


def output_error(error: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """e H e^T for each row e of `error` [rows, inputs]: the mean squared error of each output, float32 [rows]."""
    squared: torch.Tensor = (error @ hessian * error).sum(1)
    return squared


def loss(error: torch.Tensor, hessian: torch.Tensor, output_hessian: torch.Tensor | None) -> torch.Tensor:
    """tr(A E H E^T) for the `error` E [rows, inputs] of a matrix; without an `output_hessian` A is the identity."""
    coupled = error if output_hessian is None else output_hessian @ error
    return (coupled @ hessian * error).sum()


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """`hessian` with `damping` x its mean diagonal added to the diagonal; inputs that never fire cannot divide by 0."""
    diagonal = hessian.diagonal()
    return hessian + torch.diag((damping * diagonal.mean()).clamp(min=1e-20).expand(len(diagonal)))


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper triangle U with U^T U = `hessian`^-1, damped further where float32 cannot tell it from singular."""
    for damping in (0.0, 1e-4, 1e-3, 1e-2, 1e-1):
        lower, failed = torch.linalg.cholesky_ex(damped(hessian, damping))
        if not failed:
            upper: torch.Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
    raise ValueError("the Hessian of a layer's inputs is not positive definite")


def compensate(
    target: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, levels: Levels
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round `target` [inputs, rows] under `scales` [rows], each column's error propagated to those that follow.

    `factor` [inputs, inputs] is the `inverse_factor` of the Hessian. Returns the indices of the levels, int32, and the
    errors, scaled so that their squares sum to the output error; both [inputs, rows].
    """
    if target.is_cuda and _has_triton():
        from quantize.methods.rounding import triton_kernel

        return triton_kernel.compensate(target, factor, scales, levels.values, levels.midpoints)
    return _compensate(target, factor, scales, levels)


def squared_errors(target: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, levels: Levels) -> torch.Tensor:
    """The output error [candidates, rows] of `target` [inputs, rows] under each of `scales` [candidates, rows]."""
    if target.is_cuda and _has_triton():
        from quantize.methods.rounding import triton_kernel

        return triton_kernel.squared_errors(target, factor, scales, levels.values, levels.midpoints)
    rows = target.shape[1]
    at_once = max(1, CANDIDATES_AT_ONCE.get(target.device.type, CANDIDATES_AT_ONCE_ON_GPU) // rows)
    totals = []
    for part in torch.split(scales, at_once):
        _, errors = _compensate(target.repeat(1, len(part)), factor, part.reshape(-1), levels)
        totals.append(errors.square_().sum(0).view(len(part), rows))
    return torch.cat(totals)


def _compensate(
    target: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, levels: Levels
) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = len(target)
    if inputs <= LEAF:
        return _compensate_leaf(target, factor, scales, levels)
    half = inputs // 2
    indices, errors = _compensate(target[:half], factor[:half, :half], scales, levels)
    rest = torch.addmm(target[half:], factor[:half, half:].T, errors, alpha=-1)
    later_indices, later_errors = _compensate(rest, factor[half:, half:], scales, levels)
    return torch.cat([indices, later_indices]), torch.cat([errors, later_errors])


def _compensate_leaf(
    target: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, levels: Levels
) -> tuple[torch.Tensor, torch.Tensor]:
    target, inverse = target.clone(), _inverse(scales)
    indices = torch.empty(target.shape, dtype=torch.int32, device=target.device)
    errors = torch.empty_like(target)
    for column in range(len(target)):
        index = levels.nearest(target[column] * inverse)
        error = (target[column] - levels.values[index] * scales) / factor[column, column]
        target[column + 1 :].addr_(factor[column, column + 1 :], error, alpha=-1)
        indices[column], errors[column] = index, error
    return indices, errors


@functools.cache
def _has_triton() -> bool:
    """Whether kernels can be built here: Triton comes with torch for CUDA on Linux, and needs a C compiler."""
    try:
        from quantize.methods.rounding import triton_kernel

        ones = torch.ones(32, 32, device="cuda")
        triton_kernel.compensate(ones, ones, ones[0], torch.arange(16.0, device="cuda"), ones[0])
    except Exception:  # noqa: BLE001 - without Triton, for whatever reason, PyTorch does the same
        return False
    return True


class _Rounding:
    """One matrix while it is rounded; columns and rows in the order of their diagonal in H and A, blocks together."""

    def __init__(
        self,
        weight: torch.Tensor,
        hessian: torch.Tensor,
        levels: Levels,
        quantize_scales: ScaleQuantizer,
        options: GptqOptions,
        output_hessian: torch.Tensor | None,
    ) -> None:
        self.levels, self.quantize_scales, self.options = levels, quantize_scales, options
        rows, inputs = weight.shape
        self.order = _by_diagonal(hessian.diagonal(), options.block)
        self.hessian = damped(hessian, options.damping)[self.order][:, self.order]
        self.row_order = torch.arange(rows, device=weight.device)
        self.output_hessian = None
        if output_hessian is not None:
            self.row_order = output_hessian.diagonal().argsort(descending=True, stable=True)
            self.output_hessian = damped(output_hessian, options.output_damping)[self.row_order][:, self.row_order]
        self.target = weight.T.float()[self.order][:, self.row_order].contiguous()
        self.block_order = self.order[:: options.block] // options.block
        self.indices = torch.zeros(self.target.shape, dtype=torch.int32, device=weight.device)
        self.scales = torch.zeros(inputs // options.block, rows, device=weight.device)
        signs = (1, -1) if options.signed else (1,)
        scale_grid = [sign * factor for sign in signs for factor in options.scale_grid]
        pass_grid = [factor for factor in options.pass_grid if factor > 0 or options.signed]
        self.scale_grid = self.target.new_tensor(scale_grid)[:, None]
        self.pass_grid = self.target.new_tensor(pass_grid)[:, None, None]

    def run(self) -> None:
        """Groups of rows one after the other, then passes of coordinate descent over them."""
        factor = inverse_factor(self.hessian)
        row_factor = None if self.output_hessian is None else inverse_factor(self.output_hessian)
        target = self.target.clone()
        first_pass = self._graphed(functools.partial(self._first_pass, factor))
        for rows in self._groups():
            indices, scales = first_pass(target[:, rows].contiguous(), self._block_positions(rows))
            self.indices[:, rows], self.scales[:, rows] = indices, scales
            if row_factor is not None:
                error, group_factor = target[:, rows] - self._values(indices, scales), row_factor[rows, rows]
                spread = torch.linalg.solve_triangular(group_factor, error, upper=True, left=False)
                target[:, rows.stop :].addmm_(spread, row_factor[rows, rows.stop :], alpha=-1)
        if self.options.passes:
            factors = [inverse_factor(self.hessian[part, part]) for part in self._blocks()]
            descend = self._graphed(functools.partial(self._descend, factors))
            for rows in list(self._groups()) * self.options.passes:
                self._improve_group(rows, descend)

    def result(self) -> Rounded:
        """Codes and scales in the matrix's own order; the output error is not yet known."""
        back, rows_back, blocks_back = self.order.argsort(), self.row_order.argsort(), self.block_order.argsort()
        codes = self.levels.codes[self.indices[back][:, rows_back].T]
        scales = self.scales[blocks_back][:, rows_back].T
        return Rounded(codes.contiguous(), scales.contiguous(), torch.zeros_like(scales[:, 0]))

    def _graphed(self, function: Pass) -> Pass:
        """`function`, to be called for one group after the other: as a CUDA graph where there can be several."""
        return function if self.output_hessian is None else GraphedFunction(function)

    def _improve_group(self, rows: slice, descend: Pass) -> None:
        """`descend` over the group `rows` towards its optimum given the errors of the other rows."""
        before = self.indices[:, rows].contiguous(), self.scales[:, rows].contiguous()
        candidates = self.quantize_scales(self.pass_grid * before[1], self._block_positions(rows))
        if self.output_hessian is None:
            target = self.target[:, rows].contiguous()
            self.indices[:, rows], self.scales[:, rows] = descend(target, *before, candidates)
            return
        error, group_hessian = self.target - self._values(self.indices, self.scales), self.output_hessian[rows, rows]
        error_before, gradient = error[:, rows].contiguous(), error @ self.output_hessian[:, rows]
        target = self.target[:, rows] + gradient / group_hessian.diagonal() - error_before
        after = descend(target, *before, candidates)
        error_after = self.target[:, rows] - self._values(*after)
        others = 2 * (gradient - error_before @ group_hessian)
        loss_before, loss_after = (
            ((error @ group_hessian + others) * (self.hessian @ error)).sum() for error in (error_before, error_after)
        )
        better = loss_after <= loss_before  # rows of one group move at the same time, which can be too far
        self.indices[:, rows], self.scales[:, rows] = (
            torch.where(better, new, old) for new, old in zip(after, before, strict=True)
        )

    def _first_pass(
        self, factor: torch.Tensor, target: torch.Tensor, block_positions: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Round block after block of `target` [inputs, rows], each block's errors compensated by those that follow."""
        rest, indices, scales = target.clone(), [], []
        for block, part in enumerate(self._blocks()):
            block_target, block_factor = rest[part], factor[part, part]
            candidates = self.quantize_scales(self.scale_grid * block_target.abs().amax(0), block_positions[block])
            scale, _ = self._best_scales(block_target, block_factor, candidates)
            block_indices, errors = compensate(block_target, block_factor, scale, self.levels)
            rest[part.stop :].addmm_(factor[part, part.stop :].T, errors, alpha=-1)
            indices.append(block_indices)
            scales.append(scale)
        return torch.cat(indices), torch.stack(scales)

    def _descend(
        self,
        factors: list[torch.Tensor],
        target: torch.Tensor,
        indices: torch.Tensor,
        scales: torch.Tensor,
        candidates: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """One pass: choose each block again, the others fixed, and keep what comes closer to `target` [inputs, rows].

        `candidates` [factors, blocks, rows] are the scales to choose from.
        """
        indices, scales = indices.clone(), scales.clone()
        error = target - self._values(indices, scales)
        for block, (part, factor) in enumerate(zip(self._blocks(), factors, strict=True)):
            gradient = factor @ (self.hessian[part] @ error)
            block_target = target[part] - error[part] + factor.T @ gradient
            scale, squared_error = self._best_scales(block_target, factor, candidates[:, block])
            better = squared_error < gradient.square().sum(0) * (1 - 1e-5)
            block_indices, _ = compensate(block_target, factor, scale, self.levels)
            indices[part] = torch.where(better, block_indices, indices[part])
            scales[block] = torch.where(better, scale, scales[block])
            error[part] = target[part] - self.levels.values[indices[part]] * scales[block]
        return indices, scales

    def _best_scales(
        self, target: torch.Tensor, factor: torch.Tensor, candidates: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the scales `candidates` [candidates, rows] those of the smallest output error, and that; both [rows]."""
        squared_error, which = squared_errors(target, factor, candidates, self.levels).min(0)
        return candidates.gather(0, which[None])[0], squared_error

    def _block_positions(self, rows: slice) -> torch.Tensor:
        """Where the blocks [blocks, rows] of some rows lie in the flattened matrix."""
        return self.row_order[rows] * len(self.scales) + self.block_order[:, None]

    def _values(self, indices: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return self.levels.values[indices] * scales.repeat_interleave(self.options.block, 0)

    def _blocks(self) -> Iterator[slice]:
        for start in range(0, len(self.target), self.options.block):
            yield slice(start, start + self.options.block)

    def _groups(self) -> Iterator[slice]:
        rows = self.target.shape[1]
        size = rows if self.output_hessian is None else self.options.group
        for start in range(0, rows, size):
            yield slice(start, min(start + size, rows))


def _by_diagonal(diagonal: torch.Tensor, block: int) -> torch.Tensor:
    """The order of columns: blocks by their sum of `diagonal`, the largest first, and so inside each block.

    What is rounded late has few columns left that could compensate it, so those of the largest diagonal go first.
    """
    blocks = diagonal.view(-1, block)
    first = block * torch.arange(len(blocks), device=blocks.device)
    inside = blocks.argsort(dim=1, descending=True, stable=True) + first[:, None]
    return inside[blocks.sum(1).argsort(descending=True, stable=True)].reshape(-1)


def _lower_error(
    compensated: Rounded,
    nearest: Rounded,
    weight: torch.Tensor,
    hessian: torch.Tensor,
    levels: Levels,
    output_hessian: torch.Tensor | None,
) -> Rounded:
    """The one with the smaller error: row by row, or for all rows together where an `output_hessian` couples them."""
    errors = [weight.float() - _matrix(rounded, levels) for rounded in (compensated, nearest)]
    output_errors = [output_error(error, hessian) for error in errors]
    better = output_errors[0] <= output_errors[1]
    if output_hessian is not None:
        losses = [loss(error, hessian, output_hessian) for error in errors]
        better = (losses[0] <= losses[1]).expand_as(better)
    return Rounded(
        torch.where(better[:, None], compensated.codes, nearest.codes),
        torch.where(better[:, None], compensated.scales, nearest.scales),
        torch.where(better, output_errors[0], output_errors[1]),
    )


def _matrix(rounded: Rounded, levels: Levels) -> torch.Tensor:
    values = torch.empty_like(levels.values).scatter_(0, levels.codes.long(), levels.values)
    block = rounded.codes.shape[1] // rounded.scales.shape[1]
    return values[rounded.codes.int()] * rounded.scales.repeat_interleave(block, 1)


def _inverse(scales: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 for the scale 0 of a block of zeros."""
    return torch.where(scales == 0, torch.zeros_like(scales), 1 / scales)
