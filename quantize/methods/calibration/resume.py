"""What a calibrated run has finished so far, in a folder from which the next run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quantize.errors import storage_errors
from quantize.formats.bitsandbytes.checkpoint import BIAS
from quantize.formats.bitsandbytes.packing import Packed
from quantize.records import CalibrationText
from quantize.resume import ResumeFolder
from quantize.serialization import from_json, to_json


@dataclass(frozen=True)
class QuantizedLayer:
    """What a matrix becomes: the tensors of its 4-bit form, and its new bias where it has one."""

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
        tokens, notes = self.folder / "tokens.safetensors", self.folder / "tokens.json"
        if not notes.is_file():
            found, record = prepare()
            self._save(tokens, {"tokens": found.contiguous()})
            self._write(notes, to_json(record))
        return load_file(tokens)["tokens"], from_json(CalibrationText, notes.read_text("utf-8"), notes)

    def forms(self, allocate: Callable[[], dict[str, int]]) -> dict[str, int]:
        """How each matrix is to be stored."""
        file = self.folder / "forms.json"
        if not file.is_file():
            self._write(file, json.dumps(allocate()))
        found: dict[str, int] = json.loads(file.read_text("utf-8"))
        return found

    def block(self, index: int) -> dict[str, QuantizedLayer]:
        """The matrices of a block of the model; none where it is not finished."""
        file = self._block(index)
        named: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in (load_file(file) if file.is_file() else {}).items():
            name, _, part = key.partition("|")
            named.setdefault(name, {})[part] = tensor
        return {name: QuantizedLayer.of(tensors) for name, tensors in named.items()}

    def keep(self, index: int, found: Mapping[str, QuantizedLayer]) -> None:
        if found and not self._block(index).is_file():
            parts = {f"{name}|{part}": tensor for name, one in found.items() for part, tensor in one.tensors().items()}
            self._save(self._block(index), parts)

    def _block(self, index: int) -> Path:
        return self.folder / f"block-{index}.safetensors"

    def _save(self, file: Path, tensors: dict[str, torch.Tensor]) -> None:
        with storage_errors(self.folder):
            save_file(tensors, file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)

    def _write(self, file: Path, text: str) -> None:
        with storage_errors(self.folder):
            file.with_suffix(".part").write_text(text, "utf-8")
            file.with_suffix(".part").rename(file)
