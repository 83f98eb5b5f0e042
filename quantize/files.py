"""Files of a model's folder: their names, sizes and hashes, the disk space that they need, and locks."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from quantize.errors import QuantizeError, StorageError, storage_errors
from quantize.records import FileRecord

CONFIG = "config.json"
CARD = "README.md"
PROVENANCE = "provenance.json"
PARITY = "parity.json"
RECEIPT = "receipt.json"
FIGURES = "figures"
WEIGHTS = ".safetensors"
"""How the name of every weight file ends."""
SINGLE_WEIGHTS = f"model{WEIGHTS}"
SHARD_INDEX = f"{SINGLE_WEIGHTS}.index.json"

CHUNK = 1 << 20


def weight_bytes(folder: Path) -> int:
    """Size of the weight files in a folder."""
    return sum(path.stat().st_size for path in folder.glob(f"*{WEIGHTS}"))


def listed_weight_bytes(files: Iterable[FileRecord]) -> int:
    """Size of the weight files among those listed."""
    return sum(file.size for file in files if file.path.endswith(WEIGHTS))


def hash_file(path: Path, advance: Callable[[int], None] = lambda amount: None) -> tuple[int, str]:
    """Size in bytes and sha256 of a file; `advance` is told of every chunk read."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
            advance(len(chunk))
    return size, digest.hexdigest()


def records_of(folder: Path, *, without: tuple[str, ...] = ()) -> tuple[FileRecord, ...]:
    """Every file below `folder`, in order of path."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return tuple(FileRecord(path, *hash_file(folder / path)) for path in paths if path not in without)


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise StorageError unless the disk that holds `folder` has `needed` bytes free."""
    existing, free = free_space(folder)
    if free < needed:
        raise StorageError(
            f"{purpose} needs {needed / 1e9:.2f} GB and the disk of {existing} has {free / 1e9:.2f} GB free: "
            f"free some space or choose another folder"
        )


def free_space(folder: Path) -> tuple[Path, int]:
    """The nearest folder above `folder` that exists already, and the free bytes of its disk."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return existing, shutil.disk_usage(existing).free


@contextmanager
def locked(path: Path, busy: QuantizeError) -> Iterator[None]:
    """Hold `path` for this process alone; raises `busy` where another one does.

    The lock file lies outside the user's folders and is never removed: one that vanishes can be held twice.
    """
    from filelock import FileLock, Timeout

    name = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]
    lock = FileLock(Path(tempfile.gettempdir()) / f"quantize-{name}.lock", mode=0o666)
    try:
        with storage_errors(lock.lock_file):
            lock.acquire(timeout=0)
    except Timeout:
        raise busy from None
    try:
        yield
    finally:
        lock.release()


def git_blob_id(path: Path) -> str:
    """The name that git, and so the Hub, gives to a file that is stored without LFS."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
