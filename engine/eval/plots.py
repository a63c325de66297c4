"""Plots of runs: validation curves and calibration.

Figures are as wide as GitHub shows a README, 830 pixels.
"""

import math
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure

from engine.base.files import atomic_write

# Okabe and Ito's colours for the colour-blind, without the pale yellow; dashes and markers vary too
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7")
DASHES = ("-", "--", "-.", (0, (1, 1.5)))
MARKERS = ("o", "s", "^")
LOOKS = cycler(color=COLOURS, linestyle=(DASHES * 2)[:7], marker=(MARKERS * 3)[:7])
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": LOOKS,
    "axes.titlesize": 10,
    "figure.labelsize": 10,
    "grid.alpha": 0.3,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.markerfacecolor": "none",
    "lines.markersize": 5,
}
styled = matplotlib.rc_context(STYLE)
WIDTH = 8.3  # inches, of 100 pixels each


def save(figure: Figure, path: Path) -> None:
    """Write a PNG; the same data give the same bytes."""
    atomic_write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=200))


def validation_curve(records: list[dict]) -> dict[int, float]:
    """The records of metrics.jsonl -> {tokens: validation nll}, without step 0."""
    found = [record for record in records if "val_nll" in record and record["step"] > 0]
    return {record["tokens"]: record["val_nll"] for record in found}


@styled
def curves_figure(curves: dict[str, dict[int, dict[int, float]]]) -> Figure | None:
    """Validation nll by tokens, and its difference to the first run's nll with the same seed; None
    if there are no curves.

    curves: name -> seed -> validation_curve(). A name without seeds still takes up a colour.
    """
    drawn = [name for name in curves if curves[name]]
    if not drawn:
        return None
    base = curves[drawn[0]]
    figure, (axes,) = panels(1, min(2, len(curves)), 3.2)
    labels = ("validation nll (nats per token)", f"difference to {drawn[0]}, same seed")
    for panel, label in zip(axes, labels, strict=False):
        panel.set_xlabel("training tokens (millions)")
        panel.set_ylabel(label)
    for name, seeds in curves.items():
        differences = []
        for seed in seeds.keys() & base:
            curve = seeds[seed]
            other = base[seed]
            differences.append({at: curve[at] - other[at] for at in curve.keys() & other})
        plot_band(axes[0], list(seeds.values()), name)
        if len(axes) > 1:
            plot_band(axes[1], differences, name)
    # one legend below all panels, with each name once
    handles, names = axes[0].get_legend_handles_labels()
    n_columns = max(1, 100 // max(map(len, names)))
    n_lines = math.ceil(len(names) / n_columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * n_lines)
    figure.legend(handles, names, loc="outside lower center", ncols=n_columns)
    return figure


def plot_band(panel, curves: list[dict[int, float]], label: str) -> None:
    """The mean of the curves where all have a point, in a band from the lowest to the highest."""
    tokens = sorted(set.intersection(*map(set, curves))) if curves else []
    if not tokens:
        panel.plot([], [])
        return
    values = np.array([list(map(curve.get, tokens)) for curve in curves])
    millions = np.array(tokens) / 1e6
    interval = max(1, len(tokens) // 10)
    mean = values.mean(0)
    low = values.min(0)
    high = values.max(0)
    (line,) = panel.plot(millions, mean, label=label, markevery=interval)
    panel.fill_between(millions, low, high, color=line.get_color(), alpha=0.15)


@styled
def reliability_figure(rows: dict[str, dict]) -> Figure:
    """A panel per run: accuracy by confidence with 95 % intervals; bars: share of tokens.

    rows: what evaluate.py writes for each run, by its name.
    """
    n_rows = math.ceil(len(rows) / 4)
    n_columns = math.ceil(len(rows) / n_rows)
    figure, axes = panels(n_rows, n_columns, 2.9 * n_rows, sharey=True)
    for panel in axes.flat[len(rows) :]:
        panel.set_visible(False)
    for panel, (name, row) in zip(axes.flat, rows.items(), strict=False):
        calibration = row["calibration"]
        n = np.array(calibration["n"])
        confidence = np.array(calibration["confidence"], float)
        accuracy = np.array(calibration["accuracy"], float)
        accuracy[n == 0] = np.nan  # is not drawn
        variance = accuracy * (1 - accuracy) / n.clip(1)
        error = 1.96 * np.sqrt(variance)
        edges = np.linspace(0, 1, len(n) + 1)
        shares = n / n.sum()
        panel.stairs(shares, edges, fill=True, color=COLOURS[2], alpha=0.5)
        panel.plot([0, 1], [0, 1], color="0.5", linewidth=1, marker="")
        panel.errorbar(confidence, accuracy, error, fmt="ko-", markersize=4, mfc="k")
        panel.text(0.05, 0.92, f"ECE {row['ece']:.4f}", transform=panel.transAxes)
        panel.set(
            title=textwrap.fill(name, 26),
            xlim=(0, 1.02),
            ylim=(0, 1.02),
            xticks=(0, 0.5, 1),
        )
    figure.supxlabel("confidence: probability of the likeliest token")
    figure.supylabel("accuracy; bars: share of tokens")
    return figure


def panels(n_rows: int, n_columns: int, height: float, **options):
    """A figure and its axes (n_rows, n_columns), without pyplot, which would keep it in memory."""
    width = WIDTH if n_columns > 1 else WIDTH / 2
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(n_rows, n_columns, squeeze=False, **options)
