"""The reference's logits on disk, for pairs that do not fit in memory together and for further candidates.

The file is one line of JSON, which says whose logits these are, and then one record per window. Log-probabilities are
kept as 16-bit codes between the least and the largest of their position, without clipping: steps of about 0.0005 nats.
The error of that rounding is measured at every position when it is written, stored beside it, and reported. The
checksum of a record covers all of it, the header and its place. A file that a killed run cut short ends at its last
whole window, and is continued from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantize.documents import parse_json
from quantize.errors import CorpusError, storage_errors
from quantize.evidence import CacheRecord, CorpusRecord
from quantize.files import locked, require_space
from quantize.parity import scoring
from quantize.parity.models import Placed
from quantize.records import Source

if TYPE_CHECKING:
    import torch

VERSION = 2
CODES = 65_535
LONGEST_HEADER = 4096


@dataclass(frozen=True)
class Contents:
    """What has to agree before stored logits may stand in for a reference's own."""

    source: str
    corpus: str
    window: int
    seed: int
    vocabulary: int
    version: int = VERSION


class ReferenceCache:
    """Log-probabilities of a reference in `path`; satisfies scoring.ReferenceLogits for the windows that it holds."""

    def __init__(
        self, path: Path, contents: Contents, dtype: Callable[[], str], note: Callable[[str], None] = lambda text: None
    ) -> None:
        """Open the file, or create it for a reference whose arithmetic has the type that `dtype` gives.

        One that an earlier version of quantize wrote is made anew, with a `note`. Raises CorpusError where it holds
        logits of something else.
        """
        self.path, self.contents = path, contents
        header = _header(path)
        if self._is_outdated(header):
            note(f"{path} has the format of an earlier version: its logits are computed anew")
        if not header or self._is_outdated(header):
            header = self._create(dtype())
        self._begin = len(header)
        self._header_checksum = zlib.crc32(header)
        self._undamaged: set[int] = set()
        self.dtype = self._agreed(header)
        positions = contents.window - 1
        self._record = np.dtype(
            [
                ("codes", "<u2", (positions, contents.vocabulary)),
                ("low", "<f4", (positions,)),
                ("step", "<f4", (positions,)),
                ("kld", "<f8", (positions,)),
                ("nll_shift", "<f8", (positions,)),
                ("checksum", "<u4"),
            ]
        )

    def _create(self, dtype: str) -> bytes:
        """Begin the file anew; its header."""
        header = json.dumps({"dtype": dtype, **asdict(self.contents)}).encode() + b"\n"
        with self._locked(), storage_errors(self.path):
            self.path.write_bytes(header)
        return header

    def _locked(self) -> AbstractContextManager[None]:
        return locked(
            self.path,
            CorpusError(f"another run is writing {self.path}: wait for it, or choose another --reference-cache file"),
        )

    def _is_outdated(self, header: bytes) -> bool:
        """Whether the file holds the same logits in the format of an earlier version."""
        try:
            stored = json.loads(header)
            earlier = stored.pop("version") < VERSION
            return earlier and {**stored, "version": VERSION} == {"dtype": stored["dtype"], **asdict(self.contents)}
        except (ValueError, KeyError, AttributeError, TypeError):
            return False

    def _agreed(self, header: bytes) -> str:
        try:
            stored = parse_json(header)
            dtype = str(stored.pop("dtype"))
        except (ValueError, KeyError, AttributeError, TypeError):
            stored, dtype = None, ""
        if stored != asdict(self.contents):
            raise CorpusError(
                f"{self.path} holds no logits of this original on these windows (another source, text, window or "
                f"seed): choose another --reference-cache file, or delete it"
            )
        return dtype

    @property
    def vocabulary(self) -> int:
        return self.contents.vocabulary

    @property
    def windows(self) -> int:
        """Whole windows that the file holds."""
        return (self.path.stat().st_size - self._begin) // self._record.itemsize

    def extend(self, reference: Placed, windows: torch.Tensor, device: str) -> None:
        """Append the logits of `reference` on those of `windows` [count, window] that the file does not hold yet."""
        import torch

        if reference.dtype != self.dtype:
            raise CorpusError(
                f"{self.path} holds logits in {self.dtype}, and the original now fits only in {reference.dtype}: "
                f"choose another --reference-cache file"
            )
        with self._locked(), storage_errors(self.path), self.path.open("r+b") as file, torch.inference_mode():
            held = self.windows
            size = self._record.itemsize
            require_space(self.path.parent, (len(windows) - held) * size, f"the reference cache {self.path.name}")
            file.truncate(self._begin + held * size)
            file.seek(0, os.SEEK_END)
            live = scoring.LiveReference.of(reference.model, windows, device)
            for index, window in enumerate(windows[held:], held):
                tokens = window[None].to(device)
                packed = self._pack(live.read(index, tokens), tokens)
                packed["checksum"] = self._checksum(packed, index)
                file.write(packed.view(np.uint8).data)

    def read(self, start: int, tokens: torch.Tensor) -> scoring.Logits:
        """Log-probabilities after `tokens`, which are logits too; raises CorpusError when damaged."""
        import torch

        records = [self._read(index) for index in range(start, start + len(tokens))]

        def logits(part: slice) -> torch.Tensor:
            return torch.stack([torch.from_numpy(_values(record, part)) for record in records]).to(tokens.device)

        return logits

    def record(self, windows: int) -> CacheRecord:
        """The error of rounding over the first `windows` windows; raises CorpusError when damaged."""
        records = [self._read(index) for index in range(windows)]
        kld = np.stack([record["kld"] for record in records])
        return CacheRecord(
            bits=16,
            dtype=self.dtype,
            windows=windows,
            mean_kld=float(max(kld.mean(), 0.0)),
            largest_kld=float(max(kld.max(), 0.0)),
            mean_nll_shift=float(np.mean([record["nll_shift"].mean() for record in records])),
        )

    def _read(self, index: int) -> Any:
        stored = np.memmap(self.path, self._record, "r", self._begin + index * self._record.itemsize, (1,))
        if index not in self._undamaged and self._checksum(stored, index) != stored["checksum"][0]:
            raise CorpusError(f"{self.path} is damaged at window {index}: delete it and run again")
        self._undamaged.add(index)
        return stored[0]

    def _checksum(self, packed: np.ndarray[Any, Any], index: int) -> int:
        """Of a record but for its last field, which is this: under the file's header and at its place in the file."""
        content = packed.view(np.uint8)[: -self._record["checksum"].itemsize].data
        return zlib.crc32(content, zlib.crc32(str(index).encode(), self._header_checksum))

    def _pack(self, logits: scoring.Logits, tokens: torch.Tensor) -> np.ndarray[Any, Any]:
        """The record of a window, `tokens` [1, window]."""
        import torch

        packed = np.zeros(1, self._record)
        record, rows = packed[0], scoring.slice_of(self.vocabulary, tokens.device)
        for part in scoring.head_slices(1, tokens.shape[1], self.vocabulary, tokens.device):
            targets = tokens[0, part.start + 1 : part.stop + 1]
            start = part.start
            for exact, target in zip(torch.split(logits(part)[0], rows), torch.split(targets, rows), strict=True):
                _keep(record, slice(start, start + len(target)), exact, target)
                start += len(target)
        return packed


