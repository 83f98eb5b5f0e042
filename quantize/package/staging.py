"""The staging folder: a package is built beside its final name and moved there in one rename."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantize.errors import PackageError, printable, storage_errors
from quantize.files import PROVENANCE, flush, locked
from quantize.folders import require_no_link

BUILDING, REFUSED, UNFINISHED = ".building", "-refused", ".unfinished"
"""Endings of names beside a package's own: under construction, refused, finished parts of a run that was stopped."""


@contextmanager
def staging_folder(output: Path) -> Iterator[Path]:
    """An empty folder beside `output` to build in, for this process alone; gone afterwards, whatever happens.

    What a killed run left there is removed first. Raises PackageError when another run builds the same package.
    """
    staging = output.with_name(f"{output.name}{BUILDING}")
    busy = PackageError(f"another run is building {output}: wait for it, or name another --output")
    with storage_errors(staging), locked(output, busy):
        try:
            _restore(output)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def move_into_place(staging: Path, output: Path, *, passed: bool) -> Path:
    """Give a sealed folder its final name in one rename; a refused one gets a name that shows it."""
    final = output if passed else refused_folder(output)
    _flush(staging)
    outdated = _outdated(final)
    shutil.rmtree(outdated, ignore_errors=True)
    if final.exists():
        final.rename(outdated)
    staging.rename(final)
    flush(final.parent)
    shutil.rmtree(outdated, ignore_errors=True)
    return final


def require_replaceable(output: Path) -> None:
    """Raise PackageError unless `output` is free or holds a package: nothing else is ever replaced.

    Nothing is written through a link of that name, or of those beside it: raises StorageError.
    """
    if output.name in ("", "..") or printable(output.name) != output.name:
        raise PackageError(f"{output} is no name for a new folder: name another --output")
    for ending in ("", BUILDING, REFUSED, UNFINISHED):
        require_no_link(output.with_name(f"{output.name}{ending}"))
    for folder in (output, refused_folder(output)):
        if folder.exists() and not (folder / PROVENANCE).is_file():
            raise PackageError(f"{folder} exists and is not a package: name another --output")


def refused_folder(output: Path) -> Path:
    """The name of a refused package, where one that passed would be called `output`."""
    return output.with_name(f"{output.name}{REFUSED}")


def _outdated(final: Path) -> Path:
    """Where a package lies while its successor takes its name."""
    return final.with_name(f"{final.name}{BUILDING}-old")


def _restore(output: Path) -> None:
    """Give a package its name back that a run was about to replace when it was killed."""
    for final in (output, refused_folder(output)):
        if _outdated(final).exists() and not final.exists():
            _outdated(final).rename(final)


def _flush(folder: Path) -> None:
    """Files reach the disk before the name does, so that a power cut leaves no half package."""
    for path in (*folder.rglob("*"), folder):
        flush(path)
