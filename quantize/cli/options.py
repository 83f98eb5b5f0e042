"""What several commands have in common: options, and where results go."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantize import methods
from quantize.errors import ParityRefused, QuantizeError
from quantize.options import HUB_ID, SETTINGS, Choice, Flag, Number, Option, Whole
from quantize.publishing.records import Target
from quantize.records import EvaluationSettings
from quantize.serialization import to_json

if TYPE_CHECKING:
    from quantize.progress import Progress

FOLDER = click.Path(path_type=Path, file_okay=False)


class Output:
    """Where results go: tables for people on stderr, or one JSON document on stdout."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self.as_json, self.quiet = as_json, quiet
        if quiet or not sys.stderr.isatty():
            os.environ["TQDM_DISABLE"] = "1"  # the libraries' own bars, which would fill a log with fragments

    @functools.cached_property
    def progress(self) -> Progress:
        from quantize.cli.console import Terminal
        from quantize.progress import Silent

        return Silent() if self.quiet else Terminal()

    def show(self, record: object, *tables: Callable[[Any], None]) -> None:
        """Print a record as JSON, or as the tables that were made of it."""
        if self.as_json:
            click.echo(to_json(record), nl=False)
        elif not self.quiet:
            from quantize.cli.console import Terminal

            console = Terminal().console
            for table in tables:
                table(console)


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --json and --quiet, handed to the command as one `output`."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
    @click.option("--quiet", "-q", is_flag=True, help="No progress and no tables; errors still show.")
    @functools.wraps(command)
    def wrapped(as_json: bool, quiet: bool, **options: Any) -> Any:
        try:
            return command(output=Output(as_json, quiet), **options)
        except QuantizeError as error:
            if as_json and not isinstance(error, ParityRefused):
                click.echo(json.dumps({"error": str(error), "kind": type(error).__name__}))
            raise

    return wrapped


class Command(click.Command):
    """A command that takes the flags of earlier versions as well, and says what they are called now."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [self._current(argument) for argument in args])

    def _current(self, argument: str) -> str:
        flag, mark, value = argument.partition("=")
        for parameter in self.params:
            former = getattr(parameter, "former", ())
            if flag in former:
                click.echo(f"note: {flag} is called {parameter.opts[0]} now", err=True)
                return f"{parameter.opts[0]}{mark}{value}"
        return argument


class TableOption(click.Option):
    """click's form of a row of the table."""

    def __init__(self, *flags: Any, former: tuple[str, ...] = (), **attributes: Any) -> None:
        self.former = former
        super().__init__(*flags, **attributes)


