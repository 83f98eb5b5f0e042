"""The command line: options, and the one place that turns known errors into an exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from quantize import __version__, publishing
from quantize.cli.decorators import FILE, FOLDER, former_flags, options_of
from quantize.cli.display import Display
from quantize.errors import ParityRefused, QuantizeError, described, printable
from quantize.files import CARD
from quantize.grades import UNMEASURED
from quantize.options import DEFAULT_MODEL
from quantize.publishing import Destination, PublishRequest, SyncRequest, Verification
from quantize.records import EvaluationSettings, Publisher
from quantize.serialization import to_json

if TYPE_CHECKING:
    from quantize.pipeline import RunRequest

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
    """Make, verify, document and publish 4-bit checkpoints that people can trust.

    \b
    quantize run                       distilbert/distilgpt2 into ./distilgpt2-bnb-4bit
    quantize push distilgpt2-bnb-4bit --to you/distilgpt2-bnb-4bit

    Exit codes: 0 done or nothing to do, 1 a known failure, 2 wrong usage, 3 required grade not reached.
    """


@cli.command(context_settings=former_flags("run"))
@click.argument("model", default=DEFAULT_MODEL)
@options_of("run")
def run(
    model: str,
    destination: Destination | None,
    verify_download: bool,
    dry_run: bool,
    refresh_card: bool,
    display: Display,
    **request: Any,
) -> None:
    """Quantize MODEL, compare it with the original, write its card, and leave a finished package.

    MODEL is a Hub id or a local folder.

    \b
    quantize run
    quantize run openai-community/gpt2 --revision main --require parity
    quantize run ./my-model --bits 8 --device cpu
    quantize run distilbert/distilgpt2 --push-to you/distilgpt2-bnb-4bit
    """
    from quantize import pipeline

    if request["unverified"] and destination is not None:
        raise click.UsageError("--unverified and --push-to exclude each other: what is published has been measured")
    asked = pipeline.RunRequest(model, **request)
    if destination is None:
        _run(asked, display)
    else:
        _deliver(PublishRequest(asked, destination, refresh_card, verify_download, dry_run), display)


def _run(request: RunRequest, display: Display) -> None:
    from quantize import pipeline
    from quantize.cli import console

    result = pipeline.run(request, display.progress)
    package, evidence = result.package, result.package.evidence
    if not result.created:
        display.progress.note(f"{package.folder} is already finished: nothing to do (use --force to replace it)")
    display.show(
        {"package": str(package.folder), "created": result.created, "parity": evidence},
        lambda terminal: console.show_evidence(terminal, evidence),
        lambda terminal: console.show_package(terminal, package),
    )
    if not evidence.verdict.passed and evidence.verdict.grade != UNMEASURED:
        reason = evidence.verdict.reasons[0]
        raise ParityRefused(f"{request.model} was refused: {reason}; the evidence is in {package.folder}")


def _deliver(request: PublishRequest, display: Display) -> None:
    from quantize.cli import console

    delivery = publishing.deliver(request, display.progress)
    display.show(delivery.summary(), lambda terminal: console.show_delivery(terminal, delivery))


@cli.command(context_settings=former_flags("verify"))
@click.argument("checkpoint")
@options_of("verify")
def verify(checkpoint: str, figures: Path | None, display: Display, **request: Any) -> None:
    """Compare a package, or any bitsandbytes checkpoint, with its original.

    CHECKPOINT is a folder or a Hub repo, also one that was made with other tools.

    \b
    quantize verify distilgpt2-bnb-4bit
    quantize verify someone/gpt2-4bit --against openai-community/gpt2
    """
    from quantize import pipeline
    from quantize.cli import console

    evidence = pipeline.verify(pipeline.VerifyRequest(checkpoint, **request), display.progress)
    if figures is not None:
        pipeline.draw_figures(evidence, figures)
    display.show(evidence, lambda terminal: console.show_evidence(terminal, evidence))
    if not evidence.verdict.passed:
        raise ParityRefused(f"{checkpoint} was refused: {evidence.verdict.reasons[0]}")


@cli.command(context_settings=former_flags("card"))
@click.argument("folder", type=FOLDER)
@options_of("card")
def card(
    folder: Path,
    against: str | None,
    card_template: Path | None,
    facts: bool,
    preview: bool,
    html: Path | None,
    publisher: Publisher | None,
    display: Display,
) -> None:
    """Render a package's card again from its evidence, without measuring.

    \b
    quantize card distilgpt2-bnb-4bit --preview
    quantize card distilgpt2-bnb-4bit --card-template my-card.md.j2 --html card.html
    """
    from model_card import visible_json
    from quantize import pipeline
    from quantize.cli import console

    request = pipeline.CardRequest(folder, against, publisher, card_template)
    if facts:
        click.echo(visible_json(to_json(pipeline.card_names(request))), nl=False)
        return
    package = pipeline.rewrite_card(request)
    if html is not None:
        pipeline.write_page(package, html)
    display.show(
        {"card": str(package.folder / CARD)},
        lambda terminal: console.show_card(terminal, package, preview),
    )


@cli.command(context_settings=former_flags("push"))
@click.argument("folder", type=FOLDER)
@options_of("push")
def push(
    folder: Path,
    destination: Destination,
    settings: EvaluationSettings,
    device: str,
    against: str | None,
    card_template: Path | None,
    verify_download: bool,
    dry_run: bool,
    display: Display,
) -> None:
    """Publish a package that passed and has not been changed since, in one commit.

    The token comes from HF_TOKEN or `hf auth login`.

    \b
    quantize push distilgpt2-bnb-4bit --to you/distilgpt2-bnb-4bit
    quantize push distilgpt2-bnb-4bit --to you/distilgpt2-bnb-4bit --dry-run
    quantize push distilgpt2-bnb-4bit --to somebody/model --pr
    """
    from quantize.cli import console

    if dry_run:
        plan = publishing.plan(folder, destination, card_template)
        display.show(plan, lambda terminal: console.show_plan(terminal, plan))
        return
    receipt = publishing.push(
        folder,
        destination,
        display.progress,
        verification=Verification(device, settings.corpus, against) if verify_download else None,
        card_template=card_template,
    )
    display.show(receipt, lambda terminal: console.show_receipt(terminal, receipt))


@cli.command(context_settings=former_flags("sync"))
@click.argument("catalogue", type=FILE)
@options_of("sync")
@click.pass_context
def sync(context: click.Context, /, catalogue: Path, display: Display, **request: Any) -> None:
    """Keep the models of a CATALOGUE up to date on the Hub; safe to run every night.

    Exit codes: 0 all up to date or published, 1 some failed, 3 some did not reach the required grade.

    \b
    quantize sync catalogue.toml
    quantize sync catalogue.toml --only you/distilgpt2-bnb-4bit --dry-run
    """
    from quantize.cli import console

    report = publishing.sync(SyncRequest(catalogue, **request), display.progress)
    display.show(report, lambda terminal: console.show_report(terminal, report))
    for outcome in report.outcomes if display.quiet else ():
        if not outcome.ok:
            click.echo(printable(f"{outcome.state}: {outcome.repo}: {outcome.detail}"), err=True)
    context.exit(report.exit_code)


@cli.command(context_settings=former_flags("doctor"))
@options_of("doctor")
def doctor(display: Display) -> None:
    """Show devices, backends, versions, token and disks of this machine.

    \b
    quantize doctor --json
    """
    from quantize import diagnostics
    from quantize.cli import console

    report = diagnostics.diagnose()
    display.show(report, lambda terminal: console.show_diagnostics(terminal, report))


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
    except (click.Abort, KeyboardInterrupt) as error:
        click.echo(described(error, "interrupted: run the same command again to continue"), err=True)
        sys.exit(INTERRUPTED)
    except SystemExit as error:  # SIGTERM
        click.echo(described(error, "stopped"), err=True)
        raise
    except QuantizeError as error:
        click.echo(f"error: {described(error)}", err=True)
        sys.exit(error.exit_code)
    sys.exit(code)
