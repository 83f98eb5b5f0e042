"""The finished parts of a calibrated run, in folders from which the next attempt and the next run continue."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quantize.formats.bitsandbytes.checkpoint import BIAS
from quantize.formats.bitsandbytes.packing import Packed
from quantize.methods.calibration.allocation import Offers
from quantize.methods.calibration.gradients import OutputGradient
from quantize.records import CalibrationText
from quantize.resume import ResumeFolder
from quantize.serialization import from_json, to_json

TOKENS, NOTES, OFFERS = "tokens.safetensors", "tokens.json", "offers.json"
GRADIENTS, LEARNING_GRADIENTS = "gradients.json", "learning-gradients.json"
"""Say that the gradients of all layers are there: those of matrices, and those of whole layers as well."""
DIVERGENCES = "divergences"


@dataclass(frozen=True)
class QuantizedLayer:
    """A linear layer as it is stored: its 4-bit matrix, and its new bias where it has one.

    `divergences` [block sizes] are those of the model when only this matrix is rounded (nats), in each block size that
    was tried.
    """

    packed: Packed
    bias: torch.Tensor | None
    divergences: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        bias = {} if self.bias is None else {BIAS: self.bias}
        return {name: tensor.cpu().contiguous() for name, tensor in {**self.packed.tensors(), **bias}.items()}

    def parts(self) -> dict[str, torch.Tensor]:
        """What is kept of it between runs."""
        measured = {} if self.divergences is None else {DIVERGENCES: self.divergences}
        return {**self.tensors(), **measured}

    @classmethod
    def of(cls, parts: Mapping[str, torch.Tensor]) -> QuantizedLayer:
        weights = {name: tensor for name, tensor in parts.items() if name not in (BIAS, DIVERGENCES)}
        return cls(Packed.of(weights), parts.get(BIAS), parts.get(DIVERGENCES))


@dataclass(frozen=True)
class PreparedParts(ResumeFolder):
    """What several attempts of a run have in common: the text, its gradients, and what each matrix would cost."""

    def text(self, prepare: Callable[[], tuple[torch.Tensor, CalibrationText]]) -> tuple[torch.Tensor, CalibrationText]:
        """The text to calibrate on, and its record."""
        tokens, notes = self.part(TOKENS), self.part(NOTES)
        if tokens is None or notes is None:
            prepared, record = prepare()
            tokens = self._save(TOKENS, {"tokens": prepared.contiguous()})
            notes = self._write(NOTES, to_json(record))
        return load_file(tokens)["tokens"], from_json(CalibrationText, notes.read_text("utf-8"), notes)

    def has_gradients(self, learning: bool) -> bool:
        """Whether the gradients of all layers were read, for `learning` as well."""
        return self.part(LEARNING_GRADIENTS) is not None or (not learning and self.part(GRADIENTS) is not None)

    def save_gradients(self, layers: Iterable[tuple[int, Mapping[str, OutputGradient]]], learning: bool) -> None:
        """Keep gradients by the names of their modules, those of one layer after the other."""
        for index, gradients in layers:
            parts = {
                f"{name}|{part}": tensor
                for name, gradient in gradients.items()
                for part, tensor in vars(gradient).items()
                if tensor is not None
            }
            self._save(_gradients_file(index), parts)
        self._write(LEARNING_GRADIENTS if learning else GRADIENTS, "{}")

    def gradients(self, index: int) -> dict[str, OutputGradient]:
        """Those of a decoder layer by the names of their modules; empty where none were read."""
        named = _by_name(self.part(_gradients_file(index)))
        return {name: OutputGradient(**parts) for name, parts in named.items()}

    def offers(self, measure: Callable[[], Offers]) -> Offers:
        """The ways to store each matrix."""
        file = self.part(OFFERS) or self._write(OFFERS, to_json(measure()))
        return from_json(Offers, file.read_text("utf-8"), file)

    def _save(self, name: str, tensors: dict[str, torch.Tensor]) -> Path:
        return self.keep(name, lambda file: save_file(tensors, file))

    def _write(self, name: str, text: str) -> Path:
        return self.keep(name, lambda file: file.write_text(text, "utf-8"))


@dataclass(frozen=True)
class FinishedLayers(ResumeFolder):
    """Layer after layer of an attempt."""

    def layer(self, index: int) -> dict[str, QuantizedLayer]:
        """The matrices of a decoder layer; empty where it is not finished."""
        return {name: QuantizedLayer.of(parts) for name, parts in _by_name(self.part(_layer_file(index))).items()}

    def save(self, index: int, layers: Mapping[str, QuantizedLayer]) -> None:
        if layers and self.part(_layer_file(index)) is None:
            parts = {
                f"{name}|{part}": tensor for name, layer in layers.items() for part, tensor in layer.parts().items()
            }
            self.keep(_layer_file(index), lambda file: save_file(parts, file))


def _layer_file(index: int) -> str:
    return f"layer-{index}.safetensors"


def _gradients_file(index: int) -> str:
    return f"gradients-{index}.safetensors"


def _by_name(file: Path | None) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a file by the module and the part that their names consist of; empty where there is none."""
    named: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in (load_file(file) if file else {}).items():
        name, _, part = key.partition("|")
        named.setdefault(name, {})[part] = tensor
    return named
