"""The card of the original model, from its checkout or from the Hub alone."""

from __future__ import annotations

from pathlib import Path

from quantize import hub
from quantize.errors import CorruptModel, PackageError, SourceNotFound
from quantize.files import CARD, hash_file
from quantize.records import Checkout, Source
from quantize.source.checkout import is_local


def read_card(source: Source, against: str | None) -> str | None:
    """The card of a recorded source, from its commit on the Hub or the folder `against`; nothing else is fetched.

    Raises SourceNotFound, PackageError (another card than the recorded one), HubUnreachable or CorruptModel.
    """
    recorded = next((file for file in source.files if file.path == CARD), None)
    if recorded is None:
        return None
    reference = against or source.repo_id
    if reference is None:
        raise SourceNotFound(f"{source.name} came from a local folder: say where it is with --against FOLDER")
    if is_local(reference):
        path = Path(reference).expanduser() / CARD
    else:
        path = hub.download(reference, source.commit or "main", [CARD]) / CARD
    if not path.is_file() or hash_file(path)[1] != recorded.sha256:
        raise PackageError(f"{reference} is not the source that this package was made from: its {CARD} differs")
    return _decoded(path)


def card_text(checkout: Checkout) -> str | None:
    """The source's README.md, where it has one."""
    path = checkout.folder / CARD
    return _decoded(path) if path.is_file() else None


def _decoded(path: Path) -> str:
    """A card's text; bytes that are not UTF-8 are an error with their line, never mojibake."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise CorruptModel(f"the source's {CARD} is not UTF-8 (line {line}): correct it at the source") from error
