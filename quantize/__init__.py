"""Makes, proves, documents and publishes 4-bit checkpoints of causal language models.

What `__all__` names is the Python interface; docs/python.md shows it. Everything else may change in any version.
Importing this package loads neither torch nor transformers: functions and types do, at their first use.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantize.errors import (
        AccessDenied,
        ConfigError,
        Conflict,
        CorpusError,
        CorruptModel,
        DeviceError,
        HubUnreachable,
        NewerFormat,
        PackageError,
        ParityRefused,
        PublishError,
        QuantizeError,
        SourceChanged,
        SourceError,
        SourceNotFound,
        StorageError,
        UnsupportedModel,
    )
    from quantize.evidence import Evidence, Verdict
    from quantize.package import Package
    from quantize.pipeline import CardRequest, RunRequest, RunResult, VerifyRequest
    from quantize.progress import Progress
    from quantize.publishing import Destination, Receipt, SyncReport, SyncRequest
    from quantize.records import EvaluationSettings, Provenance, Publisher, Recipe

__version__ = "0.1.0"

__all__ = [
    "AccessDenied",
    "CardRequest",
    "ConfigError",
    "Conflict",
    "CorpusError",
    "CorruptModel",
    "Destination",
    "DeviceError",
    "EvaluationSettings",
    "Evidence",
    "HubUnreachable",
    "NewerFormat",
    "Package",
    "PackageError",
    "ParityRefused",
    "Progress",
    "Provenance",
    "PublishError",
    "Publisher",
    "QuantizeError",
    "Receipt",
    "Recipe",
    "RunRequest",
    "RunResult",
    "SourceChanged",
    "SourceError",
    "SourceNotFound",
    "StorageError",
    "SyncReport",
    "SyncRequest",
    "UnsupportedModel",
    "Verdict",
    "VerifyRequest",
    "__version__",
    "card",
    "push",
    "run",
    "sync",
    "verify",
]

_HOMES = {
    "quantize.errors": (
        *("QuantizeError", "SourceError", "SourceNotFound", "AccessDenied", "UnsupportedModel", "CorruptModel"),
        *("SourceChanged", "HubUnreachable", "ConfigError", "CorpusError", "DeviceError", "StorageError"),
        *("PackageError", "NewerFormat", "PublishError", "Conflict", "ParityRefused"),
    ),
    "quantize.evidence": ("Evidence", "Verdict"),
    "quantize.package": ("Package",),
    "quantize.pipeline": ("CardRequest", "RunRequest", "RunResult", "VerifyRequest"),
    "quantize.progress": ("Progress",),
    "quantize.publishing": ("Destination", "Receipt", "SyncReport", "SyncRequest"),
    "quantize.records": ("EvaluationSettings", "Provenance", "Publisher", "Recipe"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

if not TYPE_CHECKING:  # a type checker would take it that every name exists

    def __getattr__(name: str) -> object:
        """A type of the interface, imported when it is first used."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


def run(request: RunRequest, progress: Progress | None = None) -> RunResult:
    """Quantize a model, measure it against the original, write its card and seal it, as `quantize run` does.

    A package that parity refuses is no error here: see `result.package.evidence.verdict`. Raises QuantizeError, and
    leaves nothing half done.
    """
    from quantize import pipeline

    return pipeline.run(request, progress or _silent())


def verify(request: VerifyRequest, progress: Progress | None = None) -> Evidence:
    """Measure a package again, or any bitsandbytes checkpoint against its original; raises QuantizeError."""
    from quantize import pipeline

    return pipeline.verify(request, progress or _silent())


def card(request: CardRequest) -> Package:
    """Render a package's card again from its evidence, measuring nothing; raises QuantizeError."""
    from quantize import pipeline

    return pipeline.rewrite_card(request)


def push(
    folder: Path,
    destination: Destination,
    progress: Progress | None = None,
    *,
    verify_download: bool = False,
    device: str = "auto",
    corpus: str | None = None,
    against: str | None = None,
    card_template: Path | None = None,
) -> Receipt:
    """Publish the package in `folder` in one commit, if it passed and nothing in it contradicts its evidence.

    `verify_download` then fetches it into an empty cache, hashes it, loads it on `device`, and scores some of the
    recorded windows again; `corpus` and `against` say where a text of your own and an original in a folder lie. The
    card is rendered under the repo's name, from `card_template` where the package's was. The token comes from the
    environment variable HF_TOKEN or from `hf auth login`. Raises ParityRefused, PackageError, PublishError and other
    kinds of QuantizeError.
    """
    from quantize import publishing

    verification = publishing.Verification(device, corpus, against) if verify_download else None
    return publishing.push(
        folder, destination, progress or _silent(), verification=verification, card_template=card_template
    )


def sync(request: SyncRequest, progress: Progress | None = None) -> SyncReport:
    """Bring every model of a catalogue up to date on the Hub; one that fails does not stop the rest.

    What came of each is in the report. Raises ConfigError for a mistake in the catalogue.
    """
    from quantize import publishing

    return publishing.sync(request, progress or _silent())


def _silent() -> Progress:
    from quantize.progress import Silent

    return Silent()
