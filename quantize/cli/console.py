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
from quantize.cli.visible_console import VisibleConsole
from quantize.diagnostics import Diagnostics
from quantize.errors import printable
from quantize.evidence import Attempt, Coverage, Estimate, Evidence
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
        self.console: Console = VisibleConsole(
            stderr=True, highlight=False, markup=False, width=None if self.interactive else PLAIN_WIDTH
        )

    def stage(self, title: str) -> None:
        self.console.print(Text.assemble(("==>", "bold"), f" {printable(title)}"), soft_wrap=True)

    def note(self, text: str) -> None:
        self.console.print(f"    {printable(text)}", soft_wrap=True)

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
                if unit in ("windows", "prompts", "segments", "pictures")
                else [TextColumn("{task.percentage:>3.0f} %")]
            ),
            TimeRemainingColumn(),
        ]
        with Progress(*columns, console=self.console, transient=True) as progress:
            bar = progress.add_task(printable(title), total=total)
            yield lambda amount: progress.advance(bar, amount)


def show_evidence(console: Console, evidence: Evidence) -> None:
    """The table of results and the verdict."""
    failed = [check for check in evidence.checks if not check.passed]
    for check in evidence.checks if failed else []:
        console.print(f"    {'ok  ' if check.passed else 'FAIL'} {check.name}: {check.detail}", soft_wrap=True)
    if evidence.scores is not None:
        console.print(_scores_table(evidence))
    verdict = evidence.verdict
    if count := len(evidence.misread_on_cpu):
        console.print(
            f"not for CPUs with AVX-512: bitsandbytes dequantizes {count} of its layers wrongly there",
            style="yellow",
            soft_wrap=True,
        )
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
    for line in evidence.advice:
        console.print(f"    {line}", soft_wrap=True)
    if evidence.reads_pictures and evidence.scores is not None:
        console.print(f"measured on {evidence.modalities}", soft_wrap=True)
    if len(evidence.attempts) > 1:
        console.print(_attempts_table(evidence))
    for attempt in evidence.attempts:
        if attempt.failure:
            console.print(f"    not made: {attempt.recipe.name}: {attempt.failure}", soft_wrap=True)


def show_package(console: Console, package: Package) -> None:
    """The size of a package, and its folder."""
    sizes, bits = package.evidence.sizes, package.provenance.recipe.bits
    shrunk = f"{sizes.source_bytes / 1e6:.1f} MB -> {sizes.package_bytes / 1e6:.1f} MB"
    average = f"{sizes.bits_per_parameter:.2f} bits per parameter with unquantized layers"
    console.print(f"{package.provenance.source.name} in {bits} bits: {shrunk}, {average}", soft_wrap=True)
    if package.evidence.coverage is not None:
        console.print(_coverage(package.evidence.coverage, bits), soft_wrap=True)
    console.print(f"package: {package.folder}", soft_wrap=True)


def _coverage(coverage: Coverage, bits: int) -> str:
    kept = ", ".join(f"{printable(kind)} {share:.1%}" for kind, share in coverage.kept.items())
    return f"{coverage.quantized:.1%} of the parameters are in {bits} bits; in half precision stay: {kept or 'none'}"


def show_card(console: Console, package: Package, preview: bool) -> None:
    path = package.folder / CARD
    if preview:
        console.print(Markdown(split(path.read_text("utf-8")).body))
    console.print(f"card: {path}", soft_wrap=True)


def show_receipt(console: Console, receipt: Receipt) -> None:
    done = "published" if receipt.created_commit else "already there, nothing to do"
    console.print(f"{done}: {receipt.pull_request or receipt.url}", soft_wrap=True)
    if proof := receipt.downloaded:
        sample = f"loss on a sample text: {proof.sample_nll:.4f} nats per token"
        console.print(f"downloaded again: {proof.files} files, all hashes match; {sample}", soft_wrap=True)


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
    branch = "a new pull request" if plan.pull_request and not plan.revision else plan.revision or "main"
    state = f" ({plan.access})" if plan.access else " (would be created)"
    console.print(f"{plan.repo_id}{state}, {branch}", soft_wrap=True)
    for note in plan.notes:
        console.print(note, soft_wrap=True)
    console.print(f"{sent / 1e6:.1f} MB to upload, {kept} files are already there; nothing was changed", soft_wrap=True)


