"""From a package, or from a model that has none yet, to a repo that holds it; and nothing where it is there."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from quantize import __version__, devices, files, hub, package, pipeline, source
from quantize.errors import ParityRefused, PublishError, UnsupportedModel, storage_errors
from quantize.evidence import Evidence
from quantize.grades import grade_at_least
from quantize.package import Package
from quantize.parity import sample_loss
from quantize.pipeline import RunRequest
from quantize.progress import Progress
from quantize.publishing import upload
from quantize.publishing.records import Downloaded, Plan, Receipt, Target
from quantize.records import FileRecord, Provenance, package_key
from quantize.serialization import now, read_record, to_json

SAME_LOSS = 1e-3
"""Nats a token by which the model from the Hub may differ from the local one: noise of the kernels."""


@dataclass(frozen=True)
class Delivery:
    """What came of `run --push-to`: `up to date`, `card refreshed`, `would publish`, `would refresh` or `published`.

    `commit` is the target's; None where it holds nothing yet.
    """

    state: str
    source: str
    source_commit: str | None
    target: str
    commit: str | None = None
    package: Package | None = None
    receipt: Receipt | None = None

    def summary(self) -> dict[str, object]:
        """What `--json` prints: the evidence lies in the package."""
        said = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return said | {"package": str(self.package.folder) if self.package else None}


@dataclass(frozen=True)
class Wanted:
    """What is to be on the Hub: a package of this source by this recipe, made in this way where it is not."""

    run: RunRequest
    target: Target
    refresh_card: bool = False
    verify_download: bool = False
    dry_run: bool = False
    largest_source: float | None = None
    refused_before: Path | None = None
    """`largest_source` in bytes of weights; `refused_before` is the evidence of an earlier try, where there is one."""


def plan(folder: Path, target: Target) -> Plan:
    """What pushing a package would do; raises what stands against it, and sends nothing."""
    made = _publishable(folder)
    return upload.plan(folder, _files(made), _titled(target, made.provenance))


def push(folder: Path, target: Target, progress: Progress, *, verify_download: bool = False) -> Receipt:
    """Publish a package that passed and is unchanged since, in one commit; leaves a receipt beside its files."""
    made = _publishable(folder)
    target, listed = _titled(target, made.provenance), _files(made)
    started = now()
    progress.stage(f"push to {target.repo_id}")
    receipt = upload.push(folder, listed, target, upload.plan(folder, listed, target), progress)
    proof = None
    if verify_download:
        proof = _proved_by_download(target.repo_id, receipt.commit, listed, made.provenance, folder, progress)
    receipt = dataclasses.replace(receipt, key=made.provenance.key, started=started, finished=now(), downloaded=proof)
    with storage_errors(folder):
        (folder / package.RECEIPT).write_text(to_json(receipt), "utf-8")
    return receipt


def deliver(wanted: Wanted, progress: Progress) -> Delivery:
    """Publish a model's package where the target does not hold it yet.

    The Hub is asked first, and nothing is downloaded when the key there agrees. Raises ParityRefused, after leaving
    the evidence, and what `pipeline.run` and `push` raise.
    """
    request, target = wanted.run, wanted.target
    if request.model.lower() == target.repo_id.lower():
        raise PublishError(f"{target.repo_id} is the source itself: publish to another repo")
    progress.stage(f"compare {request.model} with {target.repo_id}")
    account = upload.require_access(target)
    there = upload.require_room(target, account)
    commit, pinned = _pinned(request, wanted.largest_source, progress)
    key = package_key(_source_name(request.model), pinned, request.recipe)
    outcome = Delivery("would publish", request.model, commit, target.repo_id, there[0] if there else None)
    if there and not request.force and _satisfies(there[1], key, request):
        progress.note(f"{target.repo_id} is up to date: source {(commit or pinned)[:12]}, key {key[:12]}")
        return _kept(wanted, there, outcome, progress)
    _require_not_refused(wanted, key)
    if wanted.dry_run:
        return outcome
    made = pipeline.run(
        dataclasses.replace(
            request,
            revision=commit,
            output=request.output or Path(target.repo_id.rsplit("/", 1)[-1]),
            name=target.repo_id,
            replace_outdated=True,
        ),
        progress,
    ).package
    if not made.evidence.verdict.passed:
        raise ParityRefused(
            f"{request.model} was refused: {made.evidence.verdict.reasons[0]}; the evidence is in {made.folder}"
        )
    receipt = push(made.folder, target, progress, verify_download=wanted.verify_download)
    return dataclasses.replace(outcome, state="published", commit=receipt.commit, package=made, receipt=receipt)


def _satisfies(held: Provenance, key: str, request: RunRequest) -> bool:
    """Whether a published package is what would be made now, judged at least as strictly."""
    return held.key == key and grade_at_least(held.settings.require, request.settings.require)


def _kept(wanted: Wanted, there: tuple[str, Provenance], outcome: Delivery, progress: Progress) -> Delivery:
    """What is still to do where the package itself is up to date: its card, its tag, the proof by download."""
    target = wanted.target
    done = _refreshed(wanted, there, outcome, progress) if wanted.refresh_card else None
    done = done or dataclasses.replace(outcome, state="up to date")
    if wanted.dry_run:
        return done
    commit = str(done.commit)
    if target.tag:
        upload.tag(target, commit)
    if wanted.verify_download:
        listed = tuple(file for file in there[1].files if file.path != package.CARD)
        _proved_by_download(target.repo_id, commit, listed, there[1], None, progress)
    return done


def _require_not_refused(wanted: Wanted, key: str) -> None:
    """Raise ParityRefused where the very same was made and refused before, with the evidence still here."""
    folder = wanted.refused_before
    if folder is None or wanted.run.force or not (folder / package.PROVENANCE).is_file():
        return
    earlier = package.open_package(folder)
    made_by = (earlier.provenance.key, earlier.provenance.settings, earlier.provenance.tool_version)
    if made_by == (key, wanted.run.settings, __version__) and not earlier.evidence.verdict.passed:
        raise ParityRefused(
            f"{wanted.run.model} was refused before: {earlier.evidence.verdict.reasons[0]}; "
            f"delete {folder} to try again"
        )


def _publishable(folder: Path) -> Package:
    made = package.open_package(folder)
    package.require_unchanged(made)
    if not made.evidence.verdict.passed:
        raise ParityRefused(f"{folder} did not pass parity ({made.evidence.verdict.grade}): it is not published")
    return made


def _files(made: Package) -> tuple[FileRecord, ...]:
    """Everything that is published: what was sealed, and the record of it."""
    record = FileRecord(package.PROVENANCE, *files.hash_file(made.folder / package.PROVENANCE))
    return (*made.provenance.files, record)


def _titled(target: Target, provenance: Provenance) -> Target:
    """The target with a commit message."""
    title = f"{provenance.source.name} in {provenance.recipe.bits} bits"
    return dataclasses.replace(target, message=target.message or title)


def _source_name(model: str) -> str:
    return source.name_of(model) if source.is_local(model) else model


def _pinned(request: RunRequest, largest: float | None, progress: Progress) -> tuple[str | None, str]:
    """The commit of a Hub model, and what pins the source: that commit, or a folder's digest."""
    if source.is_local(request.model):
        checkout = source.fetch(
            request.model, revision=request.revision, trust_remote_code=request.trust_remote_code, progress=progress
        )
        return None, checkout.source.pinned
    commit, listing = hub.resolve(request.model, request.revision)
    size = sum(file.size for file in listing if file.path.endswith(".safetensors") and "/" not in file.path)
    if largest is not None and size > largest:
        raise UnsupportedModel(
            f"{request.model} has {size / 1e9:.2f} GB of weights, more than the limit of {largest / 1e9:.2f} GB"
        )
    return commit, commit


