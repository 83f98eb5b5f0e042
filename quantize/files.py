"""Files of a model's folder: their names, sizes and hashes, the disk space that they need, and locks."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from quantize.errors import PackageError, QuantizeError, StorageError, storage_errors
from quantize.folders import require_no_link, require_own
from quantize.records import FileRecord, Stamp

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
CARD = "README.md"
PROVENANCE = "provenance.json"
PARITY = "parity.json"
RECEIPT = "receipt.json"
FIGURES = "figures"

CHUNK = 1 << 20
LARGEST_BLOB = 10 << 20
"""Bytes beyond which the Hub stores every file with LFS, which it lists by sha256."""


def hash_file(path: Path, advance: Callable[[int], None] = lambda amount: None) -> tuple[int, str]:
    """Size in bytes and sha256 of a file; `advance` is told of every chunk read."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
            advance(len(chunk))
    return size, digest.hexdigest()


def stamp(path: Path) -> Stamp:
    """What another write to a file changes: inode, size, time of the last write, and that of the last change of it."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def flush(path: Path) -> None:
    """Return once a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems cannot do that with a folder
        if not (path.is_dir() and error.errno == errno.EINVAL):
            raise
    finally:
        os.close(descriptor)


def records_of(folder: Path, *, without: tuple[str, ...] = ()) -> tuple[FileRecord, ...]:
    """Every file below `folder`, in order of path; raises PackageError for one that lies elsewhere or is a pipe."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    require_own(folder, paths, PackageError)
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

    The lock is a hidden file beside what it guards, so all who come there meet it, by whatever path. It is removed
    while it is held: a process that had opened it sees that it is gone, and begins with another.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path.parent.resolve() / f".{path.name}.lock", mode=0o666)
    require_no_link(Path(lock.lock_file))
    try:
        with storage_errors(lock.lock_file):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
    except Timeout:
        raise busy from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def git_blob_id(path: Path) -> str:
    """The name that git, and so the Hub, gives to a file that is stored without LFS."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def blob_ids(folder: Path, files: Iterable[FileRecord]) -> dict[str, str]:
    """Git's names of those of the folder's files that the Hub may store without LFS, by path."""
    return {file.path: git_blob_id(folder / file.path) for file in files if file.size <= LARGEST_BLOB}
