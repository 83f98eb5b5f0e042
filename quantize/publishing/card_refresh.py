"""The card of a published package, rendered again and pushed alone."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path

from quantize import hub, package, pipeline, source
from quantize.files import CARD, FIGURES, PARITY, PROVENANCE, hash_file
from quantize.package import Package
from quantize.progress import Progress
from quantize.publishing.package_push import published_files
from quantize.publishing.records import PublishRequest, Receipt
from quantize.publishing.remote_state import PublishedPackage
from quantize.publishing.upload import upload
from quantize.publishing.upload_plan import upload_plan
from quantize.records import FileRecord


@dataclasses.dataclass(frozen=True)
class CardRefresh:
    """A card that differs from the published one; `receipt` is None where a dry run pushed nothing."""

    receipt: Receipt | None


def refresh_card(request: PublishRequest, published: PublishedPackage, progress: Progress) -> CardRefresh | None:
    """Render the card of a published package again, and push it alone; None where it is as it would be.

    A card that somebody edited on the Hub is left alone.
    """
    repo_id = request.destination.repo_id
    with tempfile.TemporaryDirectory(prefix="quantize-card-") as temporary:
        folder = Path(temporary)
        _fetch_small_files(repo_id, published.commit, folder)
        if FileRecord(CARD, *hash_file(folder / CARD)) not in published.provenance.files:
            progress.note(
                f"the card of {repo_id} was edited on the Hub and is left alone: push the package to replace it"
            )
            return None
        publisher = request.run.publisher or published.provenance.publisher
        provenance = dataclasses.replace(published.provenance, publisher=publisher)
        held = Package(folder, provenance, package.open_package(folder).evidence)
        against = request.run.model if source.is_local(request.run.model) else None
        card = pipeline.rendered_card(held, against, request.run.card_template)
        if card.text == (folder / CARD).read_bytes().decode("utf-8"):
            return None
        if request.dry_run:
            return CardRefresh(None)
        package.write_card(folder, card.text)
        sealed = dataclasses.replace(held, provenance=package.reseal_card(folder, card.provenance))
        return CardRefresh(_push_card(request, sealed, progress))


def _fetch_small_files(repo_id: str, commit: str, folder: Path) -> None:
    """Copy the records, the card and its figures into `folder`."""
    names = (PROVENANCE, PARITY, CARD)
    files = [
        file for file in hub.resolve(repo_id, commit)[1] if file.path in names or file.path.startswith(f"{FIGURES}/")
    ]
    cached = hub.fetch(repo_id, commit, files)
    for file in files:
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(cached / file.path, folder / file.path)


def _push_card(request: PublishRequest, sealed: Package, progress: Progress) -> Receipt:
    message = request.destination.message or "Card rendered again"
    destination = dataclasses.replace(request.destination, tag=None, message=message)
    files = tuple(file for file in published_files(sealed, sealed.folder) if file.path in (CARD, PROVENANCE))
    progress.stage(f"push the card to {destination.repo_id}")
    local = {file.path: sealed.folder / file.path for file in files}
    plan = upload_plan(local, files, destination, sealed.provenance.source.repo_id, whole=False)
    return upload(sealed.folder, files, destination, plan, progress)
