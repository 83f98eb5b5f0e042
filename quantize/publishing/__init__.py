"""From a finished package to a repo on the Hub that holds it. This module is all that others use.

What publishing asks of the pipeline is as small: `pipeline.run` (RunRequest to RunResult) and `pipeline.rendered_card`.
The records are imported at once, what does the work only when it is called.
"""

from __future__ import annotations

from pathlib import Path

from quantize.progress import Progress
from quantize.publishing.records import (
    Change,
    Delivery,
    Destination,
    Downloaded,
    Plan,
    PublishRequest,
    Receipt,
    SyncOutcome,
    SyncReport,
    SyncRequest,
    Verification,
)

__all__ = [
    "Change",
    "Delivery",
    "Destination",
    "Downloaded",
    "Plan",
    "PublishRequest",
    "Receipt",
    "SyncOutcome",
    "SyncReport",
    "SyncRequest",
    "Verification",
    "deliver",
    "plan",
    "push",
    "sync",
]


def plan(folder: Path, destination: Destination, card_template: Path | None = None) -> Plan:
    """What pushing a package would do; sends nothing.

    Raises what `push` raises before its first byte: ParityRefused, PackageError, AccessDenied, PublishError or
    HubUnreachable.
    """
    from quantize.publishing import package_push

    return package_push.plan(folder, destination, card_template)


def push(
    folder: Path,
    destination: Destination,
    progress: Progress,
    *,
    verification: Verification | None = None,
    card_template: Path | None = None,
) -> Receipt:
    """Publish a package that passed and is unchanged since, in one commit; leaves a receipt beside its files.

    Its card is rendered again under the repo's name; `verification` asks for the proof by download.

    Raises ParityRefused, PackageError, AccessDenied (no right), Conflict (somebody else committed), PublishError (a
    refusal, or what arrived differs) or HubUnreachable (a rerun finishes the work).
    """
    from quantize.publishing import package_push

    return package_push.push(
        folder,
        destination,
        progress,
        verification=verification,
        card_template=card_template,
    )


def deliver(request: PublishRequest, progress: Progress) -> Delivery:
    """Publish a model's package where the repo does not hold it yet.

    The Hub is asked first, and nothing is downloaded when the key of its package agrees. Raises ParityRefused, after
    leaving the evidence, and what `pipeline.run` and `push` raise.
    """
    from quantize.publishing import delivery

    return delivery.deliver(request, progress)


def sync(request: SyncRequest, progress: Progress) -> SyncReport:
    """Publish the models of a catalogue that the Hub does not hold yet; what fails does not stop the rest.

    Ctrl-C and SIGTERM end it with a report of what was done. Raises ConfigError: mistakes in the catalogue or in
    `only`, or another job works on this catalogue.
    """
    from quantize.publishing import catalogue_sync

    return catalogue_sync.sync(request, progress)
