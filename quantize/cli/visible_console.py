"""A console on which text that others wrote is seen, and does nothing else: no colours, titles or lines of its own."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

from quantize.errors import printable


class VisibleConsole(Console):
    """Shows control characters, and those that turn the direction of writing, by their escapes."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.push_render_hook(_Escapes())

    def print(self, *objects: Any, **settings: Any) -> None:
        super().print(*(printable(item) if isinstance(item, str) else item for item in objects), **settings)


class _Escapes(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Escaped(renderable) for renderable in renderables]


class _Escaped:
    """What is laid out already; the line ends between its parts are the layout's."""

    def __init__(self, renderable: ConsoleRenderable) -> None:
        self.renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.renderable, options):
            yield segment if segment.control else Segment(_visible_lines(segment.text), segment.style)


def _visible_lines(text: str) -> str:
    return re.sub(r"[^\n]+", lambda match: printable(match[0]), text)
