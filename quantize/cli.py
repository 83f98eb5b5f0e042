"""The command line: options, and the one place that turns known errors into an exit code."""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from quantize import __version__
from quantize.errors import ParityRefused, QuantizeError
from quantize.records import (
    COMPUTE_DTYPES,
    DEFAULT_MODEL,
    GRADES,
    QUANT_TYPES,
    ParitySettings,
    Recipe,
    to_json,
)

if TYPE_CHECKING:
    from quantize.progress import Progress
    from quantize.records import Publisher

INTERRUPTED = 130
ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    # Threads that wait for each other by spinning slow a shared machine down several times.
    "OMP_WAIT_POLICY": "passive",
}
FOLDER = click.Path(path_type=Path, file_okay=False)


class Output:
    """Where results go: tables for people on stderr, or one JSON document on stdout."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self.as_json, self.quiet = as_json, quiet
        if quiet or not sys.stderr.isatty():
            os.environ["TQDM_DISABLE"] = "1"  # the libraries' own bars, which would fill a log with fragments

    @functools.cached_property
    def progress(self) -> Progress:
        from quantize.console import Terminal
        from quantize.progress import Silent

        return Silent() if self.quiet else Terminal()

    def show(self, record: object, *tables: Callable[[Any], None]) -> None:
        """Print a record as JSON, or as the tables that were made of it."""
        if self.as_json:
            click.echo(to_json(record), nl=False)
        elif not self.quiet:
            from quantize.console import Terminal

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
        from quantize import publisher

        return command(publisher=publisher.chosen(name, links), **options)

    return wrapped


cache_option = click.option(
    "--reference-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Load the models one at a time and keep the original's answers in FILE, also for the next candidate.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="quantize")
def cli() -> None:
    """Make, prove, document and publish 4-bit checkpoints that people can trust.

    \b
    quantize run                       distilbert/distilgpt2 into ./distilgpt2-bnb-4bit
    quantize push distilgpt2-bnb-4bit --to you/distilgpt2-bnb-4bit

    Exit codes: 0 done or nothing to do, 1 a known failure, 2 wrong usage, 3 refused by parity.
    """


@cli.command()
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--revision", help="Branch, tag or commit of a Hub model; resolved once to a commit.")
@click.option("--output", "-o", "folder", type=FOLDER, help="The package; default: MODEL-bnb-4bit here.")
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
@device_option
@trust_option
@click.option("--force", is_flag=True, help="Replace a finished package.")
@cache_option
@template_option
@click.option(
    "--allow-no-derivatives", is_flag=True, help="Go on although the license forbids changed copies: you may do so."
)
@parity_options
@output_options
@publisher_options
def run(
    model: str,
    revision: str | None,
    folder: Path | None,
    bits: str,
    quant_type: str,
    double_quant: bool,
    compute_dtype: str,
    skip_modules: tuple[str, ...],
    device: str,
    trust_remote_code: bool,
    force: bool,
    reference_cache: Path | None,
    card_template: Path | None,
    allow_no_derivatives: bool,
    publisher: Publisher | None,
    settings: ParitySettings,
    output: Output,
) -> None:
    """Quantize MODEL, prove it against the original, write its card, leave a finished package.

    MODEL is a Hub id or a local folder.

    \b
    quantize run
    quantize run openai-community/gpt2 --revision main --require parity
    quantize run ./my-model --bits 8 --device cpu
    """
    from quantize import console, pipeline

    recipe = Recipe(
        bits=int(bits),
        quant_type=quant_type,
        double_quant=double_quant,
        compute_dtype=compute_dtype,
        skip_modules=skip_modules,
    )
    request = pipeline.RunRequest(
        model,
        revision,
        folder,
        recipe,
        settings,
        device,
        trust_remote_code,
        force,
        reference_cache,
        publisher,
        card_template,
        allow_no_derivatives,
    )
    result = pipeline.run(request, output.progress)
    made = result.package
    if not result.created:
        output.progress.note(f"{made.folder} is already finished: nothing to do (--force makes it again)")
    output.show(
        {"package": str(made.folder), "created": result.created, "parity": made.parity},
        lambda terminal: console.show_parity(terminal, made.parity),
        lambda terminal: console.show_package(terminal, made),
    )
    if not made.parity.verdict.passed:
        raise ParityRefused(f"{model} was refused: {made.parity.verdict.reasons[0]}; the evidence is in {made.folder}")


@cli.command()
@click.argument("checkpoint")
@against_option
@click.option("--figures", type=FOLDER, help="Write the figures into this folder.")
@device_option
@trust_option
@cache_option
@parity_options
@output_options
def verify(
    checkpoint: str,
    against: str | None,
    figures: Path | None,
    device: str,
    trust_remote_code: bool,
    reference_cache: Path | None,
    settings: ParitySettings,
    output: Output,
) -> None:
    """Measure a package again, or any bitsandbytes checkpoint --against its original.

    CHECKPOINT is a folder or a Hub repo, somebody else's as well.

    \b
    quantize verify distilgpt2-bnb-4bit
    quantize verify someone/gpt2-4bit --against openai-community/gpt2
    """
    from quantize import console, pipeline

    parity = pipeline.verify(checkpoint, against, settings, device, output.progress, trust_remote_code, reference_cache)
    if figures is not None:
        pipeline.draw_figures(parity, figures)
    output.show(parity, lambda terminal: console.show_parity(terminal, parity))
    if not parity.verdict.passed:
        raise ParityRefused(f"{checkpoint} was refused: {parity.verdict.reasons[0]}")


@cli.command()
@click.argument("folder", type=FOLDER)
@against_option
@template_option
@click.option("--facts", is_flag=True, help="Print as JSON what a template may name, and change nothing.")
@click.option("--preview", is_flag=True, help="Also show the card here.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Also write the card as a page.")
@output_options
@publisher_options
def card(
    folder: Path,
    against: str | None,
    card_template: Path | None,
    facts: bool,
    preview: bool,
    html: Path | None,
    publisher: Publisher | None,
    output: Output,
) -> None:
    """Render a package's card again from its evidence, without measuring.

    \b
    quantize card distilgpt2-bnb-4bit --preview
    quantize card distilgpt2-bnb-4bit --card-template my-card.md.j2 --html card.html
    """
    from quantize import console, pipeline

    if facts:
        click.echo(to_json(pipeline.card_names(folder, against, publisher)), nl=False)
        return
    made = pipeline.rewrite_card(folder, against, publisher, card_template)
    if html is not None:
        pipeline.write_page(made, html)
    output.show(
        {"card": str(made.folder / "README.md")},
        lambda terminal: console.show_card(terminal, made, preview),
    )


@cli.command()
@click.argument("folder", type=FOLDER)
@click.option("--to", "repo_id", required=True, metavar="REPO", help="Hub id to publish to; made when absent.")
@click.option("--private", is_flag=True, help="Make a new repo private.")
@click.option("--message", help="Commit message.")
@output_options
def push(folder: Path, repo_id: str, private: bool, message: str | None, output: Output) -> None:
    """Publish a package that passed and is unchanged since, in one commit.

    The token comes from HF_TOKEN or `hf auth login`.

    \b
    quantize push distilgpt2-bnb-4bit --to you/distilgpt2-bnb-4bit
    """
    from quantize import console, pipeline

    receipt = pipeline.push(folder, repo_id, private=private, message=message, progress=output.progress)
    output.show(receipt, lambda terminal: console.show_receipt(terminal, receipt))


@cli.command()
@output_options
def doctor(output: Output) -> None:
    """Show what this machine has: devices, backends, versions, token, disk.

    \b
    quantize doctor --json
    """
    from quantize import console, examination

    found = examination.examine()
    output.show(found, lambda terminal: console.show_examination(terminal, found))


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of every kernel that it falls back from
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        cli.main(arguments, prog_name="quantize", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted: nothing half done was left; run the same command again", err=True)
        sys.exit(INTERRUPTED)
    except QuantizeError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    sys.exit(0)