def _keep(record: Any, part: slice, logits: torch.Tensor, targets: torch.Tensor) -> None:
    """Write a slice of a window's positions into its record; logits are [positions, vocabulary]."""
    import torch

    exact = torch.log_softmax(logits, dim=-1, dtype=torch.float64)
    low, high = exact.amin(-1).float(), exact.amax(-1).float()
    step = ((high - low) / CODES).clamp_min(torch.finfo(torch.float32).tiny)
    codes = ((exact - low[:, None]) / step[:, None]).round_().clamp_(0, CODES)
    kept = codes.float() * step[:, None] + low[:, None]
    nll, kept_nll, kld, _, _ = scoring.compare_logits(logits, kept, targets)
    record["codes"][part] = codes.to(torch.int32).cpu().numpy()
    for name, value in (("low", low), ("step", step), ("kld", kld), ("nll_shift", kept_nll - nll)):
        record[name][part] = value.cpu().numpy()


def _values(record: Any, part: slice) -> np.ndarray[Any, Any]:
    """The log-probabilities [positions, vocabulary] that a record holds of a slice of a window."""
    values: np.ndarray[Any, Any] = record["codes"][part].astype(np.float32)
    values *= record["step"][part, None]
    values += record["low"][part, None]
    return values


def _header(path: Path) -> bytes:
    """The first line of the file; nothing where there is none."""
    if not path.exists():
        return b""
    with path.open("rb") as file:
        return file.readline(LONGEST_HEADER)


def contents_of(source: Source, corpus: CorpusRecord, seed: int, vocabulary: int) -> Contents:
    """The description of a reference's logits on the windows of a corpus."""
    fingerprint = hashlib.sha256(json.dumps(sorted(source.fingerprint().items())).encode()).hexdigest()
    return Contents(fingerprint, corpus.sha256, corpus.window, seed, vocabulary)
