"""The folder that a run leaves behind: built beside its final name, sealed with hashes, moved into place."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantize.errors import PackageError, storage_errors
from quantize.evidence import Evidence
from quantize.files import hash_file, locked, records_of
from quantize.records import Checkout, EvaluationSettings, FileRecord, Provenance, Recipe, Source
from quantize.serialization import read_record, to_json

PROVENANCE, PARITY, CARD, FIGURES = "provenance.json", "parity.json", "README.md", "figures"
RECEIPT = "receipt.json"
BUILDING, REFUSED, UNFINISHED = ".building", "-refused", ".unfinished"
"""Endings of names beside a package's own: under construction, refused, finished parts of a run that was stopped."""


@dataclass(frozen=True)
class Package:
    """A sealed folder with what it says about itself."""

    folder: Path
    provenance: Provenance
    evidence: Evidence


@contextmanager
def staging_folder(output: Path) -> Iterator[Path]:
    """An empty folder beside `output` to build in, for this process alone; gone afterwards, whatever happens.

    What a killed run left there is removed first. Raises PackageError when another run builds the same package.
    """
    staging = output.with_name(f"{output.name}{BUILDING}")
    busy = PackageError(f"another run is building {output}: wait for it, or name another --output")
    with storage_errors(staging), locked(output, busy):
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            _restore(output)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def finished(
    output: Path, source: Source, recipe: Recipe, settings: EvaluationSettings, *, outdated: bool = False
) -> Package | None:
    """The package that already stands at `output`, when it was made from this source in this way.

    With `outdated`, one of an earlier state of the same Hub model, or of other settings, counts as none. Raises
    PackageError when something else stands there, or when the package was changed since.
    """
    if not output.exists():
        return None
    package = open_package(output)
    made_from = package.provenance
    same = made_from.source.fingerprint() == source.fingerprint() and made_from.requested_recipe == recipe
    ours = made_from.source.repo_id == source.repo_id is not None and made_from.requested_recipe == recipe
    if outdated and ours and (made_from.source.commit, made_from.settings) != (source.commit, settings):
        require_unchanged(package)
        return None
    if not same:
        raise PackageError(
            f"{output} holds a package of another source or recipe: name another --output, or replace it with --force"
        )
    if made_from.settings != settings:
        raise PackageError(f"{output} was measured with other settings: see `quantize verify`, or use --force")
    require_unchanged(package)
    return package


def copy_carried(checkout: Checkout, names: tuple[str, ...], staging: Path) -> None:
    """Copy tokenizer, template and legal files from the source byte for byte."""
    for name in names:
        target = staging / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkout.folder / name, target)


def write_evidence(staging: Path, evidence: Evidence) -> None:
    (staging / PARITY).write_text(to_json(evidence), "utf-8")


def write_card(staging: Path, card: str) -> None:
    (staging / CARD).write_text(card, "utf-8", newline="\n")


def seal(staging: Path, provenance: Provenance) -> Provenance:
    """Write provenance.json with the hashes of everything else in the folder."""
    for path in staging.glob("*.safetensors"):
        shutil.copymode(staging / "config.json", path)  # safetensors makes files that only their owner may read
    sealed = dataclasses.replace(provenance, files=records_of(staging, without=(PROVENANCE, RECEIPT)))
    (staging / PROVENANCE).write_text(to_json(sealed), "utf-8")
    return sealed


def reseal_card(staging: Path, provenance: Provenance) -> Provenance:
    """Write provenance.json again for a new card beside files that are not all here."""
    new = FileRecord(CARD, *hash_file(staging / CARD))
    listed = tuple(new if file.path == CARD else file for file in provenance.files)
    sealed = dataclasses.replace(provenance, files=listed)
    (staging / PROVENANCE).write_text(to_json(sealed), "utf-8")
    return sealed


def move_into_place(staging: Path, output: Path, *, passed: bool) -> Path:
    """Give a sealed folder its final name in one rename; a refused one gets a name that shows it."""
    final = output if passed else output.with_name(f"{output.name}{REFUSED}")
    _flush(staging)
    outdated = _outdated(final)
    shutil.rmtree(outdated, ignore_errors=True)
    if final.exists():
        final.rename(outdated)
    staging.rename(final)
    shutil.rmtree(outdated, ignore_errors=True)
    return final


def require_replaceable(output: Path) -> None:
    """Raise PackageError unless `output` is free or holds a package: nothing else is ever replaced."""
    for folder in (output, output.with_name(f"{output.name}{REFUSED}")):
        if folder.exists() and not (folder / PROVENANCE).is_file():
            raise PackageError(f"{folder} exists and is not a package: name another --output")


def open_package(folder: Path) -> Package:
    """Read a package's records; raises PackageError when it is none."""
    if not folder.is_dir():
        raise PackageError(f"no such package: {folder}")
    return Package(folder, read_record(Provenance, folder / PROVENANCE), read_record(Evidence, folder / PARITY))


def require_unchanged(package: Package, *, but: str = "") -> None:
    """Raise PackageError when a file, `but` this one, is missing, added or other than provenance.json says."""
    expected = {file.path: file for file in package.provenance.files}
    present = {file.path: file for file in records_of(package.folder, without=(PROVENANCE, RECEIPT))}
    for path in sorted((expected.keys() | present.keys()) - {but}):
        if expected.get(path) != present.get(path):
            state = "missing" if path not in present else "new" if path not in expected else "changed"
            raise PackageError(
                f"{package.folder} is not as it was sealed: {path} is {state}; restore it, or make the package again"
            )


def _outdated(final: Path) -> Path:
    """Where a package lies while its successor takes its name."""
    return final.with_name(f"{final.name}{BUILDING}-old")


def _restore(output: Path) -> None:
    """Give a package its name back that a run was about to replace when it was killed."""
    for final in (output, output.with_name(f"{output.name}{REFUSED}")):
        if _outdated(final).exists() and not final.exists():
            _outdated(final).rename(final)


def _flush(folder: Path) -> None:
    """Files reach the disk before the name does, so that a power cut leaves no half package."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
