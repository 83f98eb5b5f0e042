"""A model becomes a published package, unless the Hub holds that package already."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from quantize import __version__, hub, methods, package, pipeline, source
from quantize.errors import ParityRefused, PublishError, UnsupportedModel
from quantize.files import CARD, PROVENANCE
from quantize.formats.safetensors import is_weights
from quantize.grades import grade_at_least
from quantize.package import Package
from quantize.pipeline import RunRequest
from quantize.progress import Progress
from quantize.publishing.card_refresh import refresh_card
from quantize.publishing.download_check import check_download
from quantize.publishing.package_push import push
from quantize.publishing.records import Delivery, PublishRequest, Verification
from quantize.publishing.remote_state import (
    PublishedPackage,
    published_package,
    remote_state,
    require_access,
    untold,
)
from quantize.publishing.upload import ensure_tag
from quantize.publishing.upload_plan import require_no_foreign_weights
from quantize.publishing.visibility import require_wished
from quantize.records import Demand, Provenance


def deliver(request: PublishRequest, progress: Progress) -> Delivery:
    """Publish a model's package where the repo does not hold it yet.

    The Hub is asked first, and nothing is downloaded when the key of its package agrees. Raises ParityRefused, after
    leaving the evidence, and what `pipeline.run` and `push` raise.
    """
    run, destination = request.run, request.destination
    _require_another_repo(run.model, destination.repo_id)
    progress.stage(f"compare {run.model} with {destination.repo_id}")
    state = remote_state(destination, require_access(destination, progress.note))
    require_no_foreign_weights(destination, state)
    published = published_package(destination.repo_id, state)
    name, commit, pinned = _pinned(run, request.largest_source, progress)
    require_wished(destination, state, None if source.is_local(run.model) else run.model)
    _require_another_repo(name, destination.repo_id)
    demand = package.demanded(methods.normalized(run.recipe), run.settings)
    key = demand.key(name, pinned)
    delivery = Delivery(
        "would publish", run.model, commit, destination.repo_id, published.commit if published else None
    )
    if published and not run.force and _satisfies(published.provenance, key, run):
        progress.note(f"{destination.repo_id} is up to date: source {(commit or pinned)[:12]}, key {key[:12]}")
        if published.unchecked:
            progress.note(untold(destination.repo_id, published.unchecked))
        return _keep(request, published, delivery, progress)
    _require_not_refused(request, key, demand)
    if request.dry_run:
        return delivery
    passed = _run(request, commit, progress)
    receipt = push(
        passed.folder,
        destination,
        progress,
        verification=_verification(run) if request.verify_download else None,
        card_template=run.card_template,
    )
    return dataclasses.replace(delivery, state="published", commit=receipt.commit, package=passed, receipt=receipt)


def _run(request: PublishRequest, commit: str | None, progress: Progress) -> Package:
    """The package, made at the pinned commit of its source; raises ParityRefused where it did not pass."""
    repo_id = request.destination.repo_id
    run = dataclasses.replace(
        request.run,
        revision=commit,
        output=request.run.output or Path(repo_id.rsplit("/", 1)[-1]),
        name=repo_id,
        replace_outdated=True,
    )
    finished = pipeline.run(run, progress).package
    verdict = finished.evidence.verdict
    if not verdict.passed:
        raise ParityRefused(f"{run.model} was refused: {verdict.reasons[0]}; the evidence is in {finished.folder}")
    return finished


def _satisfies(published: Provenance, key: str, run: RunRequest) -> bool:
    """Whether a published package is what would be made now, judged at least as strictly."""
    return published.key == key and grade_at_least(published.settings.require, run.settings.require)


def _keep(request: PublishRequest, published: PublishedPackage, delivery: Delivery, progress: Progress) -> Delivery:
    """What is still to do where the package itself is up to date: its card, its tag, the proof by download."""
    refresh = refresh_card(request, published, progress) if request.refresh_card else None
    if refresh is None:
        delivery = dataclasses.replace(delivery, state="up to date")
    elif refresh.receipt is None:
        delivery = dataclasses.replace(delivery, state="would refresh")
    else:
        commit = refresh.receipt.commit
        delivery = dataclasses.replace(delivery, state="card refreshed", commit=commit, receipt=refresh.receipt)
    if request.dry_run:
        return delivery
    commit = str(delivery.commit)
    if request.destination.tag:
        ensure_tag(request.destination, commit)
    if request.verify_download:
        files = tuple(file for file in published.provenance.files if file.path != CARD)
        check_download(delivery.repo, commit, files, published.provenance, None, _verification(request.run), progress)
    return delivery


def _require_another_repo(model: str, repo_id: str) -> None:
    if model.lower() == repo_id.lower():
        raise PublishError(f"{repo_id} is the source itself: publish to another repo")


def _require_not_refused(request: PublishRequest, key: str, demand: Demand) -> None:
    """Raise ParityRefused where the very same was made and refused before, with the evidence still here."""
    folder, run = request.refused_before, request.run
    if folder is None or run.force or not (folder / PROVENANCE).is_file():
        return
    earlier = package.open_package(folder)
    made_by = (earlier.provenance.key, earlier.provenance.settings, earlier.provenance.tool_version)
    if made_by == (key, demand.settings, __version__) and not earlier.evidence.verdict.passed:
        raise ParityRefused(
            f"{run.model} was refused before: {earlier.evidence.verdict.reasons[0]}; delete {folder} to try again"
        )


def _verification(run: RunRequest) -> Verification:
    """What the run was made from and measured on is on this machine."""
    return Verification(run.device, run.settings.corpus, run.model if source.is_local(run.model) else None)


def _pinned(run: RunRequest, largest: float | None, progress: Progress) -> tuple[str, str | None, str]:
    """The source's present name, its commit on the Hub, and what pins it: that commit, or a folder's digest."""
    if source.is_local(run.model):
        checkout = source.fetch(
            run.model, revision=run.revision, trust_remote_code=run.trust_remote_code, progress=progress
        )
        return checkout.source.name, None, checkout.source.pinned
    held = hub.snapshot(run.model, run.revision)
    size = sum(file.size for file in held.files if is_weights(file.path) and "/" not in file.path)
    if largest is not None and size > largest:
        raise UnsupportedModel(
            f"{run.model} has {size / 1e9:.2f} GB of weights, more than the limit of {largest / 1e9:.2f} GB"
        )
    return held.repo_id, held.commit, held.commit
