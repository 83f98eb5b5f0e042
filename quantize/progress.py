"""How a stage tells that it is working: the protocol, and the one that says nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]


def ignore(amount: int) -> None:
    """An `Advance` that nobody watches."""


class Progress(Protocol):
    """Shows which stage runs and how far it is; the console has the visible one."""

    def stage(self, title: str) -> None:
        """A new stage begins."""

    def note(self, text: str) -> None:
        """Something that the person at the terminal should know."""

    def task(self, title: str, total: int, unit: str = "") -> AbstractContextManager[Advance]:
        """A countable piece of work; call the yielded function with the amount that was done."""


class Silent:
    """Progress that shows nothing."""

    def stage(self, title: str) -> None: ...

    def note(self, text: str) -> None: ...

    @contextmanager
    def task(self, title: str, total: int, unit: str = "") -> Iterator[Advance]:
        yield lambda amount: None