def _refreshed(wanted: Wanted, there: tuple[str, Provenance], outcome: Delivery, progress: Progress) -> Delivery | None:
    """Render the card of a published package again, and push it alone; None where it is as it would be.

    A card that somebody edited on the Hub is left alone.
    """
    commit, provenance = there
    repo_id = wanted.target.repo_id
    _, remote = hub.resolve(repo_id, commit)
    small = [file for file in remote if file.path in (package.PROVENANCE, package.PARITY, package.CARD)]
    small += [file for file in remote if file.path.startswith(f"{package.FIGURES}/")]
    with tempfile.TemporaryDirectory(prefix="quantize-card-") as place:
        folder = Path(place)
        cached = hub.fetch(repo_id, commit, small)
        for file in small:
            (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(cached / file.path, folder / file.path)
        if FileRecord(package.CARD, *files.hash_file(folder / package.CARD)) not in provenance.files:
            progress.note(
                f"the card of {repo_id} was edited on the Hub and is left alone: push the package to replace it"
            )
            return None
        publisher = wanted.run.publisher or provenance.publisher
        made = dataclasses.replace(
            package.open_package(folder), provenance=dataclasses.replace(provenance, publisher=publisher)
        )
        against = wanted.run.model if source.is_local(wanted.run.model) else None
        text = pipeline.rendered_card(made, against, wanted.run.card_template)
        if text == (folder / package.CARD).read_text("utf-8"):
            return None
        if wanted.dry_run:
            return dataclasses.replace(outcome, state="would refresh")
        package.write_card(folder, text)
        sealed = dataclasses.replace(made, provenance=package.reseal_card(folder, made.provenance))
        changed = tuple(file for file in _files(sealed) if file.path in (package.CARD, package.PROVENANCE))
        target = dataclasses.replace(wanted.target, tag=None, message=wanted.target.message or "Card rendered again")
        progress.stage(f"push the card to {repo_id}")
        planned = upload.plan(folder, changed, target, whole=False)
        receipt = upload.push(folder, changed, target, planned, progress)
    return dataclasses.replace(outcome, state="card refreshed", commit=receipt.commit, receipt=receipt)


def _proved_by_download(
    repo_id: str,
    commit: str,
    listed: tuple[FileRecord, ...],
    provenance: Provenance,
    local: Path | None,
    progress: Progress,
) -> Downloaded:
    """Fetch what was published into an empty cache, hash it, and let stock transformers load and run it.

    Raises PublishError where something differs, or where the model computes something else than the `local` package.
    """
    started, size = time.monotonic(), sum(file.size for file in listed)
    device, trust = devices.choose("auto"), provenance.source.remote_code
    progress.note(f"fetching {size / 1e6:.1f} MB again from {repo_id}")
    with tempfile.TemporaryDirectory(prefix="quantize-download-") as place:
        cache = Path(place)
        files.require_space(cache, size, f"downloading {repo_id}")
        folder = hub.download(repo_id, commit, [file.path for file in listed], cache)
        for file in listed:
            fetched = folder / file.path
            if not fetched.is_file() or files.hash_file(fetched) != (file.size, file.sha256):
                raise PublishError(f"{file.path} comes back from {repo_id} with other content: push again with --force")
        generated = read_record(Evidence, folder / package.PARITY).generation
        texts = [sample.prompt + sample.reference_greedy for sample in generated.samples] if generated else []
        tokens, loss = sample_loss(folder, texts, device, trust)
    expected = sample_loss(local, texts, device, trust)[1] if local else None
    if not abs(loss - (loss if expected is None else expected)) <= SAME_LOSS:
        raise PublishError(
            f"the model from {repo_id} computes something else ({loss:.4f} nats a token instead of {expected}): "
            f"look at the repo before anybody uses it"
        )
    return Downloaded(len(listed), size, tokens, loss, expected, round(time.monotonic() - started, 3))
