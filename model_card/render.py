"""Facts and the default template become the text of README.md."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jinja2
import yaml

from model_card import metadata, source_card
from model_card.facts import CardFacts, Interval

TEMPLATE = "card.md.j2"


def render(facts: CardFacts) -> str:
    """The whole card: YAML front matter, own sections, the source's text quoted below."""
    front, body = source_card.split(facts.source_card or "")
    header = metadata.build(facts, front)
    base = f"{facts.hub}/{facts.source_repo_id}/{{kind}}/{facts.source_commit}" if facts.source_repo_id else None
    text = (
        _environment()
        .get_template(TEMPLATE)
        .render(
            **{field.name: getattr(facts, field.name) for field in dataclasses.fields(facts)},
            license_known=bool(front.get("license")),
            original_text=source_card.quote(body, base) if body.strip() else None,
        )
    )
    return f"---\n{_yaml(header)}---\n\n{text.strip()}\n"


def _yaml(header: dict[str, Any]) -> str:
    return yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=10_000)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("model_card"),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        interval=_interval, percent=_percent, megabytes=_megabytes, fenced=_fenced, cell=_cell, count=_count
    )
    return environment


def _interval(estimate: Interval, digits: int = 4) -> str:
    return f"{estimate.low:.{digits}f} to {estimate.high:.{digits}f}"


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def _megabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _count(number: int) -> str:
    return f"{number:,}"


def _fenced(text: str, language: str = "text") -> str:
    """A code block that no run of backticks in `text` can close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _cell(text: str) -> str:
    """Text that cannot break out of a table cell."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
