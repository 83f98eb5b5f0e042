"""Plot divergence against bytes from the JSON of scripts/accuracy.py, of this version or earlier ones.

python scripts/accuracy_curve.py docs/accuracy-h100.json docs/accuracy-curve.png

With --predicted: what was predicted for allocations of bytes, against what was measured.

python scripts/accuracy_curve.py --predicted docs/accuracy-sizes.json docs/accuracy-predicted.png
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

SERIES = {
    "NF4 rounded to nearest, and with modules in half precision": (("rtn", "stock"), "tab:grey", "s", "none"),
    "calibrated, within a size budget": (("calibrated",), "tab:blue", "o", "-"),
}
EXCLUDED = (
    "fp4",
    "groups",
    "distilled",
    "text at",
    "all text",
    "coupling",
    "output Hessian",
    "windows of",
    "blocks of",
    "sweeps",
    "passes",
    "learned",
    "twice",
)

TEXTS = {"wikitext": "WikiText-2 test", "stdlib": "Python's standard library", "own": "text of its own kind"}


def points(rows: list[dict[str, Any]], names: tuple[str, ...], text: str) -> list[tuple[float, float]]:
    """Megabytes and mean KLD of one series, the smallest first."""
    named = {row["variant"].rpartition(": ")[2]: row for row in rows}
    chosen = [row for key, row in named.items() if key.startswith(names) and not any(word in key for word in EXCLUDED)]
    return sorted((row["weight_bytes"] / 1e6, row["texts"][text]["kld"]) for row in chosen)


@click.command(help=__doc__)
@click.argument("measured", type=click.Path(path_type=Path, exists=True))
@click.argument("picture", type=click.Path(path_type=Path))
@click.option("--predicted", is_flag=True, help="Predictions against measurements.")
def main(measured: Path, picture: Path, predicted: bool) -> None:
    import matplotlib

    matplotlib.use("Agg")
    rows = json.loads(measured.read_text("utf-8"))
    figure = predictions(rows) if predicted else curves(rows)
    figure.savefig(picture, dpi=110)


def curves(rows: list[dict[str, Any]]) -> Any:
    """Divergence on three texts against bytes."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for axis, (text, title) in zip(axes, TEXTS.items(), strict=True):
        for label, (names, colour, mark, line) in SERIES.items():
            sizes, divergences = zip(*points(rows, names, text), strict=True)
            axis.plot(sizes, divergences, color=colour, marker=mark, linestyle=line, label=label)
        axis.set(title=title, xlabel="weight file (MB)", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean KL divergence (nats)")
    axes[0].legend(fontsize=8)
    return figure


def predictions(rows: list[dict[str, Any]]) -> Any:
    """Measured divergence on three texts against that predicted on the calibration text."""
    from matplotlib import pyplot

    sized = [row for row in rows if row.get("predicted")]
    figure, axis = pyplot.subplots(figsize=(5.5, 4.2), layout="constrained")
    expected = [row["predicted"] for row in sized]
    for (text, title), mark in zip(TEXTS.items(), "os^", strict=True):
        axis.plot(expected, [row["texts"][text]["kld"] for row in sized], mark, label=title)
    highest = max(expected)
    axis.plot([0, highest], [0, highest], color="tab:grey", linewidth=1, label="as predicted")
    axis.set(
        xlabel="predicted mean KL divergence (nats)",
        ylabel="measured mean KL divergence (nats)",
        xlim=(0, None),
        ylim=(0, None),
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main()
