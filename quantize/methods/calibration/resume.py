"""The finished parts of a calibrated run, in a folder from which the next run continues."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quantize.formats.bitsandbytes.checkpoint import BIAS
from quantize.formats.bitsandbytes.packing import Packed
from quantize.methods.calibration.gradients import OutputGradient
from quantize.records import CalibrationText
from quantize.resume import ResumeFolder
from quantize.serialization import from_json, to_json

TOKENS, NOTES, ALLOCATION = "tokens.safetensors", "tokens.json", "allocation.json"
GRADIENTS = "gradients.json"
"""Says that the gradients of all layers are there, or were before the layers were finished."""


@dataclass(frozen=True)
class QuantizedLayer:
    """A linear layer as it is stored: its 4-bit matrix, and its new bias where it has one."""

    packed: Packed
    bias: torch.Tensor | None

    def tensors(self) -> dict[str, torch.Tensor]:
        bias = {} if self.bias is None else {BIAS: self.bias}
        return {name: tensor.cpu().contiguous() for name, tensor in {**self.packed.tensors(), **bias}.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> QuantizedLayer:
        weights = {name: tensor for name, tensor in tensors.items() if name != BIAS}
        return cls(Packed.of(weights), tensors.get(BIAS))


@dataclass(frozen=True)
class FinishedParts(ResumeFolder):
    """What a calibrated run has finished: its text, its allocation, and layer after layer."""

    def text(self, prepare: Callable[[], tuple[torch.Tensor, CalibrationText]]) -> tuple[torch.Tensor, CalibrationText]:
        """The text to calibrate on, and its record."""
        tokens, notes = self.part(TOKENS), self.part(NOTES)
        if tokens is None or notes is None:
            prepared, record = prepare()
            tokens = self._save(TOKENS, {"tokens": prepared.contiguous()})
            notes = self._write(NOTES, to_json(record))
        return load_file(tokens)["tokens"], from_json(CalibrationText, notes.read_text("utf-8"), notes)

    def allocation(self, allocate: Callable[[], dict[str, int]]) -> dict[str, int]:
        """The block size of each matrix, or 0 where it is kept in half precision."""
        file = self.part(ALLOCATION) or self._write(ALLOCATION, json.dumps(allocate()))
        block_sizes: dict[str, int] = json.loads(file.read_text("utf-8"))
        return block_sizes

    @property
    def has_gradients(self) -> bool:
        """Whether the gradients of all layers were read."""
        return self.part(GRADIENTS) is not None

    def save_gradients(self, layers: Iterable[tuple[int, Mapping[str, OutputGradient]]]) -> None:
        """Keep gradients by the names of their modules, those of one layer after the other."""
        for index, gradients in layers:
            parts = {f"{name}|{part}": tensor for name, one in gradients.items() for part, tensor in vars(one).items()}
            self._save(_gradients_file(index), parts)
        self._write(GRADIENTS, "{}")

    def gradients(self, index: int) -> dict[str, OutputGradient]:
        """Those of a decoder layer by the names of their modules; empty where none were read."""
        named = _by_name(self.part(_gradients_file(index)))
        return {name: OutputGradient(**parts) for name, parts in named.items()}

    def drop_gradients(self, layers: int) -> None:
        """Give up what is as large as a model, when all `layers` are finished."""
        self.drop(_gradients_file(index) for index in range(layers))

    def layer(self, index: int) -> dict[str, QuantizedLayer]:
        """The matrices of a decoder layer; empty where it is not finished."""
        file = self.part(_layer_file(index))
        return {name: QuantizedLayer.of(tensors) for name, tensors in _by_name(file).items()}

    def save(self, index: int, layers: Mapping[str, QuantizedLayer]) -> None:
        if layers and self.part(_layer_file(index)) is None:
            parts = {
                f"{name}|{part}": tensor for name, layer in layers.items() for part, tensor in layer.tensors().items()
            }
            self._save(_layer_file(index), parts)

    def _save(self, name: str, tensors: dict[str, torch.Tensor]) -> Path:
        return self.keep(name, lambda file: save_file(tensors, file))

    def _write(self, name: str, text: str) -> Path:
        return self.keep(name, lambda file: file.write_text(text, "utf-8"))


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
