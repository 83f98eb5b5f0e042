"""A catalogue's models, one after the other, each brought up to date on the Hub; the Hub is the only state."""

from __future__ import annotations

import os
import shutil
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from quantize.errors import ConfigError, ParityRefused, QuantizeError, StorageError, storage_errors
from quantize.files import locked
from quantize.package import PROVENANCE, REFUSED, open_package
from quantize.pipeline import RunRequest
from quantize.progress import Progress
from quantize.publishing import catalogue
from quantize.publishing.catalogue import Entry
from quantize.publishing.delivery import Delivery, Wanted, deliver
from quantize.publishing.records import Target
from quantize.records import Publisher
from quantize.serialization import now
from quantize.source import is_local

PACKAGES, EVIDENCE = "packages", "evidence"
SUMMARY = "GITHUB_STEP_SUMMARY"
PENDING = ("would publish", "would refresh")
TRIED = ("published", "refused", "failed")
OK = ("up to date", "published", "card refreshed", "postponed", *PENDING)
FAILED, REFUSAL, INTERRUPTED = 1, 3, 130


@dataclass(frozen=True)
class Job:
    """What one `quantize sync` was asked for; `only` are targets, none meaning all."""

    catalogue: Path
    folder: Path
    only: tuple[str, ...] = ()
    max_models: int | None = None
    dry_run: bool = False
    refresh_card: bool = False
    verify_download: bool = False
    device: str = "auto"
    publisher: Publisher | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of one entry: a state of a delivery, or `postponed`, `refused`, `failed`, `interrupted`, and why."""

    target: str
    source: str
    state: str
    detail: str
    source_commit: str | None
    commit: str | None
    seconds: float


@dataclass(frozen=True)
class Report:
    """What came of all entries. `exit_code`: 0, 1 where some failed, 3 where some were refused, 130 when stopped."""

    catalogue: str
    started: str
    finished: str
    outcomes: tuple[Outcome, ...]
    exit_code: int


def sync(job: Job, progress: Progress) -> Report:
    """Publish what the Hub does not hold yet; what fails does not stop the rest.

    Ctrl-C and SIGTERM end it with a report of what was done. Raises ConfigError (the catalogue, or `only`), or when
    another job works on this catalogue.
    """
    entries = _chosen(catalogue.read(job.catalogue), job)
    started = now()
    outcomes: list[Outcome] = []
    code = 0
    with locked(job.catalogue.resolve(), ConfigError(f"another job works on {job.catalogue}: wait for it")):
        for number, entry in enumerate(entries, 1):
            progress.stage(f"{number} of {len(entries)}: {entry.target}")
            enough = job.max_models is not None and sum(one.state in TRIED for one in outcomes) >= job.max_models
            try:
                outcomes.append(_attempt(entry, job, progress, enough=enough))
            except (KeyboardInterrupt, SystemExit) as stop:
                outcomes.append(_outcome(entry, "interrupted", "run the same command again", None, 0.0))
                code = INTERRUPTED if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0)
                break
    states = {outcome.state for outcome in outcomes}
    code = code or (FAILED if "failed" in states else REFUSAL if "refused" in states else 0)
    report = Report(job.catalogue.name, started, now(), tuple(outcomes), code)
    _write_summary(report, progress)
    return report


def _chosen(entries: tuple[Entry, ...], job: Job) -> tuple[Entry, ...]:
    absent = sorted(set(job.only) - {entry.target for entry in entries})
    if absent:
        raise ConfigError(f"{job.catalogue} has no target {absent[0]}: see --only")
    hidden = next((entry for entry in entries if is_local(entry.source)), None)
    if hidden:
        raise ConfigError(f"{job.catalogue}:{hidden.line}: {hidden.source} is also a folder here: start sync elsewhere")
    return tuple(entry for entry in entries if not job.only or entry.target in job.only)


def _attempt(entry: Entry, job: Job, progress: Progress, *, enough: bool) -> Outcome:
    """One entry from start to end, whatever happens in it."""
    started = time.monotonic()
    detail, delivery = "", None
    try:
        with storage_errors(job.folder):
            delivery, state, detail = _delivered(entry, job, progress, dry_run=job.dry_run or enough)
            state = "postponed" if enough and state in PENDING else state
    except QuantizeError as error:
        state, detail = "failed", str(error)
    except Exception as error:  # noqa: BLE001 - a bug met in one model must not stop the others; its traceback is shown
        traceback.print_exc()
        state, detail = "failed", f"a bug: {type(error).__name__}: {error}"
    if state not in OK:
        progress.note(f"{state}: {detail}")
    return _outcome(entry, state, detail, delivery, time.monotonic() - started)


def _delivered(entry: Entry, job: Job, progress: Progress, *, dry_run: bool) -> tuple[Delivery | None, str, str]:
    """A delivery and what there is to say of it; its evidence is kept, and what is done with is removed."""
    made, kept = (job.folder / part / _folder_name(entry) for part in (PACKAGES, EVIDENCE))
    _drop_outdated(made, entry)
    wanted = _wanted(entry, job, made, kept, dry_run=dry_run)
    try:
        delivery = deliver(wanted, progress)
    except ParityRefused as error:
        refused = made.with_name(f"{made.name}{REFUSED}")
        _keep_evidence(refused, kept)
        shutil.rmtree(refused, ignore_errors=True)
        return None, "refused", str(error)
    except QuantizeError:
        _keep_evidence(made, kept)
        raise
    if delivery.state == "published":
        _keep_evidence(made, kept)
    if not dry_run:
        shutil.rmtree(made, ignore_errors=True)
    return delivery, delivery.state, delivery.receipt.url if delivery.receipt else ""


def _outcome(entry: Entry, state: str, detail: str, delivery: Delivery | None, seconds: float) -> Outcome:
    return Outcome(
        target=entry.target,
        source=entry.source,
        state=state,
        detail=detail,
        source_commit=delivery.source_commit if delivery else None,
        commit=delivery.commit if delivery else None,
        seconds=round(seconds, 3),
    )


def _wanted(entry: Entry, job: Job, package: Path, evidence: Path, *, dry_run: bool) -> Wanted:
    request = RunRequest(
        model=entry.source,
        revision=entry.revision,
        output=package,
        recipe=entry.recipe,
        settings=entry.settings,
        device=job.device,
        publisher=job.publisher,
        allow_no_derivatives=entry.allow_no_derivatives,
    )
    return Wanted(
        run=request,
        target=Target(entry.target, private=entry.private),
        refresh_card=job.refresh_card,
        verify_download=job.verify_download,
        dry_run=dry_run,
        refused_before=evidence,
        largest_source=entry.max_source_gb * 1e9 if entry.max_source_gb else None,
    )


def _folder_name(entry: Entry) -> str:
    return entry.target.replace("/", "--")


def _drop_outdated(made: Path, entry: Entry) -> None:
    """Remove an unpublished package of another recipe: the catalogue has changed since it was made."""
    if (made / PROVENANCE).is_file() and open_package(made).provenance.requested_recipe != entry.recipe:
        shutil.rmtree(made)


def _keep_evidence(made: Path, kept: Path) -> None:
    """Leave everything of a package but its weights; of several tries the last. Raises StorageError."""
    if not made.is_dir():
        return
    try:
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(made, kept, ignore=shutil.ignore_patterns("*.safetensors"))
    except OSError as error:
        raise StorageError(f"the evidence cannot be kept in {kept} ({error}): make room, or mend the folder") from error


def _write_summary(report: Report, progress: Progress) -> None:
    """A table for the page of a GitHub job, where this is one."""
    place = os.environ.get(SUMMARY)
    if not place:
        return
    lines = [f"## quantize sync {report.catalogue}", "", "| target | source | state | detail |", "|---|---|---|---|"]
    lines += [
        f"| {' | '.join(_cell(text) for text in (one.target, one.source, one.state, one.detail))} |"
        for one in report.outcomes
    ]
    try:
        with Path(place).open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    except OSError as error:
        progress.note(f"no summary was written to {place}: {error.strerror}")


def _cell(text: str) -> str:
    """Text that stays in its cell and is shown as it is."""
    escaped = "".join(f"\\{letter}" if letter in "\\`*_[]<>|" else letter for letter in text)
    return " ".join(escaped.split())
