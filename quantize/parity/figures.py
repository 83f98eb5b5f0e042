"""Pictures of the evidence for the card, legible at the width of a phone."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.evidence import Evidence, Pictures, Scores
from quantize.grades import IMPLAUSIBLE_RATIO, LIMITS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT, DPI = 6.0, 3.4, 150
INK, ACCENT = "#1f2933", "#2b6cb0"
SPREAD, GOLDEN = 0.5, 0.618
"""How wide a column of points is, and the step that puts neighbours apart in it."""
LARGEST_LEGEND = 11
"""Kinds of matrices that are told apart."""
GRADE_COLOURS = {"lossless": "#2f855a", "parity": "#68a357", "good": "#b7b04a", "degraded": "#d08c3f"}


def draw(evidence: Evidence, folder: Path) -> tuple[str, ...]:
    """Write the figures as PNG files into `folder`; their names, or none where nothing was scored."""
    if evidence.scores is None:
        return ()
    folder.mkdir(parents=True, exist_ok=True)
    drawings = {
        "perplexity-ratio.png": _ratio(evidence.scores, evidence.confidence),
        "kld-distribution.png": _kld_distribution(evidence.scores),
        "kld-by-position.png": _kld_by_position(evidence),
    }
    if evidence.weight_errors:
        drawings["weight-errors.png"] = _weight_errors(evidence.weight_errors)
    if evidence.pictures is not None:
        drawings["kld-by-picture.png"] = _kld_by_picture(evidence.pictures)
    for name, figure in drawings.items():
        (folder / name).unlink(missing_ok=True)  # a link of that name is replaced, not followed
        figure.savefig(folder / name, dpi=DPI, metadata={"Software": None})
    return tuple(drawings)


def _ratio(scores: Scores, confidence: float) -> Figure:
    """The perplexity ratio with its interval over the bands of the grades."""
    figure, axes = _canvas("Perplexity: this model / original")
    ratio = scores.perplexity_ratio
    left = min(0.99, ratio.low - 0.005)
    right = max(1.06, ratio.high + 0.01)
    edges = [max(left, IMPLAUSIBLE_RATIO), *(limit for limit, _ in LIMITS.values())]
    for grade, start, end in zip(LIMITS, edges, edges[1:], strict=False):
        axes.axvspan(start, end, color=GRADE_COLOURS[grade], alpha=0.35, lw=0)
        axes.text((start + end) / 2, 0.86, grade, ha="center", va="bottom", fontsize=9, rotation=40)
    axes.errorbar(
        [ratio.value],
        [0.4],
        xerr=[[ratio.value - ratio.low], [ratio.high - ratio.value]],
        fmt="o",
        color=INK,
        capsize=6,
        lw=2.5,
        markersize=8,
    )
    axes.text(ratio.value, 0.52, f"{ratio.value:.4f}", ha="center", fontsize=12, color=INK)
    axes.axvline(1.0, color=INK, lw=1, ls=":")
    axes.set(
        xlim=(left, right),
        ylim=(0, 1.3),
        yticks=[],
        xlabel=f"ratio with its {100 * confidence:.4g} % confidence interval",
    )
    return figure


def _kld_distribution(scores: Scores) -> Figure:
    """How many tokens diverge by how much, on a logarithmic axis."""
    figure, axes = _canvas("KL divergence per token")
    edges, counts = scores.kld_histogram.edges, scores.kld_histogram.counts
    total = sum(counts)
    axes.stairs([100 * count / total for count in counts], edges, fill=True, color=ACCENT, alpha=0.75)
    axes.set_xscale("log")
    kld = scores.kld
    marks = {"median": kld.percentiles["p50"], "mean": kld.mean.value, "99th percentile": kld.percentiles["p99"]}
    for style, (name, value) in zip((":", "-", "--"), marks.items(), strict=True):
        axes.axvline(max(value, edges[0]), color=INK, lw=1.4, ls=style, label=f"{name} {value:.2g}")
    axes.legend(loc="upper left", frameon=False)
    filled = [edge for edge, count in zip(edges, counts, strict=False) if count > total / 1000]
    axes.set(xlim=(min(filled) / 2, max(filled) * 4), xlabel="KL divergence of one token (nats)", ylabel="% of tokens")
    return figure


def _kld_by_position(evidence: Evidence) -> Figure:
    """Whether the models drift apart as the context grows."""
    figure, axes = _canvas("KL divergence by position in the window")
    assert evidence.scores is not None and evidence.corpus is not None
    values, window = evidence.scores.kld_by_position, evidence.corpus.window
    edges = [1 + (window - 1) * index / len(values) for index in range(len(values) + 1)]
    axes.stairs(values, edges, fill=True, color=ACCENT, alpha=0.75)
    axes.axhline(evidence.scores.kld.mean.value, color=INK, lw=1.4, label=f"mean {evidence.scores.kld.mean.value:.2g}")
    axes.legend(loc="upper right", frameon=False)
    axes.set(
        xlim=(1, window),
        ylim=(0, max(values) * 1.35 or 1.0),
        xlabel="tokens of context",
        ylabel="mean KL divergence (nats)",
    )
    return figure


def _weight_errors(errors: dict[str, float]) -> Figure:
    """How far each quantized matrix is from the source's, in the order of the model."""
    figure, axes = _canvas("Weight error by layer")
    kinds = _kinds(errors)
    for kind, marker in zip(dict.fromkeys(kinds), itertools.cycle("osD^vPX*"), strict=False):
        points = [(index, 100 * error) for index, error in enumerate(errors.values()) if kinds[index] == kind]
        axes.plot(*zip(*points, strict=True), marker, ms=6, label=kind)
    axes.legend(loc="lower right", frameon=False, ncols=3, fontsize=9)
    top = 100 * max(errors.values())
    axes.set(ylim=(0, top * 1.25 or 1.0), xlabel="layer, first to last", ylabel="relative error (%)")
    return figure


def _kinds(names: Iterable[str]) -> list[str]:
    """What each matrix is in its layer, whichever layer and expert: as many kinds as a legend has room for."""
    parts = [tuple(part for part in name.split(".") if not part.isdigit())[-2:] for name in names]
    last = Counter(kind[-1] for kind in set(parts))
    kinds = [kind[-1] if last[kind[-1]] == 1 else ".".join(kind) for kind in parts]
    shown = [kind for kind, _ in Counter(kinds).most_common(LARGEST_LEGEND)]
    return [kind if kind in shown else "others" for kind in kinds]


def _kld_by_picture(pictures: Pictures) -> Figure:
    """How far answers about each picture diverge, by what is drawn on it."""
    figure, axes = _canvas("KL divergence of answers about pictures")
    figures, mean = pictures.figures, pictures.kld.value
    kinds = list(dict.fromkeys(figures.kinds))
    for column, kind in enumerate(kinds):
        values = [value for value, drawn in zip(figures.kld, figures.kinds, strict=True) if drawn == kind]
        beside = [column + SPREAD * ((place * GOLDEN) % 1 - 0.5) for place in range(len(values))]
        axes.plot(beside, values, "o", ms=6, color=ACCENT, alpha=0.6)
    axes.axhline(mean, color=INK, lw=1.4, label=f"mean {mean:.2g}")
    axes.legend(loc="upper right", frameon=False)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set(
        xlim=(-0.5, len(kinds) - 0.5), ylim=(0, 1.25 * max(figures.kld) or 1.0), ylabel="mean KL divergence (nats)"
    )
    return figure


def _canvas(title: str) -> tuple[Figure, Axes]:
    """A figure without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=13, loc="left", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
