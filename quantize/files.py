"""Files of a model's folder: their names, sizes and hashes, the disk space that they need, and locks."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from quantize.errors import QuantizeError, StorageError, storage_errors
from quantize.records import FileRecord

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
CARD = "README.md"
PROVENANCE = "provenance.json"
PARITY = "parity.json"
RECEIPT = "receipt.json"
FIGURES = "figures"

CHUNK = 1 << 20


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
    free = free_space(folder)
    if free < needed:
        raise StorageError(
            f"{purpose} needs {needed / 1e9:.2f} GB and the disk of {_existing(folder)} has {free / 1e9:.2f} GB free: "
            f"free some space or choose another folder"
        )


def free_space(folder: Path) -> int:
    """Bytes that are free on the disk that holds `folder`, or would hold it."""
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())


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
