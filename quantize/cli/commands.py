"""The command line: options, and the one place that turns known errors into an exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from quantize import __version__, publishing
from quantize.cli.options import (
    FOLDER,
    Command,
    Output,
    against_option,
    cache_option,
    device_option,
    evaluation_options,
    output_options,
    publisher_options,
    recipe_options,
    repo_ids,
    target_options,
    template_option,
    trust_option,
)
from quantize.errors import ParityRefused, QuantizeError
from quantize.files import CARD
from quantize.grades import UNMEASURED
from quantize.options import DEFAULT_MODEL
from quantize.publishing import Destination, PublishRequest, SyncRequest
from quantize.records import EvaluationSettings, Recipe
from quantize.serialization import to_json

if TYPE_CHECKING:
    from quantize.pipeline import RunRequest
    from quantize.records import Publisher

INTERRUPTED = 130
ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    # Threads that wait for each other by spinning slow a shared machine down several times.
    "OMP_WAIT_POLICY": "passive",
}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="quantize")
def cli() -> None:
    """Make, prove, document and publish 4-bit checkpoints that people can trust.

    \b
    quantize run                       distilbert/distilgpt2 into ./distilgpt2-bnb-4bit
    quantize push distilgpt2-bnb-4bit --to you/distilgpt2-bnb-4bit

    Exit codes: 0 done or nothing to do, 1 a known failure, 2 wrong usage, 3 refused by parity.
    """


@cli.command(cls=Command)
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--revision", help="Branch, tag or commit of a Hub model; resolved once to a commit.")
@click.option("--output", "-o", "folder", type=FOLDER, help="The package; default: MODEL-bnb-4bit here.")
@recipe_options
@device_option
@trust_option
@click.option("--force", is_flag=True, help="Replace a finished package.")
@click.option(
    "--unverified", is_flag=True, help="Measure nothing, say so on the card, and never publish: for what fits nowhere."
)
@cache_option
@template_option
@click.option(
    "--allow-no-derivatives", is_flag=True, help="Go on although the license forbids changed copies: you may do so."
)
@target_options("--push-to", required=False)
@click.option("--refresh-card", is_flag=True, help="With --push-to: render a published card again, and push it alone.")
@evaluation_options
@output_options
@publisher_options
def run(
    model: str,
    revision: str | None,
    folder: Path | None,
    recipe: Recipe,
    device: str,
    trust_remote_code: bool,
    force: bool,
    unverified: bool,
    reference_cache: Path | None,
    card_template: Path | None,
    allow_no_derivatives: bool,
    destination: Destination | None,
    verify_download: bool,
    dry_run: bool,
    refresh_card: bool,
    publisher: Publisher | None,
    settings: EvaluationSettings,
    output: Output,
) -> None:
    """Quantize MODEL, prove it against the original, write its card, leave a finished package.

    MODEL is a Hub id or a local folder.

    \b
    quantize run
    quantize run openai-community/gpt2 --revision main --require parity
    quantize run ./my-model --bits 8 --device cpu
    quantize run distilbert/distilgpt2 --push-to you/distilgpt2-bnb-4bit
    """
    from quantize import pipeline

    if refresh_card and destination is None:
        raise click.UsageError("--refresh-card needs --push-to REPO")
    if unverified and destination is not None:
        raise click.UsageError("--unverified and --push-to exclude each other: what is published has been measured")
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
        unverified=unverified,
    )
    if destination is None:
        _run(request, output)
    else:
        _deliver(PublishRequest(request, destination, refresh_card, verify_download, dry_run), output)


def _run(request: RunRequest, output: Output) -> None:
    from quantize import pipeline
    from quantize.cli import console

    result = pipeline.run(request, output.progress)
    made = result.package
    if not result.created:
        output.progress.note(f"{made.folder} is already finished: nothing to do (--force makes it again)")
    output.show(
        {"package": str(made.folder), "created": result.created, "parity": made.evidence},
        lambda terminal: console.show_parity(terminal, made.evidence),
        lambda terminal: console.show_package(terminal, made),
    )
    if not made.evidence.verdict.passed and made.evidence.verdict.grade != UNMEASURED:
        reason = made.evidence.verdict.reasons[0]
        raise ParityRefused(f"{request.model} was refused: {reason}; the evidence is in {made.folder}")


def _deliver(request: PublishRequest, output: Output) -> None:
    from quantize.cli import console

    delivery = publishing.deliver(request, output.progress)
    output.show(delivery.summary(), lambda terminal: console.show_delivery(terminal, delivery))


@cli.command(cls=Command)
@click.argument("checkpoint")
@against_option
@click.option("--figures", type=FOLDER, help="Write the figures into this folder.")
@device_option
@trust_option
@cache_option
@evaluation_options
@output_options
def verify(
    checkpoint: str,
    against: str | None,
    figures: Path | None,
    device: str,
    trust_remote_code: bool,
    reference_cache: Path | None,
    settings: EvaluationSettings,
    output: Output,
) -> None:
    """Measure a package again, or any bitsandbytes checkpoint --against its original.

    CHECKPOINT is a folder or a Hub repo, somebody else's as well.

    \b
    quantize verify distilgpt2-bnb-4bit
    quantize verify someone/gpt2-4bit --against openai-community/gpt2
    """
    from quantize import pipeline
    from quantize.cli import console

    request = pipeline.VerifyRequest(checkpoint, against, settings, device, trust_remote_code, reference_cache)
    evidence = pipeline.verify(request, output.progress)
    if figures is not None:
        pipeline.draw_figures(evidence, figures)
    output.show(evidence, lambda terminal: console.show_parity(terminal, evidence))
    if not evidence.verdict.passed:
        raise ParityRefused(f"{checkpoint} was refused: {evidence.verdict.reasons[0]}")


@cli.command(cls=Command)
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
    from quantize import pipeline
    from quantize.cli import console

    request = pipeline.CardRequest(folder, against, publisher, card_template)
    if facts:
        click.echo(to_json(pipeline.card_names(request)), nl=False)
        return
    made = pipeline.rewrite_card(request)
    if html is not None:
        pipeline.write_page(made, html)
    output.show(
        {"card": str(made.folder / CARD)},
        lambda terminal: console.show_card(terminal, made, preview),
    )


@cli.command(cls=Command)
@click.argument("folder", type=FOLDER)
@target_options("--to", required=True)
@output_options
def push(folder: Path, destination: Destination, verify_download: bool, dry_run: bool, output: Output) -> None:
    """Publish a package that passed and is unchanged since, in one commit.

    The token comes from HF_TOKEN or `hf auth login`.

    \b
    quantize push distilgpt2-bnb-4bit --to you/distilgpt2-bnb-4bit
    quantize push distilgpt2-bnb-4bit --to you/distilgpt2-bnb-4bit --dry-run
    quantize push distilgpt2-bnb-4bit --to somebody/model --pr
    """
    from quantize.cli import console

    if dry_run:
        plan = publishing.plan(folder, destination)
        output.show(plan, lambda terminal: console.show_plan(terminal, plan))
        return
    receipt = publishing.push(folder, destination, output.progress, verify_download=verify_download)
    output.show(receipt, lambda terminal: console.show_receipt(terminal, receipt))


@cli.command(cls=Command)
@click.argument("catalogue", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--output",
    "-o",
    "folder",
    type=FOLDER,
    default=Path("sync"),
    show_default=True,
    help="For evidence and unfinished work.",
)
@click.option("--only", multiple=True, metavar="REPO", callback=repo_ids, help="This target. May be repeated.")
@click.option("--max-models", type=click.IntRange(1), help="Make at most this many; the rest waits for the next time.")
@click.option("--dry-run", is_flag=True, help="Say what would be done; nothing is fetched, made or published.")
@click.option("--refresh-card", is_flag=True, help="Also render published cards again, and push those that differ.")
@click.option("--verify-download", is_flag=True, help="Fetch what was published again, load it and score a sample.")
@device_option
@output_options
@publisher_options
@click.pass_context
def sync(
    context: click.Context,
    catalogue: Path,
    folder: Path,
    only: tuple[str, ...],
    max_models: int | None,
    dry_run: bool,
    refresh_card: bool,
    verify_download: bool,
    device: str,
    publisher: Publisher | None,
    output: Output,
) -> None:
    """Keep the models of a CATALOGUE up to date on the Hub; safe to run every night.

    Exit codes: 0 all up to date or published, 1 some failed, 3 some refused by parity.

    \b
    quantize sync catalogue.toml
    quantize sync catalogue.toml --only you/distilgpt2-bnb-4bit --dry-run
    """
    from quantize.cli import console

    request = SyncRequest(
        catalogue, folder, only, max_models, dry_run, refresh_card, verify_download, device, publisher
    )
    report = publishing.sync(request, output.progress)
    output.show(report, lambda terminal: console.show_report(terminal, report))
    for outcome in report.outcomes if output.quiet else ():
        if not outcome.ok:
            click.echo(f"{outcome.state}: {outcome.repo}: {outcome.detail}", err=True)
    context.exit(report.exit_code)


@cli.command(cls=Command)
@output_options
def doctor(output: Output) -> None:
    """Show what this machine has: devices, backends, versions, token, disk.

    \b
    quantize doctor --json
    """
    from quantize import diagnostics
    from quantize.cli import console

    found = diagnostics.diagnose()
    output.show(found, lambda terminal: console.show_diagnostics(terminal, found))


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of every kernel that it falls back from
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        code = cli.main(arguments, prog_name="quantize", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted: nothing half done was left; run the same command again to go on", err=True)
        sys.exit(INTERRUPTED)
    except QuantizeError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    sys.exit(code)
