"""The staging folder: a package is built beside its final name and moved there in one rename."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantize.errors import PackageError, printable, storage_errors
from quantize.files import PROVENANCE, flush, locked
from quantize.folders import require_no_link

BUILDING, REFUSED, UNFINISHED, UNDOCUMENTED = ".building", "-refused", ".unfinished", "-undocumented"
"""Endings of names beside a package's own: under construction, refused, finished parts of a run that was stopped, and
what was made and measured but could not be documented."""


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


@contextmanager
def finished_parts(output: Path, *, clean: bool) -> Iterator[Path]:
    """The folder beside `output` where finished parts of a run lie, for one that goes on after it was stopped.

    An error that leaves it gets a note which names it. With `clean` it is removed before, and after an error.
    """
    folder = output.with_name(f"{output.name}{UNFINISHED}")
    if clean:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    except BaseException as error:
        if clean:
            shutil.rmtree(folder, ignore_errors=True)
        if folder.is_dir():
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            error.add_note(
                f"finished parts are kept in {folder} ({size / 1e6:.1f} MB): the same command goes on from there, and "
                f"--clean removes them"
            )
        raise


def move_into_place(staging: Path, output: Path, *, passed: bool) -> Path:
    """Give a sealed folder its final name in one rename; a refused one gets a name that shows it.

    What an earlier run left undocumented under that name is gone then.
    """
    final = output if passed else refused_folder(output)
    _flush(staging)
    outdated = _outdated(final)
    shutil.rmtree(outdated, ignore_errors=True)
    if final.exists():
        final.rename(outdated)
    staging.rename(final)
    flush(final.parent)
    shutil.rmtree(outdated, ignore_errors=True)
    if (undocumented_folder(output) / PROVENANCE).is_file():
        shutil.rmtree(undocumented_folder(output), ignore_errors=True)
    return final


def keep_undocumented(folder: Path, output: Path) -> Path:
    """Keep a sealed folder without its documents beside `output`, in the place of an older one."""
    kept = undocumented_folder(output)
    if folder != kept:
        require_package(kept)
        shutil.rmtree(kept, ignore_errors=True)
        folder.rename(kept)
    return kept


def require_replaceable(output: Path) -> None:
    """Raise PackageError unless `output` is free or holds a package: nothing else is ever replaced.

    Nothing is written through a link of that name, or of those beside it: raises StorageError.
    """
    if output.name in ("", "..") or printable(output.name) != output.name:
        raise PackageError(f"{output} is no name for a new folder: name another --output")
    for ending in ("", BUILDING, REFUSED, UNFINISHED):
        require_no_link(output.with_name(f"{output.name}{ending}"))
    for folder in (output, refused_folder(output)):
        require_package(folder)


def require_package(folder: Path) -> None:
    """Raise PackageError where something else than a package has this name."""
    if folder.exists() and not (folder / PROVENANCE).is_file():
        raise PackageError(f"{folder} exists and is not a package: name another --output")


def undocumented_folder(output: Path) -> Path:
    """Where a run keeps what it made and measured for `output`, when documenting fails."""
    return output.with_name(f"{output.name}{UNDOCUMENTED}")


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
