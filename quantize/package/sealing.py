"""What a package holds besides its weights is written, and everything is listed with its hash."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from quantize.errors import PackageError
from quantize.evidence import Evidence
from quantize.files import (
    CARD,
    CONFIG,
    FIGURES,
    PARITY,
    PROVENANCE,
    RECEIPT,
    blob_ids,
    hash_file,
    records_of,
)
from quantize.folders import write_text
from quantize.formats import remote_code
from quantize.formats.safetensors import weight_files
from quantize.records import Checkout, FileRecord, Provenance
from quantize.serialization import to_json

UNSEALED = (PROVENANCE, RECEIPT)
"""What is not listed in provenance.json: the list itself, and what a push leaves behind."""


def copy_carried(checkout: Checkout, names: tuple[str, ...], staging: Path) -> None:
    """Copy tokenizer, template and legal files from the source byte for byte.

    Only a config that names code which is not carried is written anew, without naming it.
    """
    for name in names:
        target = staging / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkout.folder / name, target)
        if checkout.source.code_left_out and target.match(remote_code.CONFIGS):
            remote_code.leave_out(target)


def seal_undocumented(staging: Path, provenance: Provenance, measured: tuple[FileRecord, ...] = ()) -> Provenance:
    """Seal weights and evidence alone, without what was written of figures and card; raises what `seal` does."""
    shutil.rmtree(staging / FIGURES, ignore_errors=True)
    (staging / CARD).unlink(missing_ok=True)
    return seal(staging, provenance, measured)


def write_evidence(staging: Path, evidence: Evidence) -> None:
    write_text(staging / PARITY, to_json(evidence))


def write_card(staging: Path, card: str) -> None:
    write_text(staging / CARD, card)


def seal(staging: Path, provenance: Provenance, measured: tuple[FileRecord, ...] = ()) -> Provenance:
    """Write provenance.json with the hashes of everything else in the folder.

    Raises PackageError where a file is not as it was when it was `measured`.
    """
    for path in weight_files(staging):
        shutil.copymode(staging / CONFIG, path)  # safetensors makes files that only their owner may read
    files = records_of(staging, without=UNSEALED)
    changed = sorted(file.path for file in set(measured) - set(files))
    if changed:
        raise PackageError(
            f"{staging / changed[0]} was changed after it was measured: run again when nothing writes there"
        )
    sealed = dataclasses.replace(provenance, files=files, blob_ids=blob_ids(staging, files))
    write_text(staging / PROVENANCE, to_json(sealed))
    return sealed


def reseal_card(staging: Path, provenance: Provenance) -> Provenance:
    """Write provenance.json again for a new card beside files that are not all here."""
    new = FileRecord(CARD, *hash_file(staging / CARD))
    listed = tuple(new if file.path == CARD else file for file in provenance.files)
    ids = provenance.blob_ids | blob_ids(staging, [new])
    sealed = dataclasses.replace(provenance, files=listed, blob_ids=ids)
    write_text(staging / PROVENANCE, to_json(sealed))
    return sealed