def show_delivery(console: Console, delivery: Delivery) -> None:
    """What became of `run --push-to`."""
    if delivery.package and delivery.receipt and delivery.receipt.created_commit:
        show_evidence(console, delivery.package.evidence)
        show_package(console, delivery.package)
    if delivery.receipt:
        show_receipt(console, delivery.receipt)
    else:
        console.print(f"{delivery.state}: {delivery.source} at {delivery.repo}", soft_wrap=True)


def show_report(console: Console, report: SyncReport) -> None:
    """What became of every entry of a catalogue."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("repo", "state", "detail"):
        table.add_column(name, overflow="fold")
    for outcome in report.outcomes:
        table.add_row(outcome.repo, outcome.state, outcome.detail)
    console.print(table)


def show_diagnostics(console: Console, report: Diagnostics) -> None:
    """Versions, devices, the Hub's settings and free disk space."""
    table = Table(show_header=False, title="this machine", title_justify="left")
    table.add_row("python", report.python)
    for name, version in report.versions.items():
        table.add_row(name, version)
    for device in report.devices:
        table.add_row(device.name, f"{device.processor}, {device.free_memory / 1e9:.1f} GB free")
    table.add_row(f"4-bit on {report.devices[0].name}", report.bitsandbytes_works)
    table.add_row("Hub", report.endpoint)
    table.add_row("token", "present" if report.token_present else "none; needed only to push and for gated models")
    table.add_row("Hub cache", f"{report.hub_cache}, {report.hub_cache_free / 1e9:.1f} GB free")
    table.add_row("this folder", f"{report.folder_free / 1e9:.1f} GB free")
    console.print(table)


def _attempts_table(evidence: Evidence) -> Table:
    """What was tried in turn: sizes, seconds of quantizing, what was measured, and what was predicted of sizes."""
    made = [attempt for attempt in evidence.attempts if not attempt.failure]
    predicted = any(attempt.predicted for attempt in made)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("tried", "MB", "seconds", *(["predicted KLD"] if predicted else []), "mean KLD (nats)", "grade"):
        table.add_column(name, justify="left" if name in ("tried", "grade") else "right", no_wrap=True)
    for attempt in made:
        expected = [nats(attempt.predicted) if attempt.predicted else ""] if predicted else []
        table.add_row(
            _named(attempt),
            f"{attempt.weight_bytes / 1e6:.1f}",
            f"{attempt.seconds:.0f}",
            *expected,
            nats(attempt.kld.value) if attempt.kld else "",
            f"{attempt.grade}, chosen" if attempt.chosen else attempt.grade,
        )
    return table


def _named(attempt: Attempt) -> str:
    changed = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in attempt.recipe.options.items())
    return f"{attempt.recipe.name}, {changed}" if changed else attempt.recipe.name


