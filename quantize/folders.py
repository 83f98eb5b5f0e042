"""Folders that somebody else filled: what lies in them, and nothing of what links lead to outside of them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from quantize.errors import QuantizeError, StorageError

LEVELS = 2
"""Of folders that are looked into: no file that a model needs lies deeper."""


def listing(folder: Path) -> list[str]:
    """Paths of everything in `folder` and the folders in it that is no folder itself, in their order."""
    return sorted(_listed(folder, "", LEVELS))


def _listed(folder: Path, prefix: str, levels: int) -> Iterable[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            path = Path(entry.path)
            if not path.is_dir():
                yield f"{prefix}{path.name}"
            elif levels > 1:
                yield from _listed(path, f"{prefix}{path.name}/", levels - 1)


def require_own(folder: Path, paths: Iterable[str], error: type[QuantizeError]) -> None:
    """Raise `error` unless all `paths` below `folder` are regular files of its own.

    A symbolic link may lead to a file in the same folder, and in a snapshot of the Hub's cache to where that keeps it.
    """
    own = _own_folders(folder)
    for path in paths:
        file = folder / path
        try:
            target = file.resolve(strict=True)
            mode = target.stat().st_mode
        except (FileNotFoundError, RuntimeError):  # RuntimeError: a circle of links, up to Python 3.12
            raise error(f"{path} in {folder} is a link that leads nowhere: remove it, or put the file there") from None
        if not any(target.is_relative_to(home) for home in own):
            raise error(f"{path} in {folder} is a link to a file outside of that folder: put the file itself there")
        if not stat.S_ISREG(mode):
            raise error(f"{path} in {folder} is neither a file nor a folder: remove it")


def _own_folders(folder: Path) -> tuple[Path, ...]:
    """Where the files of a folder may lie."""
    own = folder.resolve()
    for parent in own.parents:
        if parent.name == "snapshots":  # of the Hub's cache: snapshots/COMMIT beside blobs, which may be shared
            return own, parent.parent / "blobs", parent.parent.parent / "blobs"
    return (own,)


def require_no_link(path: Path) -> None:
    """Raise StorageError where `path` is a symbolic link, through which one would write elsewhere."""
    if path.is_symlink():
        raise StorageError(f"{path} is a symbolic link: name the folder that it leads to, or remove it")


def write_text(path: Path, text: str) -> None:
    """Write a file whole, with \\n as line end; a link of that name is replaced, not followed. Raises OSError."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def expanded(path: str) -> Path:
    """A path with ~ for the home folder; raises StorageError where nobody knows of one."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise StorageError(f"{path}: there is no home folder of that user; set HOME, or write the path out") from error
