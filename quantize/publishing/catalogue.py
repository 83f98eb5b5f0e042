"""The catalogue: a TOML list of the models that a scheduled job keeps up to date, checked as a whole."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize import documents, methods
from quantize.errors import ConfigError
from quantize.options import SETTINGS, Kind, Option, Text
from quantize.publishing.toml_lines import Table, tables_of
from quantize.records import EvaluationSettings, Recipe

Remark = tuple[int, str]
"""A line, and what is wrong with it, or is called otherwise now."""
Keys = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One model to keep published: `line` is where it begins, a source larger than `max_source_gb` is not touched."""

    line: int
    source: str
    repo: str
    revision: str | None = None
    recipe: Recipe = field(default_factory=Recipe)
    settings: EvaluationSettings = field(default_factory=EvaluationSettings)
    private: bool = False
    public: bool = False
    allow_no_derivatives: bool = False
    max_source_gb: float | None = None


@dataclass(frozen=True)
class Catalogue:
    """The entries in their order, and a note about each former name of a key or a value that was used."""

    entries: tuple[Entry, ...]
    notes: tuple[str, ...]


def read(path: Path) -> Catalogue:
    """The catalogue. Raises ConfigError, which names every problem with its line."""
    try:
        content, text = documents.read_toml(path, path, ConfigError)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    checked = _checked(content, *tables_of(text))
    if checked.problems:
        lines = [f"{path}:{line}: {words}" for line, words in sorted(checked.problems)]
        summary = [f"{path} has {len(lines)} problems:"] if len(lines) > 1 else []
        raise ConfigError(*summary, *lines)
    entries = tuple(_entry(checked.defaults.content, model.content, model.line) for model in checked.models)
    first = {words: line for line, words in sorted(checked.notes, reverse=True)}
    notes = (f"note: {path}:{line}: {words}" for words, line in sorted(first.items(), key=lambda item: item[1]))
    return Catalogue(entries, tuple(notes))


# What a key may hold


@dataclass(frozen=True)
class Names:
    """A list of names."""

    words: str = "a list of names"

    def accepts(self, value: object) -> bool:
        return isinstance(value, list) and all(map(Text().accepts, value))


Rule = Kind | Names
"""What a value has to be, in words and as a test."""
OPTIONS = {option.catalogue_key: option for option in methods.all_options() if option.catalogue_key}
RULES: dict[str, Rule] = {key: Names() if option.repeated else option.kind for key, option in OPTIONS.items()}
REQUIRED = {key: RULES[key] for key in ("source", "repo")}
OPTIONAL = {key: rule for key, rule in RULES.items() if key not in REQUIRED}
OWN = ("revision", "private", "public", "allow_no_derivatives", "max_source_gb")
"""Fields of an entry itself, neither of its recipe nor of its settings."""
FORMER_KEYS = {former: key for key, option in OPTIONS.items() for former in option.former_keys}
FORMER_VALUES = {key: dict(option.former_values) for key, option in OPTIONS.items()}
TABLES = {"defaults": "[defaults]", "model": "[[model]]"}


# Checking


@dataclass(frozen=True)
class Written:
    """The keys of one table, and where they are written."""

    content: Keys
    table: Table

    @property
    def line(self) -> int:
        return self.table.line


@dataclass
class Checked:
    """What a catalogue says, under the present names; every problem, and a note about every former name."""

    defaults: Written
    models: list[Written] = field(default_factory=list)
    problems: list[Remark] = field(default_factory=list)
    notes: list[Remark] = field(default_factory=list)

    def current(self, keys: Keys, table: Table) -> Written:
        """A table under the present names of its keys and values."""
        renamed: Keys = {}
        for key, value in keys.items():
            name, line = FORMER_KEYS.get(key, key), table.line_of(key)
            if name != key and name in keys:
                self.problems.append((line, f"{key} is called {name} now, which is given as well: leave {key} out"))
                continue
            if name != key:
                self.notes.append((line, f"{key} is called {name} now"))
            word = FORMER_VALUES.get(name, {}).get(value) if isinstance(value, str) else None
            if word is not None:
                self.notes.append((line, f"{value} is called {word} now"))
            renamed[name] = value if word is None else word
        lines = {FORMER_KEYS.get(key, key): line for key, line in table.keys.items()}
        return Written(renamed, Table(table.name, table.line, lines))


