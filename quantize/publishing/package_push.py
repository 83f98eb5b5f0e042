"""A package on this machine becomes one on the Hub."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from quantize import package, pipeline
from quantize.errors import PackageError, storage_errors
from quantize.files import CARD, PROVENANCE, RECEIPT, hash_file
from quantize.folders import write_text
from quantize.package import Package
from quantize.progress import Progress
from quantize.publishing.audit import card_on_disk, front_matter, require_sound
from quantize.publishing.download_check import check_download
from quantize.publishing.records import Destination, Plan, Receipt, Verification
from quantize.publishing.upload import upload
from quantize.publishing.upload_plan import upload_plan
from quantize.records import FileRecord, Provenance
from quantize.serialization import now, to_json


def plan(folder: Path, destination: Destination, card_template: Path | None = None) -> Plan:
    """What pushing a package would do."""
    sealed = _sound(folder)
    with tempfile.TemporaryDirectory(prefix="quantize-plan-") as temporary:
        renamed = _named_as_its_repo(sealed, destination, card_template, Path(temporary))
        new = {path.name: path for path in Path(temporary).iterdir()}
        files = published_files(renamed, new.get(PROVENANCE, folder / PROVENANCE).parent)
        local = {file.path: new.get(file.path, folder / file.path) for file in files}
        return upload_plan(local, files, _titled(destination, renamed.provenance), renamed.provenance.source.repo_id)


def push(
    folder: Path,
    destination: Destination,
    progress: Progress,
    *,
    verification: Verification | None = None,
    card_template: Path | None = None,
) -> Receipt:
    """Publish a package that passed and is unchanged since, in one commit; leaves a receipt beside its files."""
    started = now()
    progress.stage(f"push to {destination.repo_id}")
    sealed = _sound(folder)
    with storage_errors(folder):
        sealed = _named_as_its_repo(sealed, destination, card_template, folder)
    if sealed.provenance.card_template is not None and card_template is None:
        progress.note("the card's text is that of your template as it was rendered: --card-template renders it again")
    destination, files = _titled(destination, sealed.provenance), published_files(sealed, folder)
    local = {file.path: folder / file.path for file in files}
    plan = upload_plan(local, files, destination, sealed.provenance.source.repo_id)
    receipt = upload(folder, files, destination, plan, progress)
    downloaded = None
    if verification is not None:
        downloaded = check_download(
            destination.repo_id, receipt.commit, files, sealed.provenance, folder, verification, progress
        )
    receipt = dataclasses.replace(
        receipt, key=sealed.provenance.key, started=started, finished=now(), downloaded=downloaded
    )
    with storage_errors(folder):
        write_text(folder / RECEIPT, to_json(receipt))
    return receipt


def published_files(sealed: Package, record_folder: Path) -> tuple[FileRecord, ...]:
    """Everything that is published: what was sealed, and the record of it, which lies in `record_folder`."""
    return (*sealed.provenance.files, FileRecord(PROVENANCE, *hash_file(record_folder / PROVENANCE)))


def _sound(folder: Path) -> Package:
    sealed = package.open_package(folder)
    if not (folder / CARD).is_file():
        raise PackageError(f"{folder} has no card yet: `quantize card {folder}` writes it")
    require_sound(sealed)
    return sealed


def _named_as_its_repo(sealed: Package, destination: Destination, card_template: Path | None, target: Path) -> Package:
    """The package under the name of the repo that it goes to; a card that changes is written into the folder `target`.

    A card from a template that is not at hand keeps its text, under metadata of now.
    """
    renamed = dataclasses.replace(sealed.provenance, name=destination.repo_id)
    card = pipeline.rendered_card(dataclasses.replace(sealed, provenance=renamed), None, card_template)
    text, provenance, current = card.text, card.provenance, card_on_disk(sealed.folder)
    if renamed.card_template is not None and card_template is None:
        provenance = renamed
        text = front_matter(text) + current.removeprefix(front_matter(current))
    if (text, provenance) == (current, sealed.provenance):
        return sealed
    package.write_card(target, text)
    return dataclasses.replace(sealed, provenance=package.reseal_card(target, provenance))


def _titled(destination: Destination, provenance: Provenance) -> Destination:
    """The destination with a commit message."""
    title = f"{provenance.source.name} in {provenance.recipe.bits} bits"
    return dataclasses.replace(destination, message=destination.message or title)