def _scores_table(evidence: Evidence) -> Table:
    scores, generation, corpus = evidence.scores, evidence.generation, evidence.corpus
    assert scores is not None and corpus is not None
    required = evidence.verdict.required
    ratio_limit, kld_limit = LIMITS[required]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=_caption(evidence), caption_justify="left")
    level, own = f"{100 * evidence.confidence:.4g} % interval", " *" if evidence.optional_stopping else ""
    for name in ("metric", "original", "this model", level, f"limit for {required}", "pass"):
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    ratio, kld, top = scores.perplexity_ratio, scores.kld.mean, scores.same_top
    table.add_row(
        "perplexity",
        f"{scores.reference_perplexity.value:.3f}",
        f"{scores.candidate_perplexity.value:.3f}",
        _range(scores.candidate_perplexity, 3) + own,
    )
    table.add_row(
        "perplexity ratio",
        "1",
        f"{ratio.value:.4f}",
        _range(ratio),
        f"{ratio_limit}",
        _mark(ratio, ratio_limit),
    )
    table.add_row("mean KLD (nats)", "0", nats(kld.value), _range_in_nats(kld), f"{kld_limit}", _mark(kld, kld_limit))
    if (framing := evidence.chat_framing) is not None:
        ratio, kld = framing.scores.perplexity_ratio, framing.scores.kld.mean
        values = ("1", f"{ratio.value:.4f}", _range(ratio), f"{ratio_limit}", _mark(ratio, ratio_limit))
        table.add_row("  in the chat template: ratio", *values)
        table.add_row(
            "  in the chat template: KLD",
            "0",
            nats(kld.value),
            _range_in_nats(kld),
            f"{kld_limit}",
            _mark(kld, kld_limit),
        )
    if (pictures := evidence.pictures) is not None:
        kld, same = pictures.kld, pictures.same_top
        values = ("0", nats(kld.value), _range_in_nats(kld), f"{kld_limit}", _mark(kld, kld_limit))
        table.add_row("  pictures: KLD", *values)
        table.add_row("  pictures: same next token", "1", f"{same.value:.4f}", _range(same))
    table.add_row("same most likely token", "1", f"{top.value:.4f}", _range(top) + own)
    table.add_row("RMS change of p(token)", "0", f"{scores.delta_p_rms.value:.4f}", _range(scores.delta_p_rms) + own)
    for control in evidence.controls:
        if control.perplexity_ratio is None or control.kld is None:
            table.add_row(f"  {control.name}", "", "no number", control.problem)
            continue
        ratio, kld = control.perplexity_ratio, control.kld
        table.add_row(f"  {control.name}: ratio", "1", f"{ratio.value:.4f}", _range(ratio))
        table.add_row(f"  {control.name} ({control.grade}): KLD", "0", nats(kld.value), _range_in_nats(kld))
    for figure in evidence.standard_perplexities:
        table.add_row(figure.name, _number(figure.reference), _number(figure.candidate))
    if evidence.reference_cache is not None:
        table.add_row("  reference cache: KLD", "0", nats(evidence.reference_cache.mean_kld))
    if generation is not None:
        if generation.new_tokens >= 16:
            table.add_row("same first 16 tokens, greedy", "1", f"{generation.identical_at_16:.2f}")
        table.add_row("same next token, with KV cache", "1", f"{generation.cached_agreement:.4f}")
    return table


def _caption(evidence: Evidence) -> str:
    corpus = evidence.corpus
    assert corpus is not None
    scored = f"scored {corpus.scored} of {corpus.windows} windows of {corpus.window} tokens of {corpus.name}"
    lines = [f"{scored}, enough for the verdict" if evidence.stopped_early else scored]
    if (pictures := evidence.pictures) is not None:
        lines.append(f"asked about {pictures.count} drawn pictures, {sum(pictures.figures.tokens)} tokens of answers")
    if corpus.repeated:
        lines.append(f"{corpus.repeated} windows were passed over because they repeat others")
    lines.append(f"text that fills less than {100 * evidence.missed_share:.2g} % of windows can have been missed")
    if evidence.optional_stopping:
        lines.append("* of these windows alone, not adjusted for the choice of when to stop")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "no number" if value is None else f"{value:.4f}"


def _range(estimate: Estimate, digits: int = 4) -> str:
    return f"{estimate.low:.{digits}f} .. {estimate.high:.{digits}f}"


def _range_in_nats(estimate: Estimate) -> str:
    return f"{nats(estimate.low)} .. {nats(estimate.high)}"


def _mark(estimate: Estimate, limit: float) -> str:
    return "yes" if estimate.high <= limit else "no"
