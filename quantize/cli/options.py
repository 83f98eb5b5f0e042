"""What several commands have in common: options, and where results go."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantize.errors import ParityRefused, QuantizeError
from quantize.records import (
    COMPUTE_DTYPES,
    GRADES,
    HUB_ID,
    QUANT_TYPES,
    RECIPES,
    ParitySettings,
    Recipe,
    Target,
    to_json,
)

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


def parity_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of ParitySettings, handed to the command as one `settings`."""
    options = [
        click.option(
            "--corpus", default=ParitySettings.corpus, show_default=True, help="'builtin', 'wikitext-2' or a text file."
        ),
        click.option(
            "--window",
            type=click.IntRange(16),
            default=ParitySettings.window,
            show_default=True,
            help="Tokens per window, at most the model's context.",
        ),
        click.option(
            "--max-windows",
            type=click.IntRange(8),
            default=ParitySettings.max_windows,
            show_default=True,
            help="Score at most this many windows.",
        ),
        click.option(
            "--new-tokens",
            type=click.IntRange(1),
            default=ParitySettings.new_tokens,
            show_default=True,
            help="Tokens generated per prompt.",
        ),
        click.option("--full", is_flag=True, help="Score every window, even when the verdict is certain before."),
        click.option(
            "--controls", is_flag=True, help="Measure the float16 source, int8 and stock NF4 in the same run."
        ),
        click.option(
            "--conventions",
            is_flag=True,
            help="Also state both perplexities as papers do: sliding window, and lm-evaluation-harness.",
        ),
        click.option(
            "--seed",
            type=click.IntRange(0, 2**32 - 1),
            default=ParitySettings.seed,
            show_default=True,
            help="For all randomness.",
        ),
        click.option(
            "--require",
            type=click.Choice(GRADES[:-1]),
            default=ParitySettings.require,
            show_default=True,
            help="The grade that a package must reach.",
        ),
    ]

    @functools.wraps(command)
    def wrapped(**given: Any) -> Any:
        names = ("corpus", "window", "max_windows", "new_tokens", "seed", "full", "controls", "conventions", "require")
        return command(settings=ParitySettings(**{name: given.pop(name) for name in names}), **given)

    return functools.reduce(lambda inner, option: option(inner), reversed(options), wrapped)


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


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of Recipe, handed to the command as one `recipe`."""

    @click.option(
        "--recipe",
        "recipe_name",
        type=click.Choice(RECIPES),
        default=Recipe.name,
        show_default=True,
        help="stock rounds to nearest, calibrated changes outputs least, auto goes on until --target is reached.",
    )
    @click.option(
        "--target",
        "target_grade",
        type=click.Choice(GRADES[:-1]),
        default=Recipe.target_grade,
        show_default=True,
        help="The grade at which auto stops looking for a better recipe.",
    )
    @click.option("--bits", type=click.Choice(["4", "8"]), default=str(Recipe.bits), show_default=True)
    @click.option("--quant-type", type=click.Choice(QUANT_TYPES), default=Recipe.quant_type, show_default=True)
    @click.option(
        "--double-quant/--no-double-quant",
        default=Recipe.double_quant,
        show_default=True,
        help="Quantize scales again.",
    )
    @click.option(
        "--compute-dtype",
        type=click.Choice(COMPUTE_DTYPES),
        default=Recipe.compute_dtype,
        show_default=True,
        help="Type of products and of what is not quantized; auto keeps the source's half precision.",
    )
    @click.option("--skip-modules", multiple=True, metavar="NAME", help="Leave this module as it is. May be repeated.")
    @click.option(
        "--size-budget",
        type=click.FloatRange(1),
        default=Recipe.size_budget,
        show_default=True,
        help="Times the bytes of plain 4-bit weights that calibrated may use for smaller blocks and half precision.",
    )
    @click.option(
        "--sweeps",
        type=click.IntRange(0),
        default=Recipe.sweeps,
        show_default=True,
        help="How often calibrated goes over a matrix after the first pass.",
    )
    @click.option(
        "--epochs",
        type=click.IntRange(0),
        default=Recipe.epochs,
        show_default=True,
        help="How often calibrated reads its text while it learns rounding, block by block.",
    )
    @click.option(
        "--calibration",
        metavar="TEXT",
        default=Recipe.calibration,
        show_default=True,
        help="self: what the source writes itself; or a text file, or owner/name:path in a Hub data set.",
    )
    @click.option(
        "--calibration-windows",
        type=click.IntRange(8),
        default=Recipe.calibration_windows,
        show_default=True,
        help="Windows of calibration text.",
    )
    @click.option(
        "--calibration-length",
        type=click.IntRange(16),
        default=Recipe.calibration_length,
        show_default=True,
        help="Tokens in each, at most the model's context.",
    )
    @click.option(
        "--calibration-seed",
        type=click.IntRange(0, 2**32 - 1),
        default=Recipe.calibration_seed,
        show_default=True,
        help="For calibration text and gradients.",
    )
    @functools.wraps(command)
    def wrapped(bits: str, recipe_name: str, **given: Any) -> Any:
        names = {item.name for item in fields(Recipe)} - {"name", "bits"}
        details = {name: given.pop(name) for name in names}
        return command(recipe=Recipe(name=recipe_name, bits=int(bits), **details), **given)

    return wrapped


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
