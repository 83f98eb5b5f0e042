"""A package on this machine becomes one on the Hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from quantize import package
from quantize.errors import PackageError, ParityRefused, storage_errors
from quantize.files import CARD, PROVENANCE, RECEIPT, hash_file
from quantize.folders import write_text
from quantize.package import Package
from quantize.progress import Progress
from quantize.publishing.download_check import check_download
from quantize.publishing.records import Destination, Plan, Receipt
from quantize.publishing.upload import upload
from quantize.publishing.upload_plan import upload_plan
from quantize.records import FileRecord, Provenance
from quantize.serialization import now, to_json


def plan(folder: Path, destination: Destination) -> Plan:
    """What pushing a package would do."""
    passed = _publishable(folder)
    source_repo = passed.provenance.source.repo_id
    return upload_plan(folder, published_files(passed), _titled(destination, passed.provenance), source_repo)


def push(
    folder: Path, destination: Destination, progress: Progress, *, verify_download: bool = False, device: str = "auto"
) -> Receipt:
    """Publish a package that passed and is unchanged since, in one commit; leaves a receipt beside its files."""
    passed = _publishable(folder)
    destination, files = _titled(destination, passed.provenance), published_files(passed)
    started = now()
    progress.stage(f"push to {destination.repo_id}")
    plan = upload_plan(folder, files, destination, passed.provenance.source.repo_id)
    receipt = upload(folder, files, destination, plan, progress)
    downloaded = None
    if verify_download:
        downloaded = check_download(
            destination.repo_id, receipt.commit, files, passed.provenance, folder, device, progress
        )
    receipt = dataclasses.replace(
        receipt, key=passed.provenance.key, started=started, finished=now(), downloaded=downloaded
    )
    with storage_errors(folder):
        write_text(folder / RECEIPT, to_json(receipt))
    return receipt


def published_files(sealed: Package) -> tuple[FileRecord, ...]:
    """Everything that is published: what was sealed, and the record of it."""
    return (*sealed.provenance.files, FileRecord(PROVENANCE, *hash_file(sealed.folder / PROVENANCE)))


def _publishable(folder: Path) -> Package:
    sealed = package.open_package(folder)
    package.require_unchanged(sealed)
    if not (folder / CARD).is_file():
        raise PackageError(f"{folder} has no card yet: `quantize card {folder}` writes it")
    if not sealed.evidence.verdict.passed:
        raise ParityRefused(f"{folder} did not pass parity ({sealed.evidence.verdict.grade}): it is not published")
    return sealed


def _titled(destination: Destination, provenance: Provenance) -> Destination:
    """The destination with a commit message."""
    title = f"{provenance.source.name} in {provenance.recipe.bits} bits"
    return dataclasses.replace(destination, message=destination.message or title)
