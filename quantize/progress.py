"""How a stage reports its progress: the protocol, and an implementation that shows nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]


def ignore(amount: int) -> None:
    """An `Advance` that shows nothing."""


class Progress(Protocol):
    """Shows which stage runs and how far it is; quantize/cli implements it for the terminal."""

    def stage(self, title: str) -> None:
        """A new stage begins."""

    def note(self, text: str) -> None:
        """A note for the user."""

    def task(self, title: str, total: int, unit: str = "") -> AbstractContextManager[Advance]:
        """A task of `total` units; call the yielded function with the units done since the last call."""


class Silent:
    """Progress that shows nothing."""

    def stage(self, title: str) -> None: ...

    def note(self, text: str) -> None: ...

    @contextmanager
    def task(self, title: str, total: int, unit: str = "") -> Iterator[Advance]:
        yield lambda amount: None
