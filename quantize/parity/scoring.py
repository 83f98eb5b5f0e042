"""Both models read the same windows, and every token's figures are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

BATCH_LOGITS = 1 << 25
"""Logits that one model may return in one batch: 128 MB in float32."""
SLICE_LOGITS = 1 << 23
"""Logits that are turned into log-probabilities at a time."""


@dataclass(frozen=True)
class TokenScores:
    """Per scored token, shape [windows, window - 1]: the first token of a window has no context to be scored in.

    `nll_*` and `kld` in nats, `delta_p` the candidate's minus the reference's probability of the correct token.
    """

    nll_reference: NDArray[np.float32]
    nll_candidate: NDArray[np.float32]
    kld: NDArray[np.float32]
    same_top: NDArray[np.bool_]
    delta_p: NDArray[np.float32]

    @property
    def finite(self) -> bool:
        """Whether every figure is a number: half-precision overflow makes NaN of them."""
        return all(bool(np.isfinite(getattr(self, item.name)).all()) for item in fields(self))

    def __add__(self, later: TokenScores) -> TokenScores:
        """These windows and the `later` ones."""
        columns = ((getattr(self, item.name), getattr(later, item.name)) for item in fields(self))
        return TokenScores(*(np.concatenate(pair) for pair in columns))


def score(
    reference: Any, candidate: Any, windows: torch.Tensor, device: str, advance: Callable[[int], None]
) -> TokenScores:
    """Score `windows` [count, window] in batches that bound memory whatever the corpus."""
    import torch

    vocabulary = int(reference.get_output_embeddings().weight.shape[0])
    batch_size = max(1, BATCH_LOGITS // (windows.shape[1] * vocabulary))
    parts: list[list[torch.Tensor]] = []
    with torch.inference_mode():
        for batch in torch.split(windows, batch_size):
            tokens = batch.to(device)
            parts.append(_score_batch(reference(tokens).logits, candidate(tokens).logits, tokens))
            advance(len(batch))
    columns = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
    return TokenScores(*columns)


def outputs(model: Any, windows: torch.Tensor, device: str) -> torch.Tensor:
    """Logits of a few windows, [count, window, vocabulary], in float32 on the CPU."""
    import torch

    with torch.inference_mode():
        return torch.cat([model(window[None].to(device)).logits.float().cpu() for window in windows])


def mean_divergence(reference: torch.Tensor, candidate: torch.Tensor) -> float:
    """Mean KLD over all positions of two sets of logits."""
    import torch

    return float(compare_logits(reference, candidate, torch.zeros(reference.shape[:-1], dtype=torch.long))[2].mean())


def _score_batch(reference: torch.Tensor, candidate: torch.Tensor, tokens: torch.Tensor) -> list[torch.Tensor]:
    """The five per-token figures of a batch, each [batch, window - 1]; logits are [batch, window, vocabulary]."""
    import torch

    batch, window, vocabulary = reference.shape
    rows = max(1, SLICE_LOGITS // (vocabulary * batch))
    slices = [
        compare_logits(
            reference[:, start : min(start + rows, window - 1)],
            candidate[:, start : min(start + rows, window - 1)],
            tokens[:, start + 1 : min(start + rows, window - 1) + 1],
        )
        for start in range(0, window - 1, rows)
    ]
    return [torch.cat(column, dim=1) for column in zip(*slices, strict=True)]


def compare_logits(
    reference: torch.Tensor, candidate: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Figures of one slice of logits [..., vocabulary] against `targets` [...].

    With p = softmax(reference) and q = softmax(candidate): -log p(t), -log q(t), sum p (log p - log q),
    argmax p = argmax q, and q(t) - p(t). These are the quantities of llama.cpp's `--kl-divergence`.
    A vocabulary that one of the two pads to a larger size is compared where both have it.
    """
    import torch

    shared = min(reference.shape[-1], candidate.shape[-1])
    log_p = torch.log_softmax(reference[..., :shared].float(), dim=-1)
    log_q = torch.log_softmax(candidate[..., :shared].float(), dim=-1)
    right = targets.unsqueeze(-1)
    log_p_right, log_q_right = log_p.gather(-1, right).squeeze(-1), log_q.gather(-1, right).squeeze(-1)
    same_top = log_p.argmax(-1) == log_q.argmax(-1)
    kld = (log_p.exp() * (log_p - log_q)).sum(-1)
    return -log_p_right, -log_q_right, kld, same_top, log_q_right.exp() - log_p_right.exp()
