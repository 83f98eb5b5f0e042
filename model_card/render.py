"""Facts and a template become the text of README.md."""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
import traceback
from collections.abc import Callable
from typing import Any

import jinja2

from model_card import escape, licenses, metadata, source_card
from model_card.escape import Markdown
from model_card.facts import CardFacts, Interval
from model_card.quoting import quote

TEMPLATE = "card.md.j2"
FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")


class TemplateProblem(Exception):
    """A user's template that does not render; the message says where."""


def render(facts: CardFacts, template: str | None = None) -> str:
    """The whole card: YAML front matter, then the text that `template`, or the default one, makes of the facts.

    The source's own text is a value, never a template, and what the default template prints is escaped unless a filter
    made Markdown of it. Raises TemplateProblem for a `template` that does not render.
    """
    source = source_card.split(facts.source_card or "")
    values = _names(facts, source)
    text = _tidy(_default_template().render(values)) if template is None else _rendered(template, values).strip()
    return f"---\n{metadata.to_yaml(metadata.build(facts, source))}---\n\n{text}\n"


def parse(template: str) -> None:
    """Raise TemplateProblem where `template` is none, whatever the facts."""
    try:
        _environment().parse(template)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateProblem(f"line {error.lineno}: {error.message}") from error


def names(facts: CardFacts) -> dict[str, Any]:
    """Everything that a template may use: the facts, and what follows from the source's card."""
    return _names(facts, source_card.split(facts.source_card or ""))


@functools.cache
def _default_template() -> jinja2.Template:
    return _environment(finalize=escape.markdown).get_template(TEMPLATE)


def _rendered(template: str, values: dict[str, Any]) -> str:
    try:
        return _environment().from_string(template).render(values)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateProblem(f"line {error.lineno}: {error.message}") from error
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise TemplateProblem(f"line {_template_line(error)}: {error}") from error


def _names(facts: CardFacts, source: source_card.SourceCard) -> dict[str, Any]:
    base = f"{facts.hub}/{facts.source_repo_id}/{{kind}}/{facts.source_commit}" if facts.source_repo_id else None
    return {
        **{field.name: getattr(facts, field.name) for field in dataclasses.fields(facts)},
        "licenses": licenses.stated(source.metadata),
        "license_known": bool(licenses.stated(source.metadata)),
        "metadata_problem": source.problem,
        "original_emissions": _emissions(source.metadata.get("co2_eq_emissions")),
        "install": _install(facts),
        "original_text": Markdown(quote(source.body, base)) if source.body.strip() else None,
    }


def _template_line(error: Exception) -> int | None:
    """The line of a user's template in which rendering failed; Jinja puts it into the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == "<template>"), None)


def _install(facts: CardFacts) -> str:
    """The command that installs what the snippets import; pictures are opened by Pillow."""
    libraries = [f"{name}>={version}" for name, version in facts.least_versions.items()]
    return shlex.join(["pip", "install", *libraries, *(["pillow"] if facts.reads_pictures and facts.processor else [])])


def _emissions(stated: Any) -> str | None:
    """The training emissions that a card states, in one line: grams, or a mapping that has them."""
    amount = stated.get("emissions") if isinstance(stated, dict) else stated
    return f"{amount} g CO2eq" if amount and isinstance(amount, str | int | float) else None


def _tidy(text: str) -> str:
    """No empty lines in a row, except in code and in the source's quoted text."""
    head, mark, quoted = text.strip().partition("\n## Original model description:")
    lines: list[str] = []
    fence: str | None = None
    for line in head.splitlines():
        marker = FENCE.match(line)
        if marker and fence is None:
            fence = marker.group(1)
        elif marker and line.strip() == fence:
            fence = None
        if line.strip() or fence or (lines and lines[-1].strip()):
            lines.append(line)
    above = "\n".join(lines).rstrip()
    return f"{above}\n{mark}{quoted}" if mark else above


def _environment(finalize: Callable[[Any], Any] | None = None) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("model_card"),
        undefined=jinja2.StrictUndefined,
        finalize=finalize,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        interval=_interval,
        interval_in_nats=_interval_in_nats,
        percent=_percent,
        megabytes=_megabytes,
        nats=nats,
        count=_count,
        number=_number,
        cell=escape.markdown,
        code=escape.code,
        codes=escape.codes,
        fenced=escape.fenced,
        address=escape.address,
        python=escape.literal,
    )
    return environment


def _interval(estimate: Interval, digits: int = 4) -> str:
    return f"{estimate.low:.{digits}f} to {estimate.high:.{digits}f}"


def _interval_in_nats(estimate: Interval) -> str:
    return f"{nats(estimate.low)} to {nats(estimate.high)}"


def _percent(share: float, digits: int = 1) -> str:
    """So many decimals, or two digits where those would all be zeros."""
    percent = 100 * share
    return f"{percent:.2g} %" if 0 < percent < 10**-digits else f"{percent:.{digits}f} %"


def _megabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def nats(value: float) -> str:
    """Four decimals, or two digits where those would all be zeros."""
    return f"{value:.4f}" if value >= 0.001 or value == 0 else f"{value:.1e}"


def _number(value: float | None) -> str:
    return "no number" if value is None else f"{value:.4f}"


def _count(number: int) -> str:
    return f"{number:,}"
