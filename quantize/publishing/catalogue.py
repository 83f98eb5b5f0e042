"""The catalogue: a TOML list of the models that a scheduled job keeps up to date, checked as a whole."""

from __future__ import annotations

import difflib
import re
import textwrap
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize import methods
from quantize.errors import ConfigError
from quantize.options import SETTINGS, Kind, Text
from quantize.records import EvaluationSettings, Recipe

Problem = tuple[int, str]
"""The line that it stands in, and what is wrong there."""
Model = tuple[int, dict[str, Any]]
"""The line where it begins, and what is written there."""


@dataclass(frozen=True)
class Entry:
    """One model to keep published: `line` is where it begins, a source larger than `max_source_gb` is not touched."""

    line: int
    source: str
    target: str
    revision: str | None = None
    recipe: Recipe = field(default_factory=Recipe)
    settings: EvaluationSettings = field(default_factory=EvaluationSettings)
    private: bool = False
    allow_no_derivatives: bool = False
    max_source_gb: float | None = None


def read(path: Path) -> tuple[Entry, ...]:
    """The catalogue's entries in their order. Raises ConfigError, which names every problem with its line."""
    try:
        text = path.read_text("utf-8")
        content = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    top, *tables = _tables(text)
    models, problems = _checked(content, top, tables)
    if problems:
        lines = [f"{path}:{line}: {words}" for line, words in sorted(problems)]
        summary = [f"{path} has {len(lines)} problems:"] if len(lines) > 1 else []
        raise ConfigError("\n".join(summary + lines))
    return tuple(_entry(content.get("defaults", {}), model, line) for line, model in models)


# What a key may hold


@dataclass(frozen=True)
class Names:
    """A list of lines."""

    words: str = "a list of names"

    def accepts(self, value: object) -> bool:
        return isinstance(value, list) and all(map(Text().accepts, value))


Rule = Kind | Names
"""What a value has to be, in words and as a test."""
RULES: dict[str, Rule] = {
    option.catalogue_key: Names() if option.repeated else option.kind
    for option in methods.all_options()
    if option.catalogue_key
}
REQUIRED = {key: RULES[key] for key in ("source", "target")}
OPTIONAL = {key: rule for key, rule in RULES.items() if key not in REQUIRED}
OWN = ("revision", "private", "allow_no_derivatives", "max_source_gb")
"""Fields of an entry itself, neither of its recipe nor of its settings."""
TABLES = {"defaults": "[defaults]", "model": "[[model]]"}


# Where things stand, which tomllib does not tell


@dataclass(frozen=True)
class Table:
    """A part of the text that begins with a header: its name, its line, and the line of each key."""

    name: str
    line: int
    keys: dict[str, int]

    def line_of(self, key: str) -> int:
        """The line of a key; that of the header for a key that is written in an unusual form."""
        return self.keys.get(key, self.line)


TOKEN = re.compile(r"""\"{3}(?:\\.|[^\\])*?\"{3}|'{3}.*?'{3}|"(?:\\.|[^"\\\n])*"|'[^'\n]*'|#[^\n]*""", re.DOTALL)
HEADER = re.compile(r"\s*\[\[?\s*(?P<name>[^\[\]]+?)\s*\]\]?\s*(?:#.*)?$")
KEY = re.compile(r"""\s*(?P<quote>["']?)(?P<name>[^"'\s=.\[\]#]+)(?P=quote)\s*[=.]""")


def _tables(text: str) -> list[Table]:
    """What the text consists of; what stands above the first header comes first."""
    tables = [Table("", 1, {})]
    # a text of several lines may hold what looks like a key: only its line ends stay
    plain = TOKEN.sub(lambda token: "\n" * token[0].count("\n") or token[0], text)
    for number, line in enumerate(plain.split("\n"), start=1):
        if header := HEADER.match(line):
            tables.append(Table(header["name"].strip("\"'"), number, {}))
        elif key := KEY.match(line):
            tables[-1].keys.setdefault(key["name"], number)
    return tables


def _checked(content: dict[str, Any], top: Table, tables: list[Table]) -> tuple[list[Model], list[Problem]]:
    """The models as they are written, each with its line, and every problem of the catalogue."""

    def place(name: str) -> Table:
        return next((table for table in tables if table.name.split(".")[0] == name), Table(name, top.line_of(name), {}))

    problems = [(place(name).line, _unknown(name, TABLES.values())) for name in content.keys() - TABLES.keys()]
    defaults, models = content.get("defaults", {}), content.get("model", [])
    if isinstance(defaults, dict):
        problems += _problems(defaults, place("defaults"), OPTIONAL)
    else:
        problems.append((place("defaults").line, "[defaults] is one table, in single brackets"))
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
        return [], [*problems, (place("model").line, "each model is a table [[model]], in double brackets")]
    if not models:
        problems.append((1, "no model is listed: add [[model]] with its source and target"))

    places = [table for table in tables if table.name == "model"]
    if len(places) != len(models):  # they are written as one list
        places = [place("model")] * len(models)
    for model, where in zip(models, places, strict=True):
        problems += [(where.line, f"{key} is missing: {REQUIRED[key].words}") for key in REQUIRED if key not in model]
        problems += _problems(model, where, REQUIRED | OPTIONAL)
    problems += _clashes(models, places)
    return [(where.line, model) for model, where in zip(models, places, strict=True)], problems


def _problems(given: dict[str, Any], place: Table, rules: dict[str, Rule]) -> Iterator[Problem]:
    for key, value in given.items():
        if key not in rules:
            yield place.line_of(key), _unknown(key, rules)
        elif not rules[key].accepts(value):
            shown = str(value).lower() if isinstance(value, bool) else repr(value)
            yield place.line_of(key), f"{key} is {rules[key].words}, not {textwrap.shorten(shown, 120)}"


def _unknown(key: str, known: Iterable[str]) -> str:
    if key in REQUIRED | OPTIONAL:
        return f"{key} belongs below {'[[model]]' if key in REQUIRED else '[defaults] or [[model]]'}"
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown key {key!r}" + (f": is {near[0]} meant?" if near else "")


def _clashes(models: list[dict[str, Any]], places: list[Table]) -> Iterator[Problem]:
    """Targets that two entries share, or that are their own source; the Hub does not tell upper from lower case."""
    seen: dict[str, int] = {}
    for model, place in zip(models, places, strict=True):
        target, line = str(model.get("target")).lower(), place.line_of("target")
        if not REQUIRED["target"].accepts(target):
            continue
        if target == str(model.get("source")).lower():
            yield line, "target is the source itself"
        if target in seen:
            yield line, f"target {model['target']} is already that of line {seen[target]}"
        seen.setdefault(target, line)


def _entry(defaults: dict[str, Any], model: dict[str, Any], line: int) -> Entry:
    """A model, with the defaults for what it does not say, but for options that its recipe does not have."""
    recipe_name = (defaults | model).get("recipe", Recipe.name)
    foreign = {option.field for option in methods.options()} - {option.field for option in methods.options(recipe_name)}
    given = {key: value for key, value in defaults.items() if key not in foreign} | model
    frozen: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    recipe = {
        option.field: frozen[option.catalogue_key]
        for option in methods.recipe_options()
        if option.catalogue_key in frozen
    }
    settings = {option.field: frozen[option.catalogue_key] for option in SETTINGS if option.catalogue_key in frozen}
    return Entry(
        line=line,
        recipe=methods.recipe_of(recipe),
        settings=EvaluationSettings(**settings),
        **{key: frozen[key] for key in (*REQUIRED, *OWN) if key in frozen},
    )
