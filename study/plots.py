"""The plots of a study: its variants beside each other, their curves, calibration, uncertainty."""

import textwrap
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from engine.base.files import read_json
from engine.eval.plots import (
    COLOURS,
    MARKERS,
    curves_figure,
    panels,
    reliability_figure,
    styled,
    uncertainty_figure,
)
from study.logs import Variant, read

# variants with a curve; more would be a tangle
DRAWN = ("softmax", "smooth", "bayes", "sigmoid", "bayes_sigmoid", "bayes_sigmoid_weighted")


def figures(study: Path) -> dict[str, Figure]:
    """By file name; calibration and uncertainty are those of the first seeds."""
    variants = read(study)
    if "softmax" not in variants:
        return {}
    rows = {}
    for name, variant in variants.items():
        if name in DRAWN:
            row = read_json(study / f"{name}-seed{min(variant.seeds)}" / "eval_test.json")
            rows[variant.label] = row
    calibrated = {label: row for label, row in rows.items() if "calibration" in row}
    foreign = {}
    for label, row in rows.items():
        # of those with point weights one is enough
        if "ood" in row and (not foreign or "aleatoric" in row):
            foreign[label] = row
    curves = {}
    for name in DRAWN:  # a missing one keeps its look
        variant = variants.get(name, Variant(name))
        curves[variant.label] = variant.curves
    found = {
        "summary": summary_figure(variants),
        "val_nll": curves_figure(curves),
        "reliability": reliability_figure(calibrated),
        "uncertainty": uncertainty_figure(foreign),
    }
    return {name: figure for name, figure in found.items() if figure}


@styled
def summary_figure(variants: dict[str, Variant]) -> Figure:
    """Perplexity relative to softmax, and ECE: a mark for each seed, a bar for their mean."""
    height = 0.9 + 0.3 * len(variants)
    figure, ((ratios, errors),) = panels(1, 2, height, sharey=True)
    ratios.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
    for i, (name, variant) in enumerate(variants.items()):
        color = COLOURS[family(name)]
        marker = MARKERS[family(name) % len(MARKERS)]
        for panel, score in ((ratios, "ratio"), (errors, "ece")):
            values = variant.values(score)
            panel.plot(values, [i] * len(values), color=color, marker=marker, linestyle="")
            if values:
                panel.plot(mean(values), i, "k|", markersize=14)
    labels = [textwrap.fill(variant.label, 46) for variant in variants.values()]
    ratios.set_yticks(range(len(variants)), labels, fontsize=7)
    ratios.set_ylim(len(variants) - 0.5, -0.5)
    ratios.set_xlabel("test perplexity / softmax's")
    errors.set_xscale("log")  # from thousandths to tenths
    errors.set_xlabel("expected calibration error")
    return figure


def family(name: str) -> int:
    """The index of a variant's colour: the last one in DRAWN that its name begins with."""
    found = len(DRAWN)
    for i, drawn in enumerate(DRAWN):
        if name.startswith(drawn):
            found = i
    return found
