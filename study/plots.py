"""The plots of a study: a summary of its variants, and validation curves."""

import textwrap
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from engine.eval.plots import LOOKS, curves_figure, panels, styled
from study.logs import Variant, read

# variants with a curve; more would not be readable
DRAWN = ("softmax", "smooth", "bayes", "sigmoid", "bayes_sigmoid", "bayes_sigmoid_weighted")


def figures(study: Path) -> dict[str, Figure]:
    """The figures by file name."""
    variants = read(study)
    if "softmax" not in variants:
        return {}
    curves = {}
    for name in DRAWN:  # a missing variant keeps its colour
        variant = variants.get(name, Variant(name))
        curves[variant.label] = variant.curves
    figures = {"summary": summary_figure(variants)}
    if curve := curves_figure(curves):
        figures["val_nll"] = curve
    return figures


@styled
def summary_figure(variants: dict[str, Variant]) -> Figure:
    """Perplexity relative to softmax, and ECE: a mark for each seed, a bar for their mean."""
    height = 0.9 + 0.3 * len(variants)
    figure, ((ratios, errors),) = panels(1, 2, height, sharey=True)
    ratios.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
    looks = list(LOOKS)
    for i, (name, variant) in enumerate(variants.items()):
        look = looks[family(name)] | {"linestyle": ""}
        for panel, score in ((ratios, "ratio"), (errors, "ece")):
            values = variant.values(score)
            panel.plot(values, [i] * len(values), **look)
            if values:
                panel.plot(mean(values), i, "k|", markersize=14)
    labels = [textwrap.fill(variant.label, 46) for variant in variants.values()]
    ratios.set_yticks(range(len(variants)), labels, fontsize=7)
    ratios.set_ylim(len(variants) - 0.5, -0.5)
    ratios.set_xlabel("test perplexity / softmax's")
    errors.set_xscale("log")  # the values range from thousandths to tenths
    errors.set_xlabel("expected calibration error")
    return figure


def family(name: str) -> int:
    """The index of a variant's colour: the last name in DRAWN with which its own name begins."""
    found = (i for i, drawn in enumerate(DRAWN) if name.startswith(drawn))
    return max(found, default=len(DRAWN))