def _checked(content: Keys, top: Table, *tables: Table) -> Checked:
    """The tables of a catalogue with all remarks about them."""

    def table_of(name: str) -> Table:
        return next((table for table in tables if table.name.split(".")[0] == name), Table(name, top.line_of(name), {}))

    checked = Checked(Written({}, table_of("defaults")))
    problems = checked.problems
    problems += [(table_of(name).line, _unknown(name, TABLES.values())) for name in content.keys() - TABLES.keys()]
    defaults, models = content.get("defaults", {}), content.get("model", [])
    if isinstance(defaults, dict):
        checked.defaults = checked.current(defaults, table_of("defaults"))
        problems += _problems(checked.defaults, OPTIONAL)
    else:
        problems.append((table_of("defaults").line, "[defaults] is one table, in single brackets"))
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
        problems.append((table_of("model").line, "each model is a table [[model]], in double brackets"))
        return checked
    if not models:
        problems.append((1, "no model is listed: add [[model]] with its source and repo"))

    headers = [table for table in tables if table.name == "model"]
    if len(headers) != len(models):  # they are written as one list
        headers = [table_of("model")] * len(models)
    checked.models = [checked.current(model, table) for model, table in zip(models, headers, strict=True)]
    for model in checked.models:
        missing = REQUIRED.keys() - model.content.keys()
        problems += [(model.line, f"{key} is missing: {REQUIRED[key].words}") for key in REQUIRED if key in missing]
        problems += _problems(model, REQUIRED | OPTIONAL)
        problems += _foreign_options(model, checked.defaults.content)
        if all((checked.defaults.content | model.content).get(key) is True for key in ("private", "public")):
            problems.append((model.line, "private and public exclude each other: set one of them to false"))
    problems += _clashes(checked.models)
    return checked


def _problems(written: Written, rules: dict[str, Rule]) -> Iterator[Remark]:
    for key, value in written.content.items():
        if key not in rules:
            yield written.table.line_of(key), _unknown(key, rules)
        elif not rules[key].accepts(value):
            shown = str(value).lower() if isinstance(value, bool) else repr(value)
            yield written.table.line_of(key), f"{key} is {rules[key].words}, not {textwrap.shorten(shown, 120)}"


def _foreign_options(model: Written, defaults: Keys) -> Iterator[Remark]:
    """Options that a model gives to a recipe that does not have them."""
    name = (defaults | model.content).get("recipe", Recipe.name)
    if not OPTIONAL["recipe"].accepts(name):
        return
    for key, option in _options_besides(name).items():
        if model.content.get(key, option.default) != option.default:
            yield model.table.line_of(key), f"the recipe {name} has no {key}: leave it out, or choose another recipe"


def _options_besides(name: str) -> dict[str, Option]:
    """By their keys, the options that only other recipes than this one have."""
    others = set(methods.options()) - set(methods.options(name))
    return {key: option for key, option in OPTIONS.items() if option in others}


def _unknown(key: str, known: Iterable[str]) -> str:
    if key in REQUIRED | OPTIONAL:
        return f"{key} belongs below {'[[model]]' if key in REQUIRED else '[defaults] or [[model]]'}"
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown key {key!r}" + (f": is {near[0]} meant?" if near else "")


def _clashes(models: list[Written]) -> Iterator[Remark]:
    """Repos that two entries share, or that are their own source; the Hub does not tell upper from lower case."""
    first: dict[str, int] = {}
    for model in models:
        repo, line = str(model.content.get("repo")).lower(), model.table.line_of("repo")
        if not REQUIRED["repo"].accepts(repo):
            continue
        if repo == str(model.content.get("source")).lower():
            yield line, "repo is the source itself"
        if repo in first:
            yield line, f"repo {model.content['repo']} is already that of line {first[repo]}"
        first.setdefault(repo, line)


def _entry(defaults: Keys, model: Keys, line: int) -> Entry:
    """A model, with the defaults for what it does not say, but for options that its recipe does not have."""
    foreign = _options_besides((defaults | model).get("recipe", Recipe.name))
    given = {key: value for key, value in defaults.items() if key not in foreign} | model
    frozen: Keys = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
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
