"""Both models read the same windows, and every token is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from quantize.logits import SlicedLogits

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

BATCH_LOGITS = {"cpu": 1 << 23, "gpu": 1 << 27}
"""Logits that one model may return in one batch: 32 MB in float32 on a CPU, which gains nothing from more, and 512 MB
on a GPU, which needs work enough to hide the launching of kernels."""
HEAD_LOGITS = {"cpu": 1 << 26, "gpu": 1 << 27}
"""Logits that a model's head makes at a time: for many positions, since it reads all its weights each time."""
SLICE_LOGITS = {"cpu": 1 << 18, "gpu": 1 << 22}
"""Logits that are turned into log-probabilities at a time: on a CPU few enough to stay in its cache."""
TILE = {"cpu": 1 << 14, "gpu": 0}
"""Of a vocabulary, how much is compared at a time; 0 for all of it."""

Logits = Callable[[slice], "torch.Tensor"]
"""The logits [count, positions, vocabulary] of a slice of the positions of some windows."""


class ReferenceLogits(Protocol):
    """Where the reference's logits come from: the model itself, or what was kept of its logits."""

    @property
    def vocabulary(self) -> int: ...

    def read(self, start: int, tokens: torch.Tensor) -> Logits:
        """Logits after `tokens` [count, window], which are the windows from `start` on."""


@dataclass(frozen=True)
class LiveReference:
    """A model, run on demand."""

    sliced: SlicedLogits

    @classmethod
    def of(cls, model: Any, windows: torch.Tensor, device: str) -> LiveReference:
        """For `model` on the device, which is tried on a few of the tokens of `windows`."""
        return cls(SlicedLogits.of(model, windows[:1].to(device)))

    @property
    def vocabulary(self) -> int:
        return self.sliced.vocabulary

    def read(self, start: int, tokens: torch.Tensor) -> Logits:
        states = self.sliced.states(tokens)
        return lambda part: self.sliced.logits(states[:, part], tokens[:, part])


@dataclass(frozen=True)
class KeptLogits:
    """Logits that were computed before, [windows, window, vocabulary]."""

    kept: torch.Tensor

    @classmethod
    def of(cls, model: Any, windows: torch.Tensor, device: str) -> KeptLogits:
        """The logits of `model` on a few `windows`, kept in float32 on the CPU."""
        import torch

        with torch.inference_mode():
            return cls(model(windows.to(device)).logits.float().cpu())

    @property
    def vocabulary(self) -> int:
        return self.kept.shape[-1]

    def read(self, start: int, tokens: torch.Tensor) -> Logits:
        return lambda part: self.kept[start : start + len(tokens), part].to(tokens.device)


@dataclass(frozen=True)
class TokenScores:
    """Per scored token, shape [windows, window - 1]: the first token of a window has no context to be scored in.

    `nll_*` and `kld` in nats, `delta_p` the candidate's minus the reference's probability of the correct token.
    """

    nll_reference: NDArray[np.float64]
    nll_candidate: NDArray[np.float64]
    kld: NDArray[np.float64]
    same_top: NDArray[np.bool_]
    delta_p: NDArray[np.float64]

    @property
    def finite(self) -> bool:
        """Whether every figure is a number: half-precision overflow makes NaN of them."""
        return all(bool(np.isfinite(getattr(self, item.name)).all()) for item in fields(self))

    def without_prefix(self, length: int) -> TokenScores:
        """The scores of a text alone, where windows begin with `length` tokens that belong to none."""
        return TokenScores(*(getattr(self, item.name)[:, max(0, length - 1) :] for item in fields(self)))

    def __add__(self, later: TokenScores) -> TokenScores:
        """These windows and the `later` ones."""
        columns = ((getattr(self, item.name), getattr(later, item.name)) for item in fields(self))
        return TokenScores(*(np.concatenate(pair) for pair in columns))


def score(
    reference: ReferenceLogits,
    candidate: Any,
    windows: torch.Tensor,
    device: str,
    advance: Callable[[int], None],
    first: int = 0,
) -> TokenScores:
    """Score `windows` [count, window] in batches that bound memory whatever the corpus.

    `candidate` is a model, or a LiveReference of one. `first` is the index of the first of these windows in the order
    in which the corpus is read.
    """
    import torch

    model = candidate if isinstance(candidate, LiveReference) else LiveReference.of(candidate, windows, device)
    batch_size = batch_of(windows.shape[1] * reference.vocabulary, device)
    # Figures go into one array: small pieces of their own, left between large ones, would break up the heap.
    figures = torch.empty(5, len(windows), windows.shape[1] - 1, dtype=torch.float64, device=device)
    batches = torch.split(figures, batch_size, dim=1)
    with torch.inference_mode():
        for batch, tokens in zip(batches, torch.split(windows.to(device), batch_size), strict=True):
            _score_batch(reference.read(first, tokens), model.read(first, tokens), tokens, batch, reference.vocabulary)
            first += len(tokens)
            advance(len(tokens))
    nll_reference, nll_candidate, kld, same_top, delta_p = figures.cpu().numpy()
    return TokenScores(nll_reference, nll_candidate, kld, same_top.astype(np.bool_), delta_p)


def vocabulary_of(model: Any) -> int:
    """How many logits a model gives for each position."""
    return int(model.get_output_embeddings().weight.shape[0])


