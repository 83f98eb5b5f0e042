"""The models of a catalogue, one after the other, each brought up to date on the Hub, which is the only state."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import traceback
from pathlib import Path

from quantize import methods, package
from quantize.errors import (
    ConfigError,
    NewerFormat,
    PackageError,
    ParityRefused,
    QuantizeError,
    StorageError,
    described,
    storage_errors,
)
from quantize.files import PROVENANCE, locked
from quantize.formats.safetensors import SUFFIX
from quantize.pipeline import RunRequest
from quantize.progress import Progress
from quantize.publishing import catalogue
from quantize.publishing.catalogue import Entry
from quantize.publishing.delivery import deliver
from quantize.publishing.records import Delivery, Destination, PublishRequest, SyncOutcome, SyncReport, SyncRequest
from quantize.records import Recipe
from quantize.serialization import now
from quantize.source import is_local

PACKAGES, EVIDENCE = "packages", "evidence"
SUMMARY = "GITHUB_STEP_SUMMARY"
PENDING = ("would publish", "would refresh")
TRIED = ("published", "refused", "failed")
FAILED, REFUSED, INTERRUPTED = 1, 3, 130
"""Exit codes."""


def sync(request: SyncRequest, progress: Progress) -> SyncReport:
    """Publish what the Hub does not hold yet; what fails does not stop the rest.

    Ctrl-C and SIGTERM end it with a report of what was done. Raises ConfigError (the catalogue, or `only`), or when
    another job works on this catalogue.
    """
    listed = catalogue.read(request.catalogue)
    for note in listed.notes:
        progress.note(note)
    entries = _selected(listed.entries, request)
    started = now()
    outcomes: list[SyncOutcome] = []
    code = 0
    busy = ConfigError(f"another job works on {request.catalogue}: wait for it")
    with contextlib.nullcontext() if request.dry_run else locked(request.folder / request.catalogue.name, busy):
        for number, entry in enumerate(entries, 1):
            progress.stage(f"{number} of {len(entries)}: {entry.repo}")
            tried = sum(outcome.state in TRIED for outcome in outcomes)
            enough = request.max_models is not None and tried >= request.max_models
            try:
                outcomes.append(_attempt(entry, request, progress, enough=enough))
            except (KeyboardInterrupt, SystemExit) as stop:
                outcomes.append(_outcome(entry, "interrupted", "run the same command again", None, 0.0))
                code = INTERRUPTED if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0)
                break
    states = {outcome.state for outcome in outcomes}
    code = code or (FAILED if "failed" in states else REFUSED if "refused" in states else 0)
    report = SyncReport(request.catalogue.name, started, now(), tuple(outcomes), code)
    _write_summary(report, progress)
    return report


def _selected(entries: tuple[Entry, ...], request: SyncRequest) -> tuple[Entry, ...]:
    absent = sorted(set(request.only) - {entry.repo for entry in entries})
    if absent:
        raise ConfigError(f"{request.catalogue} has no repo {absent[0]}: see --only")
    hidden = next((entry for entry in entries if is_local(entry.source)), None)
    if hidden:
        raise ConfigError(
            f"{request.catalogue}:{hidden.line}: {hidden.source} is also a folder here: start sync elsewhere"
        )
    return tuple(entry for entry in entries if not request.only or entry.repo in request.only)


def _attempt(entry: Entry, request: SyncRequest, progress: Progress, *, enough: bool) -> SyncOutcome:
    """One entry from start to end, whatever happens in it."""
    started = time.monotonic()
    detail, delivery = "", None
    try:
        with storage_errors(request.folder):
            delivery = _deliver(entry, request, progress, dry_run=request.dry_run or enough)
        state = "postponed" if enough and delivery.state in PENDING else delivery.state
        detail = delivery.receipt.url if delivery.receipt else ""
    except ParityRefused as error:
        state, detail = "refused", described(error)
    except QuantizeError as error:
        state, detail = "failed", described(error)
    except Exception as error:  # noqa: BLE001 - a bug met in one model must not stop the others; its traceback is shown
        traceback.print_exc()
        state, detail = "failed", f"a bug: {type(error).__name__}: {error}"
    outcome = _outcome(entry, state, detail, delivery, time.monotonic() - started)
    if not outcome.ok:
        progress.note(f"{state}: {detail}")
    return outcome


def _deliver(entry: Entry, request: SyncRequest, progress: Progress, *, dry_run: bool) -> Delivery:
    """Deliver one entry; keep the evidence of what was made, and remove what is no longer needed."""
    folder, evidence = (request.folder / part / entry.repo.replace("/", "--") for part in (PACKAGES, EVIDENCE))
    _drop_outdated(folder, entry)
    try:
        delivery = deliver(_publish_request(entry, request, folder, evidence, dry_run=dry_run), progress)
    except ParityRefused:
        refused = package.refused_folder(folder)
        _keep_evidence(refused, evidence)
        shutil.rmtree(refused, ignore_errors=True)
        raise
    except QuantizeError:
        _keep_evidence(folder, evidence)
        raise
    if delivery.state == "published":
        _keep_evidence(folder, evidence)
    if not dry_run:
        shutil.rmtree(folder, ignore_errors=True)
    return delivery


def _outcome(entry: Entry, state: str, detail: str, delivery: Delivery | None, seconds: float) -> SyncOutcome:
    return SyncOutcome(
        repo=entry.repo,
        source=entry.source,
        state=state,
        detail=detail,
        source_commit=delivery.source_commit if delivery else None,
        commit=delivery.commit if delivery else None,
        seconds=round(seconds, 3),
    )


def _publish_request(
    entry: Entry, request: SyncRequest, folder: Path, evidence: Path, *, dry_run: bool
) -> PublishRequest:
    return PublishRequest(
        run=RunRequest(
            model=entry.source,
            revision=entry.revision,
            output=folder,
            recipe=entry.recipe,
            settings=entry.settings,
            device=request.device,
            force=request.force,
            publisher=request.publisher,
            allow_no_derivatives=entry.allow_no_derivatives,
        ),
        destination=Destination(entry.repo, private=entry.private, public=entry.public),
        refresh_card=request.refresh_card,
        verify_download=request.verify_download,
        dry_run=dry_run,
        refused_before=evidence,
        largest_source=entry.max_source_gb * 1e9 if entry.max_source_gb else None,
    )


def _drop_outdated(folder: Path, entry: Entry) -> None:
    """Remove an unpublished package of another source or recipe, or one that nobody can read.

    The catalogue has changed since it was made, or a disk has failed.
    """
    if not (folder / PROVENANCE).is_file():
        return
    try:
        made_from = package.open_package(folder).provenance
        outdated = (made_from.source.repo_id, made_from.requested_recipe) != (entry.source, _recorded(entry.recipe))
    except NewerFormat:
        raise
    except PackageError:
        outdated = True
    if outdated:
        shutil.rmtree(folder)


def _recorded(recipe: Recipe) -> Recipe:
    return package.without_paths(methods.normalized(recipe))


def _keep_evidence(folder: Path, evidence: Path) -> None:
    """Leave everything of a package but its weights; of several tries the last. Raises StorageError."""
    if not folder.is_dir():
        return
    try:
        shutil.rmtree(evidence, ignore_errors=True)
        shutil.copytree(folder, evidence, ignore=shutil.ignore_patterns(f"*{SUFFIX}"))
    except OSError as error:
        raise StorageError(
            f"the evidence cannot be kept in {evidence} ({error}): free some space, or correct the folder"
        ) from error


def _write_summary(report: SyncReport, progress: Progress) -> None:
    """A table for the page of a GitHub job, where this is one."""
    summary = os.environ.get(SUMMARY)
    if not summary:
        return
    lines = [f"## quantize sync {report.catalogue}", "", "| repo | source | state | detail |", "|---|---|---|---|"]
    for outcome in report.outcomes:
        cells = (outcome.repo, outcome.source, outcome.state, outcome.detail)
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    try:
        with Path(summary).open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    except OSError as error:
        progress.note(f"no summary was written to {summary}: {error.strerror}")


def _cell(text: str) -> str:
    """Text that stays in its cell and is shown as it is."""
    escaped = "".join(f"\\{letter}" if letter in "\\`*_[]<>|" else letter for letter in text)
    return " ".join(escaped.split())
