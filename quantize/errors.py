"""The known ways to fail, each with its exit code.

    QuantizeError                 exit 1: one readable line that says what to do
    ├── SourceError               the model that was asked for
    │   ├── SourceNotFound        no such model, revision or folder
    │   ├── AccessDenied          gated or private, or the token has no rights
    │   ├── UnsupportedModel      pickle only, already quantized, not causal, remote code ...
    │   ├── CorruptModel          truncated or damaged files, absent tensors, NaN weights
    │   └── SourceChanged         its files were replaced while a run worked on them
    ├── HubUnreachable            no network, or the Hub answers with errors
    ├── ConfigError               the config file, the catalogue, or options about the publisher or the card
    ├── CorpusError               the text to measure on
    ├── DeviceError               the device that was asked for, or its memory
    ├── StorageError              no space, no permission, and whatever else a disk says
    ├── PackageError              an output folder or a package that is not what it should be
    │   └── NewerFormat           a package of a later version of quantize
    ├── PublishError              the upload
    │   └── Conflict              somebody else committed meanwhile
    └── ParityRefused             exit 3: the package was made and measured, and did not pass

Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

CREDENTIALS = re.compile(r"(?<=://)[^/?#\s]*@")


def printable(text: str) -> str:
    """The text in one line, without credentials of addresses; what a terminal or a log would obey is escaped."""
    line = " ".join(CREDENTIALS.sub("", text).splitlines())
    return line if line.isprintable() else "".join(map(_shown, line))


def _shown(mark: str) -> str:
    plain = mark.isprintable() or unicodedata.category(mark) == "Zs"
    return mark if plain else mark.encode("unicode_escape").decode()


class QuantizeError(Exception):
    """A known failure; each argument is one line of its message."""

    exit_code = 1

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(map(printable, lines)))


def first_line(error: BaseException) -> str:
    """What an error says first, or the name of its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def described(error: BaseException, message: str | None = None) -> str:
    """The message of an error, or another one, and in its last line the notes that it got on its way."""
    return "; ".join([str(error) if message is None else message, *map(printable, _notes(error))])


def _notes(error: BaseException | None) -> list[str]:
    return [] if error is None else [*getattr(error, "__notes__", ()), *_notes(error.__cause__)]


class SourceError(QuantizeError):
    pass


class SourceNotFound(SourceError):
    pass


class AccessDenied(SourceError):
    pass


class UnsupportedModel(SourceError):
    pass


class CorruptModel(SourceError):
    pass


class SourceChanged(SourceError):
    pass


class HubUnreachable(QuantizeError):
    """`passing`: may be gone at the next attempt; `retry_after`: seconds that the Hub asks to wait."""

    def __init__(self, message: str, *, passing: bool = True, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.passing, self.retry_after = passing, retry_after


class ConfigError(QuantizeError):
    pass


class CorpusError(QuantizeError):
    pass


class DeviceError(QuantizeError):
    pass


class StorageError(QuantizeError):
    pass


class PackageError(QuantizeError):
    pass


class NewerFormat(PackageError):
    pass


class PublishError(QuantizeError):
    pass


class Conflict(PublishError):
    pass


class ParityRefused(QuantizeError):
    exit_code = 3


NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}
OF_A_DEVICE = {*(NO_SPACE | NO_PERMISSION), errno.EIO, errno.ENXIO, errno.ESTALE, errno.EMFILE, errno.ENFILE}
OF_A_PATH = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.ENODEV, errno.EBUSY, errno.ETXTBSY, errno.EXDEV, errno.EMLINK, errno.EINVAL, errno.EILSEQ, errno.ENOTSUP),
}
"""What a disk says; that of a path is known by the path which comes with it."""
LONGEST_PLACE = 200
"""Letters of a path in a message."""


@contextmanager
def storage_errors(where: object = None) -> Iterator[None]:
    """Turn what a disk says while `where` is written, or anything is read, into a StorageError.

    safetensors reports a full disk or a missing permission as its own error type, with the operating system's number
    in the text.
    """
    try:
        yield
    except QuantizeError:
        raise
    except Exception as error:
        said = _said_by_disk(error, where)
        if said is None:
            raise
        raise StorageError(said) from error


OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "alloc_failed",
    "bad_alloc",
)
"""How torch's allocators, CUDA's libraries, the operating system and C++ say that memory ran out."""


@contextmanager
def memory_errors(work: str, advice: str) -> Iterator[None]:
    """Turn memory that runs out during some `work` into a DeviceError that gives `advice`."""
    try:
        yield
    except QuantizeError:
        raise
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        raise DeviceError(f"out of memory while {work}: {advice}") from error


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, OSError)) and any(words in str(error).lower() for words in OUT_OF_MEMORY)
    )


def _said_by_disk(error: Exception, where: object) -> str | None:
    """The line about an error of a disk, None for any other, such as one of the network."""
    number, place = _number(error), getattr(error, "filename", None)
    if number not in OF_A_DEVICE and (number not in OF_A_PATH or place is None):
        return None
    reason = "no space left" if number in NO_SPACE else "no permission" if number in NO_PERMISSION else None
    if reason and where is not None and (place is None or _one_holds_the_other(str(where), str(place))):
        return f"{reason} while writing {where}; nothing was left half done there"
    named = str(where if place is None else place)
    shown = named if len(named) <= LONGEST_PLACE else f"{named[:LONGEST_PLACE]}..."
    return f"{shown}: {reason or os.strerror(number).lower()}; correct that, and run the same command again"


def _one_holds_the_other(first: str, second: str) -> bool:
    return first.startswith(second) or second.startswith(first)


def _number(error: Exception) -> int:
    """The operating system's number of an error, 0 where it has none."""
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
        return error.errno or 0
    match = re.search(r"os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(match[1]) if match else 0
