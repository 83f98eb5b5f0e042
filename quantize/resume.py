"""A folder of finished parts: a run that goes on after a killed one takes them up there."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from quantize import __version__, devices
from quantize.errors import storage_errors
from quantize.files import flush, hash_file

LIST = "parts.json"


@dataclass(frozen=True)
class ResumeFolder:
    """Finished parts in files, and the list of their hashes by name, in the order in which they were finished.

    A part counts once it is listed, which is after its bytes have reached the disk.
    """

    folder: Path
    fingerprint: str
    hashes: dict[str, str]

    @classmethod
    def begin(cls, folder: Path, inputs: Mapping[str, Any]) -> Self:
        """Go on in `folder`, emptied first unless what is there was begun with the same inputs and versions.

        From the first part on that is damaged or gone, all are made again: they may have come of it.
        """
        versions = {"quantize": __version__, **devices.versions()}
        text = json.dumps({**inputs, "versions": versions}, sort_keys=True, default=dataclasses.asdict)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()
        listed = _listed(folder, fingerprint)
        with storage_errors(folder):
            if listed is None:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            whole = itertools.takewhile(lambda part: _is_whole(folder / part[0], part[1]), (listed or {}).items())
            begun = cls(folder, fingerprint, dict(whole))
            begun._write_list()
        return begun

    def part(self, name: str) -> Path | None:
        """The file of a finished part, None where it is not finished."""
        return self.folder / name if name in self.hashes else None

    def keep(self, name: str, write: Callable[[Path], object]) -> Path:
        """The file of a part that `write` fills now."""
        file = self.folder / name
        with storage_errors(self.folder):
            try:
                write(file)
                flush(file)
            except BaseException:
                file.unlink(missing_ok=True)
                raise
            self.hashes[name] = hash_file(file)[1]
            self._write_list()
        return file

    def drop(self, names: Iterable[str]) -> None:
        """Delete parts that are needed no more."""
        dropped = [name for name in names if self.hashes.pop(name, None)]
        with storage_errors(self.folder):
            self._write_list()
            for name in dropped:
                (self.folder / name).unlink(missing_ok=True)

    def _write_list(self) -> None:
        """In one rename: the list is whole, or the one before it is."""
        file = self.folder / LIST
        unfinished = file.with_suffix(".part")
        unfinished.write_text(json.dumps({"fingerprint": self.fingerprint, "parts": self.hashes}, indent=1), "utf-8")
        flush(unfinished)
        unfinished.rename(file)
        flush(self.folder)


def _listed(folder: Path, fingerprint: str) -> dict[str, str] | None:
    """The parts that a run with this fingerprint has listed; None where there is none, or no list that can be read."""
    try:
        content = json.loads((folder / LIST).read_text("utf-8"))
        return dict(content["parts"]) if content["fingerprint"] == fingerprint else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_whole(file: Path, sha256: str) -> bool:
    return file.is_file() and hash_file(file)[1] == sha256
