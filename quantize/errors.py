"""The known ways to fail, each with its exit code.

    QuantizeError                 exit 1: one readable line that says what to do
    ├── SourceError               the model that was asked for
    │   ├── SourceNotFound        no such model, revision or folder
    │   ├── AccessDenied          gated or private, or the token has no rights
    │   ├── UnsupportedModel      pickle only, already quantized, not causal, remote code ...
    │   └── CorruptModel          truncated or damaged files, NaN weights
    ├── HubUnreachable            no network, or the Hub answers with errors
    ├── ConfigError               the config file, the catalogue, or options about the publisher or the card
    ├── CorpusError               the text to measure on
    ├── DeviceError               the device that was asked for, or its memory
    ├── StorageError              no space, no permission
    ├── PackageError              an output folder or a package that is not what it should be
    │   └── NewerFormat           a package of a later version of quantize
    ├── PublishError              the upload
    │   └── Conflict              somebody else committed meanwhile
    └── ParityRefused             exit 3: the package was made and measured, and did not pass

Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class QuantizeError(Exception):
    exit_code = 1


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


@contextmanager
def storage_errors(where: object) -> Iterator[None]:
    """Turn a full disk or a missing permission met while writing to `where` into a StorageError.

    safetensors reports the same conditions as its own error type with the operating system's number in the text.
    """
    try:
        yield
    except QuantizeError:
        raise
    except Exception as error:
        reason = _storage_reason(error)
        if reason is None:
            raise
        raise StorageError(f"{reason} while writing {where}; nothing was left half done there") from error


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


def _storage_reason(error: Exception) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    text = str(error) if type(error).__name__ == "SafetensorError" else ""
    if number in NO_SPACE or any(f"os error {code})" in text for code in NO_SPACE):
        return "no space left"
    if number in NO_PERMISSION or any(f"os error {code})" in text for code in NO_PERMISSION):
        return "no permission"
    return None