class ChoiceOf(click.ParamType[Any]):
    """One of a few values; those of earlier versions are taken as well, with a note."""

    name = "choice"

    def __init__(self, option: Option) -> None:
        assert isinstance(option.kind, Choice)
        self.values = option.kind.values
        self.former = dict(option.former_values)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in self.former:
            click.echo(f"note: {value} is called {self.former[value]} now", err=True)
            return self.former[value]
        for allowed in self.values:
            if str(allowed) == str(value):
                return allowed
        self.fail(f"{value!r} is not {Choice(self.values).words}", param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"[{'|'.join(map(str, self.values))}]"


def from_table(option: Option) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The decorator that adds one row of the table to a command."""
    attributes: dict[str, Any] = {"help": option.help, "former": option.former, "cls": TableOption}
    match option.kind:
        case Flag():
            attributes |= {"is_flag": True, "default": option.default}
            if "/" in option.flag:
                attributes["show_default"] = True
        case _:
            attributes |= {"type": _click_type(option), "default": option.default, "show_default": not option.repeated}
            attributes |= {"metavar": getattr(option.kind, "metavar", None), "multiple": option.repeated}
    return click.option(option.flag, option.catalogue_key, **attributes)


def _click_type(option: Option) -> Any:
    match option.kind:
        case Choice():
            return ChoiceOf(option)
        case Whole(low, high):
            return click.IntRange(low, high)
        case Number(low):
            return click.FloatRange(low)
        case _:
            return str


def _with(options: Sequence[Option], command: Callable[..., Any]) -> Callable[..., Any]:
    return functools.reduce(lambda inner, option: from_table(option)(inner), reversed(options), command)


def evaluation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of EvaluationSettings, handed to the command as one `settings`."""

    @functools.wraps(command)
    def wrapped(**given: Any) -> Any:
        settings = EvaluationSettings(**{option.field: given.pop(option.catalogue_key) for option in SETTINGS})
        return command(settings=settings, **given)

    return _with(SETTINGS, wrapped)


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of Recipe and of all methods, handed to the command as one `recipe`."""
    options = methods.recipe_options()

    @functools.wraps(command)
    def wrapped(**given: Any) -> Any:
        return command(
            recipe=methods.recipe_of({option.field: given.pop(option.catalogue_key) for option in options}), **given
        )

    return _with(options, wrapped)


device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:1, xpu; auto takes a GPU when there is one.",
)
trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Allow code from the model's repo. Read it first."
)
against_option = click.option(
    "--against",
    metavar="MODEL",
    help="The original model: a Hub id or a folder. Needed where no record names it.",
)
template_option = click.option(
    "--card-template",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="A Jinja template for the card's text, in place of the default one.",
)


def publisher_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --publisher and --publisher-link, handed to the command as one `publisher`."""

    @click.option(
        "--publisher", "name", envvar="QUANTIZE_PUBLISHER", metavar="NAME", help="Who publishes, named on the card."
    )
    @click.option(
        "--publisher-link",
        "links",
        multiple=True,
        envvar="QUANTIZE_PUBLISHER_LINKS",
        metavar="LABEL=URL",
        help="A link of the publisher's. May be repeated.",
    )
    @functools.wraps(command)
    def wrapped(name: str | None, links: tuple[str, ...], **options: Any) -> Any:
        from quantize.publishing import publisher

        return command(publisher=publisher.chosen(name, links), **options)

    return wrapped


cache_option = click.option(
    "--reference-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Load the models one at a time and keep the original's answers in FILE, also for the next candidate.",
)


def repo_ids(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """A callback that refuses what is no Hub id, alone or in a tuple."""
    for one in value if isinstance(value, tuple) else (value,):
        if one is not None and not ("/" in one and HUB_ID.fullmatch(one)):
            raise click.BadParameter(f"{one!r} is no Hub id: write it as owner/name")
    return value


def target_options(flag: str, *, required: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds the options of Target under `flag`, handed to the command as `target` (None where not asked for).

    With it come `verify_download` and `dry_run`.
    """
    options = [
        click.option(
            flag,
            "repo_id",
            required=required,
            metavar="REPO",
            callback=repo_ids,
            help="Hub id to publish to; made when absent.",
        ),
        click.option("--private", is_flag=True, help="Make a new repo private."),
        click.option("--branch", metavar="NAME", help="Publish to this branch; made when absent."),
        click.option("--pr", "pull_request", is_flag=True, help="Open a pull request, or update the one that is open."),
        click.option("--tag", metavar="NAME", help="Also tag the commit."),
        click.option("--message", help="Commit message."),
        click.option("--prune", is_flag=True, help="Delete files of the repo that no package put there."),
        click.option(
            "--verify-download", is_flag=True, help="Fetch what was published again, load it and score a sample."
        ),
        click.option("--dry-run", is_flag=True, help="Say what would be done, and change nothing on the Hub."),
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def wrapped(repo_id: str | None, **given: Any) -> Any:
            names = ("private", "branch", "pull_request", "tag", "message", "prune")
            details = {name: given.pop(name) for name in names}
            if details["branch"] and details["pull_request"]:
                raise click.UsageError("--pr and --branch exclude each other")
            asked = [*details.values(), given["verify_download"], given["dry_run"]]
            if repo_id is None and any(asked):
                raise click.UsageError(f"options about publishing need {flag} REPO")
            return command(target=Target(repo_id, **details) if repo_id else None, **given)

        return functools.reduce(lambda inner, option: option(inner), reversed(options), wrapped)

    return decorate
