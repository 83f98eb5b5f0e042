"""What a recipe has done so far, in a folder: a run that goes on after a killed one takes it up there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from quantize.errors import storage_errors
from quantize.formats.bitsandbytes.packing import Packed
from quantize.records import Calibrated, from_json, to_json

CODES, BIAS = "weight", "bias"


@dataclass(frozen=True)
class Chosen:
    """What a matrix becomes: the tensors of its 4-bit form, and its new bias where it has one."""

    packed: Packed
    bias: torch.Tensor | None

    def tensors(self) -> dict[str, torch.Tensor]:
        bias = {} if self.bias is None else {BIAS: self.bias}
        return {name: tensor.cpu().contiguous() for name, tensor in {**self.packed.tensors(), **bias}.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Chosen:
        weights = {name: tensor for name, tensor in tensors.items() if name != BIAS}
        return cls(Packed.of(weights), tensors.get(BIAS))


@dataclass(frozen=True)
class Work:
    """The folder of what is finished. Files get their names in one rename: each is whole or absent."""

    folder: Path

    @classmethod
    def begin(cls, folder: Path, made_of: Mapping[str, Any]) -> Work:
        """Go on in `folder`, emptied first unless what is there was begun with the same things by the same torch."""
        text = json.dumps({**made_of, "torch": torch.__version__}, sort_keys=True, default=dataclasses.asdict)
        state, mark = hashlib.sha256(text.encode()).hexdigest(), folder / "made-of"
        if not mark.is_file() or mark.read_text("utf-8") != state:
            with storage_errors(folder):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                mark.write_text(state, "utf-8")
        return cls(folder)

    def text(self, prepare: Callable[[], tuple[torch.Tensor, Calibrated]]) -> tuple[torch.Tensor, Calibrated]:
        """The text to calibrate on, and its record."""
        tokens, notes = self.folder / "tokens.safetensors", self.folder / "tokens.json"
        if not notes.is_file():
            found, record = prepare()
            self._save(tokens, {"tokens": found.contiguous()})
            self._write(notes, to_json(record))
        return load_file(tokens)["tokens"], from_json(Calibrated, notes.read_text("utf-8"), notes)

    def forms(self, allocate: Callable[[], dict[str, int]]) -> dict[str, int]:
        """How each matrix is to be stored."""
        file = self.folder / "forms.json"
        if not file.is_file():
            self._write(file, json.dumps(allocate()))
        found: dict[str, int] = json.loads(file.read_text("utf-8"))
        return found

    def block(self, index: int) -> dict[str, Chosen]:
        """The matrices of a block of the model; none where it is not finished."""
        file = self._block(index)
        named: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in (load_file(file) if file.is_file() else {}).items():
            name, _, part = key.partition("|")
            named.setdefault(name, {})[part] = tensor
        return {name: Chosen.of(tensors) for name, tensors in named.items()}

    def keep(self, index: int, found: Mapping[str, Chosen]) -> None:
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
