"""A finished package is opened, compared with what was asked for, and with the hashes that it was sealed with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantize.errors import PackageError
from quantize.evidence import Evidence
from quantize.files import PARITY, PROVENANCE, records_of
from quantize.package.sealing import UNSEALED
from quantize.records import Demand, Provenance, Source
from quantize.serialization import read_record


@dataclass(frozen=True)
class Package:
    """A sealed folder with what it says about itself."""

    folder: Path
    provenance: Provenance
    evidence: Evidence


def open_package(folder: Path) -> Package:
    """Read a package's records; raises PackageError when it is none."""
    if not folder.is_dir():
        raise PackageError(f"no such package: {folder}")
    return Package(folder, read_record(Provenance, folder / PROVENANCE), read_record(Evidence, folder / PARITY))


def require_unchanged(package: Package, *, but: str = "") -> None:
    """Raise PackageError when a file, `but` this one, is missing, added or other than provenance.json says."""
    expected = {file.path: file for file in package.provenance.files}
    present = {file.path: file for file in records_of(package.folder, without=UNSEALED)}
    for path in sorted((expected.keys() | present.keys()) - {but}):
        if expected.get(path) != present.get(path):
            state = "missing" if path not in present else "new" if path not in expected else "changed"
            raise PackageError(
                f"{package.folder} is not as it was sealed: {path} is {state}; restore it, or make the package again"
            )


def undocumented(folder: Path, source: Source, demand: Demand) -> Package | None:
    """The measured package without documents in `folder`, when it was made from this source as it is asked for now."""
    if not (folder / PROVENANCE).is_file():
        return None
    package = open_package(folder)
    made_from = package.provenance
    if made_from.source.fingerprint() != source.fingerprint() or made_from.demand != demand:
        return None
    require_unchanged(package)
    return package


def finished(output: Path, source: Source, demand: Demand, *, outdated: bool = False) -> Package | None:
    """The package that already stands at `output`, when it was made from this source as it is asked for now.

    With `outdated`, one of an earlier state of the same Hub model, or measured otherwise, counts as none. Raises
    PackageError when something else stands there, or when the package was changed since.
    """
    if not output.exists():
        return None
    package = open_package(output)
    made_from, made_as = package.provenance.source, package.provenance.demand
    same_recipe = made_as.recipe == demand.recipe
    ours = same_recipe and made_from.repo_id == source.repo_id is not None
    if outdated and ours and (made_from.commit, made_as) != (source.commit, demand):
        require_unchanged(package)
        return None
    if not same_recipe or made_from.fingerprint() != source.fingerprint():
        raise PackageError(
            f"{output} holds a package of another source or recipe: name another --output, or replace it with --force"
        )
    if made_as != demand:
        raise PackageError(f"{output} was measured with other settings or texts: see `quantize verify`, or use --force")
    require_unchanged(package)
    if package.evidence.scores is not None and package.evidence.look_plan is None:
        if outdated:
            return None
        raise PackageError(
            f"{output} was made before figures of single windows were recorded, and could not be published: "
            f"replace it with --force"
        )
    return package
