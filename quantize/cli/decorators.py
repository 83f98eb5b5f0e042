"""The rows of the table as click's options, and what was typed as records."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from quantize import methods
from quantize.cli.display import Display
from quantize.errors import ConfigError, storage_errors
from quantize.options import (
    DESTINATION,
    DISPLAY,
    HUB,
    PUBLISHER,
    SETTINGS,
    Choice,
    File,
    Flag,
    Folder,
    HubId,
    Number,
    Option,
    Positive,
    Whole,
)
from quantize.publishing import Destination
from quantize.records import EvaluationSettings, Publisher, Recipe

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)

Values = dict[Option, Any]


def options_of(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds all options of a command, and hands them over by the names of their fields.

    Those that fill a record are handed over as that: `recipe`, `settings`, `destination` (None where nothing is to be
    published), `publisher` and `display`.
    """
    rows = _rows(name)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(**typed: Any) -> Any:
            values = {row: typed.pop(_parameter(row)) for row in rows}
            display = Display(**_taken(values, DISPLAY))
            with display.errors(), storage_errors():
                _set_patience(**_taken(values, HUB))
                return function(**typed, **_records(values), display=display)

        command: Callable[..., Any] = wrapped
        for row in reversed(rows):
            command = _decorator(row)(command)
        return command

    return decorate


def former_flags(command: str) -> dict[str, Any]:
    """The setting by which click takes the flags of earlier versions as well, with a note."""
    current = {former: row.flag for row in _rows(command) for former in row.former}

    def normalize(name: str) -> str:
        flag = current.get(f"--{name}")
        if flag is None:
            return name
        click.echo(f"note: --{name} is now called {flag}", err=True)
        return flag.removeprefix("--")

    return {"token_normalize_func": normalize}


def _rows(command: str) -> list[Option]:
    return [row for row in methods.all_options() if row.flag and command in row.commands]


def _parameter(row: Option) -> str:
    """The name by which click knows an option, which no other option of the command has."""
    return row.flag.partition("/")[0].removeprefix("--").replace("-", "_")


# From what was typed to records


def _taken(values: Values, rows: tuple[Option, ...]) -> dict[str, Any]:
    """The values of these rows by field, which are not left in `values`."""
    return {row.field: values.pop(row) for row in rows if row in values}


def _records(values: Values) -> dict[str, Any]:
    records: dict[str, Any] = {}
    if recipe := _taken(values, methods.recipe_options()):
        records["recipe"] = _recipe(recipe)
    if settings := _taken(values, SETTINGS):
        records["settings"] = EvaluationSettings(**settings)
    if publisher := _taken(values, PUBLISHER):
        records["publisher"] = _publisher(**publisher)
    others = {row.field: value for row, value in values.items() if row not in DESTINATION}
    if destination := _taken(values, DESTINATION):
        records["destination"] = _destination(destination, others)
    return records | others


def _set_patience(seconds: float | None = None) -> None:
    """Tell the Hub's client, where a command asks the Hub."""
    if seconds is not None:
        from quantize.hub.retries import wait_at_most

        wait_at_most(seconds)


def _recipe(values: dict[str, Any]) -> Recipe:
    try:
        return methods.recipe_of(values)
    except ConfigError as error:
        raise click.UsageError(str(error)) from error


def _publisher(name: str | None, links: tuple[str, ...]) -> Publisher | None:
    from quantize.publishing import publisher

    return publisher.chosen(name, links)


def _destination(values: dict[str, Any], others: dict[str, Any]) -> Destination | None:
    if values["branch"] and values["pull_request"]:
        raise click.UsageError("--pr and --branch exclude each other")
    if values["private"] and values["public"]:
        raise click.UsageError("--private and --public exclude each other")
    if values["repo_id"] is not None:
        return Destination(**values)
    if others.get("refresh_card"):
        raise click.UsageError("--refresh-card needs --push-to REPO")
    if any(values.values()) or others["verify_download"] or others["dry_run"]:
        raise click.UsageError("options about publishing need --push-to REPO")
    return None


# From rows to click's options


def _decorator(row: Option) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The decorator that adds one row to a command."""
    flags = [row.flag, row.short] if row.short else [row.flag]
    attributes: dict[str, Any] = {"help": row.help, "required": row.required}
    if row.default is not None:
        attributes["default"] = row.default
    if row.envvar:
        attributes |= {"envvar": row.envvar, "show_envvar": True}
    if isinstance(row.kind, Flag):
        attributes |= {"is_flag": True, "show_default": "/" in row.flag}
    else:
        attributes |= {"type": _type(row), "metavar": row.kind.metavar}
        attributes |= {"show_default": row.default not in (None, ()), "multiple": row.repeated}
    if row.repeated:
        attributes["help"] += " May be repeated."
    return click.option(*flags, _parameter(row), **attributes)


def _type(row: Option) -> Any:
    match row.kind:
        case Choice():
            return ChoiceOf(row)
        case Whole(low, high):
            return click.IntRange(low, high)
        case Number(low):
            return click.FloatRange(low)
        case Positive():
            return click.FloatRange(0, min_open=True)
        case HubId():
            return RepoId()
        case File():
            return FILE
        case Folder():
            return FOLDER
        case _:
            return str


class ChoiceOf(click.ParamType[Any]):
    """One of a few values; those of earlier versions are taken as well, with a note."""

    name = "choice"

    def __init__(self, row: Option) -> None:
        assert isinstance(row.kind, Choice)
        self.kind = row.kind
        self.former = dict(row.former_values)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in self.former:
            click.echo(f"note: {value} is now called {self.former[value]}", err=True)
            return self.former[value]
        for allowed in self.kind.values:
            if str(allowed) == str(value):
                return allowed
        self.fail(f"{value!r} is not {self.kind.words}", param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"[{'|'.join(map(str, self.kind.values))}]"


class RepoId(click.ParamType[str]):
    """The id of a repo on the Hub, with its owner."""

    name = "repo"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if HubId(with_owner=True).accepts(value):
            return str(value)
        self.fail(f"{value!r} is not a Hub id: write it as owner/name", param, ctx)
