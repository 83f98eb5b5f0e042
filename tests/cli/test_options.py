"""The table of options: the pages that list it, what may be typed, and what earlier versions called it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import pytest

from quantize import methods, pipeline
from quantize.cli.commands import cli
from quantize.options import COMMANDS, SYNC, Choice, Flag, Option
from quantize.publishing import catalogue
from tests.conftest import POCKET, Outcome

ROOT = Path(__file__).parents[2]
ROWS = methods.all_options()


# Tables in the docs


def described(row: Option) -> str:
    """The help text, with the values that may be given and the default."""
    words = [row.help]
    if isinstance(row.kind, Choice):
        values = (f"`{value}`{' (default)' * (value == row.default)}" for value in row.kind.values)
        words.append(f"{', '.join(values)}.")
    elif isinstance(row.kind, Flag):
        words += ["On by default."] if row.default else []
    elif row.default not in (None, ()):
        words.append(f"Default: `{row.default}`.")
    if row.repeated:
        words.append("May be repeated.")
    if row.envvar:
        words.append(f"Environment: `{row.envvar}`.")
    return " ".join(words)


def flags(row: Option) -> str:
    names = [*row.flag.split("/"), *([row.short] if row.short else [])]
    return ", ".join(f"`{name}`" for name in names)


def options_table(rows: Iterable[Option]) -> str:
    lines = ["| option | commands | meaning |", "|---|---|---|"]
    for row in rows:
        commands = "all" if row.commands == COMMANDS else ", ".join(row.commands)
        lines.append(f"| {flags(row)} | {commands} | {described(row)} |")
    return "\n".join(lines)


def command_table(rows: Iterable[Option]) -> str:
    lines = ["| option | meaning |", "|---|---|"]
    return "\n".join(lines + [f"| {flags(row)} | {described(row)} |" for row in rows])


def catalogue_table(rows: Iterable[Option]) -> str:
    lines = ["| key | value | meaning |", "|---|---|---|"]
    for row in sorted(rows, key=lambda row: row.catalogue_key not in catalogue.REQUIRED):
        assert row.catalogue_key is not None
        rule = catalogue.RULES[row.catalogue_key]
        lines.append(f"| `{row.catalogue_key}` | {rule.words} | {row.help} |")
    return "\n".join(lines)


TYPED = [row for row in ROWS if row.flag]
TABLES = [
    ("README.md", "options", options_table(TYPED)),
    ("docs/scheduled.md", "options", command_table(row for row in TYPED if SYNC in row.commands)),
    ("docs/scheduled.md", "keys", catalogue_table(row for row in ROWS if row.catalogue_key)),
]


@pytest.mark.parametrize(("name", "marker", "table"), TABLES)
def test_the_tables_are_in_the_docs(name: str, marker: str, table: str) -> None:
    """UPDATE_GOLDEN=1 writes them anew."""
    page, begin, end = ROOT / name, f"<!-- {marker} -->\n", f"<!-- end of {marker} -->"
    head, _, rest = page.read_text("utf-8").partition(begin)
    _, _, tail = rest.partition(end)
    text = f"{head}{begin}\n{table}\n\n{end}{tail}"
    if os.environ.get("UPDATE_GOLDEN"):
        page.write_text(text, "utf-8")
    assert page.read_text("utf-8") == text


# Rows and commands


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_its_rows_and_no_other_options(name: str) -> None:
    typed = {flag for row in TYPED if name in row.commands for flag in (*row.flag.split("/"), row.short) if flag}
    options = [parameter for parameter in cli.commands[name].params if isinstance(parameter, click.Option)]
    assert typed == {flag for option in options for flag in (*option.opts, *option.secondary_opts)}


def test_defaults_are_accepted() -> None:
    for row in ROWS:
        if row.default is not None:
            values = row.default if row.repeated else (row.default,)
            assert all(row.kind.accepts(value) for value in values), row.flag


def test_the_device_of_a_request_is_that_of_its_row() -> None:
    [row] = [row for row in ROWS if row.field == "device"]
    assert row.default == pipeline.RunRequest("m").device


# Names of earlier versions


class Stopped(Exception):
    """In place of the work that a command would do."""


@pytest.fixture
def request_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., pipeline.RunRequest]:
    """What `quantize run` with these arguments asks for, without any work."""
    requests: list[pipeline.RunRequest] = []

    def stop(request: pipeline.RunRequest, progress: object) -> None:
        requests.append(request)
        raise Stopped

    monkeypatch.setattr("quantize.pipeline.run", stop)

    def parse(*arguments: str) -> pipeline.RunRequest:
        with pytest.raises(Stopped):
            cli.main(["run", *arguments], standalone_mode=False)
        return requests.pop()

    return parse


@pytest.mark.parametrize(
    ("arguments", "note", "name", "value"),
    [
        (("--sweeps", "3"), "note: --sweeps is now called --passes\n", "recipe", {"passes": 3}),
        (("--sweeps=3",), "note: --sweeps is now called --passes\n", "recipe", {"passes": 3}),
        (("--conventions",), "note: --conventions is now called --standard-perplexities\n", "standard", True),
        (("--recipe", "stock"), "note: stock is now called rtn\n", "name", "rtn"),
        (("--recipe=stock",), "note: stock is now called rtn\n", "name", "rtn"),
        (("--passes", "3"), "", "recipe", {"passes": 3}),
        (("--revision", "--sweeps"), "", "revision", "--sweeps"),
        (("--revision=--sweeps",), "", "revision", "--sweeps"),
        (("--corpus", "stock"), "", "corpus", "stock"),
        (("--", "--sweeps"), "", "model", "--sweeps"),
        (("--", "stock"), "", "model", "stock"),
    ],
)
@pytest.mark.parametrize("display", [(), ("--json",), ("--quiet",), ("-q",)])
def test_names_of_earlier_versions(
    request_of: Callable[..., pipeline.RunRequest],
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    note: str,
    name: str,
    value: Any,
    display: tuple[str, ...],
) -> None:
    request = request_of(*display, *arguments)
    values = {
        "recipe": dict(request.recipe.options),
        "name": request.recipe.name,
        "standard": request.settings.standard_perplexities,
        "corpus": request.settings.corpus,
        "revision": request.revision,
        "model": request.model,
    }
    captured = capsys.readouterr()
    assert values[name] == value
    assert (captured.out, captured.err) == ("", note)


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--sweep", "3"),  # no beginning of a flag is taken for the whole
        ("run", "--pass", "3"),
        ("run", "--convention"),
        ("run", "-sweeps", "3"),
        ("verify", "x", "--sweeps", "3"),  # not an option of this command in earlier versions either
        ("doctor", "--conventions"),
    ],
)
def test_other_flags_stay_unknown(command: Callable[..., Outcome], arguments: tuple[str, ...]) -> None:
    outcome = command(*arguments)
    assert outcome.code == 2 and "No such option" in outcome.err and outcome.out == ""


def test_a_note_leaves_the_json_alone(command: Callable[..., Outcome]) -> None:
    outcome = command("verify", "./no-such-package", "--conventions", "--json", "--quiet")
    assert outcome.code == 1 and json.loads(outcome.out)["kind"] == "PackageError"
    assert outcome.err.startswith("note: --conventions is now called --standard-perplexities\nerror: ")


def test_an_option_of_another_recipe_is_wrong_usage(command: Callable[..., Outcome]) -> None:
    outcome = command("run", str(POCKET), "--recipe", "rtn", "--passes", "3")
    assert outcome.code == 2 and outcome.out == ""
    message = "Error: the recipe rtn has no --passes: leave it out, or choose another --recipe"
    assert outcome.err.splitlines()[-1] == message