def _score_batch(
    reference: Logits, candidate: Logits, tokens: torch.Tensor, figures: torch.Tensor, vocabulary: int
) -> None:
    """Write the five per-token figures of a batch of `tokens` [batch, window] into `figures` [5, batch, window - 1]."""
    batch, window = tokens.shape
    for part in head_slices(batch, window, vocabulary, tokens.device):
        _score_slice(reference(part), candidate(part), tokens[:, part.start + 1 : part.stop + 1], figures[:, :, part])


def head_slices(batch: int, window: int, vocabulary: int, device: object) -> Iterator[slice]:
    """The positions of `batch` windows that are scored, as many at a time as a model's head shall make logits for."""
    positions = max(1, HEAD_LOGITS[_kind(device)] // (batch * vocabulary))
    for start in range(0, window - 1, positions):
        yield slice(start, min(start + positions, window - 1))


def _score_slice(
    reference: torch.Tensor, candidate: torch.Tensor, targets: torch.Tensor, figures: torch.Tensor
) -> None:
    """Write the figures of `targets` [batch, positions] under logits [batch, positions, vocabulary] into `figures`."""
    batch, positions = targets.shape
    rows = slice_of((TILE[_kind(reference.device)] or reference.shape[-1]) * batch, reference.device)
    for start in range(0, positions, rows):
        part = slice(start, min(start + rows, positions))
        columns = compare_logits(reference[:, part], candidate[:, part], targets[:, part])
        for figure, column in zip(figures, columns, strict=True):
            figure[:, part] = column


def nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p of `targets` [batch, positions], in nats and float64; logits are [batch, positions, vocabulary]."""
    import torch

    rows = slice_of(logits.shape[-1] * len(logits), logits.device)
    parts = zip(torch.split(logits, rows, dim=1), torch.split(targets, rows, dim=1), strict=True)
    columns = [
        torch.log_softmax(part, dim=-1, dtype=torch.float64).gather(-1, target.unsqueeze(-1)).squeeze(-1)
        for part, target in parts
    ]
    return -torch.cat(columns, dim=1)


def batch_of(logits: int, device: object) -> int:
    """Windows to read at once, at `logits` logits each."""
    return max(1, BATCH_LOGITS[_kind(device)] // logits)


def slice_of(logits: int, device: object) -> int:
    """Positions to turn into log-probabilities at once, at `logits` logits each."""
    return max(1, SLICE_LOGITS[_kind(device)] // logits)


def _kind(device: object) -> str:
    return "cpu" if str(device) == "cpu" else "gpu"


def compare_logits(
    reference: torch.Tensor, candidate: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Figures of one slice of logits [..., vocabulary] against `targets` [...], all in float64.

    With p = softmax(reference) and q = softmax(candidate): -log p(t), -log q(t), sum p (log p - log q),
    argmax p = argmax q, and q(t) - p(t). These are the quantities of llama.cpp's `--kl-divergence`.
    A vocabulary that one of the two pads to a larger size is compared where both have it.
    """
    import torch

    shared = min(reference.shape[-1], candidate.shape[-1])
    reference, candidate = reference[..., :shared], candidate[..., :shared]
    kind, index = _kind(reference.device), targets.unsqueeze(-1)
    tops = reference.argmax(-1, keepdim=True), candidate.argmax(-1, keepdim=True)
    largest_x, largest_y = (
        logits.gather(-1, top).double() for logits, top in zip((reference, candidate), tops, strict=True)
    )
    sum_p = sum_q = weighted = torch.zeros_like(largest_x.squeeze(-1))
    tiles = (torch.split(logits, TILE[kind] or shared, dim=-1) for logits in (reference, candidate))
    for reference_tile, candidate_tile in zip(*tiles, strict=True):
        x, y = reference_tile.double(), candidate_tile.double()
        difference = x - y
        p, q = x.sub_(largest_x).exp_(), y.sub_(largest_y).exp_()
        sum_p, sum_q = sum_p + p.sum(-1), sum_q + q.sum(-1)
        weighted = weighted + torch.linalg.vecdot(p, difference)
    log_z_p, log_z_q = largest_x.squeeze(-1) + sum_p.log(), largest_y.squeeze(-1) + sum_q.log()
    log_p_target = reference.gather(-1, index).squeeze(-1).double() - log_z_p
    log_q_target = candidate.gather(-1, index).squeeze(-1).double() - log_z_q
    # sum p (log p - log q) = sum p (x - y) - log Z_p + log Z_q
    kld = weighted / sum_p - (log_z_p - log_z_q)
    same_top = (tops[0] == tops[1]).squeeze(-1)
    return -log_p_target, -log_q_target, kld, same_top, log_q_target.exp() - log_p_target.exp()


def mean_kld(reference: torch.Tensor, candidate: torch.Tensor) -> float:
    """Mean divergence of `candidate` from `reference`, both logits [positions, vocabulary], in nats."""
    import torch

    rows = slice_of(reference.shape[-1], reference.device)
    parts = zip(torch.split(reference, rows), torch.split(candidate, rows), strict=True)
    klds = [compare_logits(left, right, left.argmax(-1))[2] for left, right in parts]
    return float(torch.cat(klds).mean().clamp_min(0.0))
