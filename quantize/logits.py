"""Logits in slices of positions, so that those of a whole text never lie in memory together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SLICE_LOGITS = 1 << 22
"""Logits in a slice, unless a caller names another number: 16 MB in float32."""
CHECKED_TOKENS, CHECKED_SLICES = 24, 4
ROUNDING_STEPS = 8
"""Of the logits' type at their largest size: by so much a product may differ with the number of rows in it."""


class _DecoderDone(Exception):
    """The last hidden states are known; the head need not run."""


@dataclass(frozen=True)
class SlicedLogits:
    """Turns the last hidden states of a causal model into logits, for as many positions at a time as are asked for.

    The model's own forward does it while its `decoder` stands aside, so whatever a model does beside the head's product
    (softcapping, scale factors) is done. A model that does not come apart like that has None for a decoder: the states
    are then the logits themselves.
    """

    model: Any
    vocabulary: int
    decoder: Any | None = None
    output: Callable[[torch.Tensor], Any] | None = None

    @classmethod
    def of(cls, model: Any, tokens: torch.Tensor) -> SlicedLogits:
        """For `model`, with a decoder if slices agree with whole logits on a few of `tokens` [batch, length]."""
        import torch

        sample, outputs = tokens[:1, :CHECKED_TOKENS], {}

        def keep(module: Any, _: Any, output: Any) -> None:
            outputs[module] = output

        hooks = [decoder.register_forward_hook(keep) for decoder in _possible_decoders(model)]
        try:
            with torch.inference_mode():
                logits = model(sample, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        for decoder, output in outputs.items():
            sliced = cls(model, logits.shape[-1], decoder, _output_like(output))
            if sliced._agrees(output, sample, logits):
                return sliced
        return cls(model, logits.shape[-1])

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """The last hidden states [batch, length, width] after `tokens` [batch, length]."""
        if self.decoder is None:
            whole: torch.Tensor = self.model(tokens, use_cache=False).logits
            return whole
        outputs: list[Any] = []

        def keep(_: Any, __: Any, output: Any) -> None:
            outputs.append(output)
            raise _DecoderDone

        hook = self.decoder.register_forward_hook(keep)
        try:
            self.model(tokens, use_cache=False)
        except _DecoderDone:
            pass
        finally:
            hook.remove()
        return _states(outputs[0])

    def logits(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [batch, positions, vocabulary] of a slice of the `states` after the same slice of the `tokens`."""
        if self.decoder is None or self.output is None:
            return states
        output = self.output(states)
        with _standing_in(self.decoder, lambda *_, **__: output):
            logits: torch.Tensor = self.model(tokens, use_cache=False).logits
        return logits

    def slices(
        self, states: torch.Tensor, tokens: torch.Tensor, logits_at_once: int = SLICE_LOGITS
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Slices of the positions in their order, as long as `logits_at_once` allows, and the logits of each."""
        batch, length = tokens.shape
        positions = max(1, logits_at_once // (batch * self.vocabulary))
        for start in range(0, length, positions):
            part = slice(start, min(start + positions, length))
            yield part, self.logits(states[:, part], tokens[:, part])

    def _agrees(self, output: Any, tokens: torch.Tensor, whole: torch.Tensor) -> bool:
        """Whether slices of the decoder's `output` give the logits that the model gave as a `whole`."""
        import torch

        try:
            with torch.inference_mode():
                slices = list(self.slices(_states(output), tokens, whole.numel() // CHECKED_SLICES))
            together = torch.cat([logits for _, logits in slices], dim=1)
        except Exception:  # noqa: BLE001 - a model that cannot be cut like this is read whole
            return False
        largest = float(whole.nan_to_num(0, 0, 0).abs().max())
        tolerance = ROUNDING_STEPS * torch.finfo(whole.dtype).eps * largest
        alike = together.shape == whole.shape
        return alike and torch.allclose(together, whole, rtol=0.0, atol=tolerance, equal_nan=True)


def _possible_decoders(model: Any) -> list[Any]:
    """Modules of a model that may be all of it but the head, by the two names that transformers has for them."""
    named = (getattr(model, "base_model", model), model.get_decoder() if hasattr(model, "get_decoder") else model)
    return [decoder for decoder in dict.fromkeys(named) if decoder is not None and decoder is not model]


def _states(output: Any) -> torch.Tensor:
    """What a decoder returns first."""
    states: torch.Tensor = output[0] if isinstance(output, tuple) else output.last_hidden_state
    return states


def _output_like(output: Any) -> Callable[[torch.Tensor], Any]:
    """Makes of hidden states what the decoder returned: a tuple that begins with them, or a record that names them."""
    if isinstance(output, tuple):
        rest = tuple(None for _ in output[1:])
        return lambda states: (states, *rest)
    kind = type(output)
    return lambda states: kind(last_hidden_state=states)


@contextmanager
def _standing_in(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Lets `forward` stand in for a module's own, or for that which accelerate gave it."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
