"""What a person sees: stages and progress bars while it works, tables when it is done. All on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from model_card import nats, split
from quantize.diagnostics import Diagnostics
from quantize.evidence import Estimate, Evidence
from quantize.files import CARD
from quantize.grades import LIMITS, UNMEASURED
from quantize.package import Package
from quantize.progress import Advance
from quantize.publishing import Delivery, Plan, Receipt, SyncReport

PLAIN_WIDTH = 100


class Terminal:
    """Progress for people: bars on a terminal, a line for each stage in a log."""

    def __init__(self) -> None:
        self.interactive = sys.stderr.isatty()
        self.console = Console(
            stderr=True, highlight=False, markup=False, width=None if self.interactive else PLAIN_WIDTH
        )

    def stage(self, title: str) -> None:
        self.console.print(Text.assemble(("==>", "bold"), f" {title}"), soft_wrap=True)

    def note(self, text: str) -> None:
        self.console.print(f"    {text}", soft_wrap=True)

    @contextmanager
    def task(self, title: str, total: int, unit: str = "") -> Iterator[Advance]:
        if not self.interactive:
            self.note(title)
            yield lambda amount: None
            return
        columns = [
            TextColumn("    {task.description}", markup=False),
            BarColumn(),
            *(
                [MofNCompleteColumn()]
                if unit in ("windows", "prompts", "segments")
                else [TextColumn("{task.percentage:>3.0f} %")]
            ),
            TimeRemainingColumn(),
        ]
        with Progress(*columns, console=self.console, transient=True) as progress:
            bar = progress.add_task(title, total=total)
            yield lambda amount: progress.advance(bar, amount)


def show_parity(console: Console, evidence: Evidence) -> None:
    """The table of results and the verdict."""
    failed = [check for check in evidence.checks if not check.passed]
    for check in evidence.checks if failed else []:
        console.print(f"    {'ok  ' if check.passed else 'FAIL'} {check.name}: {check.detail}", soft_wrap=True)
    if evidence.scores is not None:
        console.print(_scores_table(evidence))
    verdict = evidence.verdict
    if verdict.grade == UNMEASURED:
        console.print("not measured: only the files were checked", style="yellow", soft_wrap=True)
        return
    colour = "green" if verdict.passed else "red"
    state = "passed" if verdict.passed else "refused"
    console.print(
        Text.assemble((state, colour), f": grade {verdict.grade}, required {verdict.required}"), soft_wrap=True
    )
    for reason in verdict.reasons:
        console.print(f"    {reason}", soft_wrap=True)


def show_package(console: Console, package: Package) -> None:
    """What was made and where it lies."""
    sizes, recipe = parity_sizes(package.evidence), package.provenance.recipe
    console.print(f"{package.provenance.source.name} in {recipe.bits} bits: {sizes}", soft_wrap=True)
    console.print(f"package: {package.folder}", soft_wrap=True)


def show_card(console: Console, package: Package, preview: bool) -> None:
    path = package.folder / CARD
    if preview:
        console.print(Markdown(split(path.read_text("utf-8")).body))
    console.print(f"card: {path}", soft_wrap=True)


def show_receipt(console: Console, receipt: Receipt) -> None:
    done = "published" if receipt.created_commit else "already there, nothing to do"
    console.print(f"{done}: {receipt.pull_request or receipt.url}", soft_wrap=True)
    if proof := receipt.downloaded:
        console.print(
            f"fetched again: {proof.files} files, all hashes agree; a sample costs {proof.sample_nll:.4f} nats a token",
            soft_wrap=True,
        )


def show_plan(console: Console, plan: Plan) -> None:
    """What a push would create, replace and delete."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("change")
    table.add_column("path", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    for change in plan.changes:
        if change.action != "keep":
            table.add_row(change.action, change.path, f"{change.size:,} B" if change.size else "")
    if table.row_count:
        console.print(table)
    kept = sum(change.action == "keep" for change in plan.changes)
    sent = sum(change.size for change in plan.changes if change.action in ("create", "replace"))
    where = "a new pull request" if plan.pull_request and not plan.revision else plan.revision or "main"
    made = " (would be made)" if plan.creates_repo else ""
    console.print(f"{plan.repo_id}{made}, {where}", soft_wrap=True)
    console.print(f"{sent / 1e6:.1f} MB to send, {kept} files are there already; nothing was changed", soft_wrap=True)


def show_delivery(console: Console, delivery: Delivery) -> None:
    """What came of `run --push-to`."""
    if delivery.package and delivery.receipt and delivery.receipt.created_commit:
        show_parity(console, delivery.package.evidence)
        show_package(console, delivery.package)
    if delivery.receipt:
        show_receipt(console, delivery.receipt)
    else:
        console.print(f"{delivery.state}: {delivery.source} at {delivery.repo}", soft_wrap=True)


def show_report(console: Console, report: SyncReport) -> None:
    """What came of every entry of a catalogue."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("repo", "state", "detail"):
        table.add_column(name, overflow="fold")
    for outcome in report.outcomes:
        table.add_row(outcome.repo, outcome.state, outcome.detail)
    console.print(table)


def show_diagnostics(console: Console, found: Diagnostics) -> None:
    table = Table(show_header=False, title="this machine", title_justify="left")
    table.add_row("python", found.python)
    for name, version in found.versions.items():
        table.add_row(name, version)
    for device in found.devices:
        table.add_row(device.name, f"{device.processor}, {device.free_memory / 1e9:.1f} GB free")
    table.add_row(f"4-bit on {found.devices[0].name}", found.bitsandbytes_works)
    table.add_row("Hub", found.endpoint)
    table.add_row("token", "present" if found.token_present else "none: only needed to push or for gated models")
    table.add_row("Hub cache", f"{found.hub_cache}, {found.hub_cache_free / 1e9:.1f} GB free")
    table.add_row("this folder", f"{found.folder_free / 1e9:.1f} GB free")
    console.print(table)


def parity_sizes(evidence: Evidence) -> str:
    """Sizes in one phrase."""
    sizes = evidence.sizes
    return (
        f"{sizes.source_bytes / 1e6:.1f} MB -> {sizes.package_bytes / 1e6:.1f} MB, "
        f"{sizes.bits_per_parameter:.2f} bits per parameter"
    )


def _scores_table(evidence: Evidence) -> Table:
    scores, generated, text = evidence.scores, evidence.generation, evidence.corpus
    assert scores is not None and text is not None
    ratio_limit, kld_limit = LIMITS[evidence.verdict.required]
    enough = " decided" if text.scored < text.windows and evidence.looks[-1].certain else ""
    caption = f"{text.scored} of {text.windows} windows of {text.window} tokens of {text.name}{enough}; 95 % intervals"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    for name in ("metric", "reference", "candidate", "interval", "limit", "pass"):
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    ratio, kld, top = scores.perplexity_ratio, scores.kld.mean, scores.same_top
    table.add_row(
        "perplexity",
        f"{scores.reference_perplexity.value:.3f}",
        f"{scores.candidate_perplexity.value:.3f}",
        _range(scores.candidate_perplexity, 3),
    )
    table.add_row(
        "perplexity ratio",
        "1",
        f"{ratio.value:.4f}",
        _range(ratio),
        f"{ratio_limit}",
        _mark(ratio, ratio_limit),
    )
    table.add_row("mean KLD (nats)", "0", nats(kld.value), _range(kld), f"{kld_limit}", _mark(kld, kld_limit))
    table.add_row("same top token", "1", f"{top.value:.4f}", _range(top))
    table.add_row("RMS delta p", "0", f"{scores.delta_p_rms.value:.4f}", _range(scores.delta_p_rms))
    for control in evidence.controls:
        table.add_row(
            f"  {control.name}: ratio", "1", f"{control.perplexity_ratio.value:.4f}", _range(control.perplexity_ratio)
        )
        table.add_row(f"  {control.name}: KLD", "0", nats(control.kld.value), _range(control.kld), control.grade)
    for figure in evidence.standard_perplexities:
        table.add_row(figure.name, f"{figure.reference:.4f}", f"{figure.candidate:.4f}")
    if evidence.reference_cache is not None:
        table.add_row("  reference cache: KLD", "0", nats(evidence.reference_cache.mean_kld))
    if generated is not None:
        table.add_row("greedy equal at 16", "1", f"{generated.identical_at_16:.2f}")
        table.add_row("cached agreement", "1", f"{generated.cached_agreement:.4f}")
    return table


def _range(estimate: Estimate, digits: int = 4) -> str:
    return f"{estimate.low:.{digits}f} .. {estimate.high:.{digits}f}"


def _mark(estimate: Estimate, limit: float) -> str:
    return "yes" if estimate.high <= limit else "no"
