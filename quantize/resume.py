"""A folder of finished parts: a run that goes on after a killed one takes them up there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from quantize import __version__, devices
from quantize.errors import storage_errors

FINGERPRINT = "fingerprint"


@dataclass(frozen=True)
class ResumeFolder:
    """Finished parts in files that get their names in one rename: each is whole or absent."""

    folder: Path

    @classmethod
    def begin(cls, folder: Path, inputs: Mapping[str, Any]) -> Self:
        """Go on in `folder`, emptied first unless what is there was begun with the same inputs and versions."""
        versions = {"quantize": __version__, **devices.versions()}
        text = json.dumps({**inputs, "versions": versions}, sort_keys=True, default=dataclasses.asdict)
        fingerprint, file = hashlib.sha256(text.encode()).hexdigest(), folder / FINGERPRINT
        if not file.is_file() or file.read_text("utf-8") != fingerprint:
            with storage_errors(folder):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                file.write_text(fingerprint, "utf-8")
        return cls(folder)
