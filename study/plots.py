"""The pictures of a study: its rows beside each other, their validation curves, calibration and uncertainty."""

from pathlib import Path
from statistics import mean

from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from engine.base.files import read_json
from engine.eval.plots import (
    COLOURS,
    MARKERS,
    line_style,
    panels,
    reliability_figure,
    show_legend,
    uncertainty_figure,
    wrap,
)
from study.logs import NONE, Row, read

DRAWN = (
    "softmax",
    "smooth",
    "bayes",
    "sigmoid",
    "bayes_sigmoid",
    "bayes_sigmoid_weighted",
)  # more would be a tangle


def figures(study: Path) -> dict:
    """By file name; calibration and uncertainty are those of the first seeds. {} where softmax has no run."""
    rows = read(study)
    if "softmax" not in rows:
        return {}
    drawn = {
        row.label: study / f"{name}-seed{min(row.seeds)}"
        for name, row in rows.items()
        if name in DRAWN
    }
    first = {label: read_json(folder / "eval_test.json") for label, folder in drawn.items()}
    foreign = {label: row for label, row in first.items() if "ood" in row}
    doubts = {
        label: row
        for label, row in foreign.items()
        if "aleatoric" in row or row is next(iter(foreign.values()))
    }
    found = {"summary": summary_figure(rows), "val_nll": curves_figure(rows)}
    found |= {
        "reliability": reliability_figure(first),
        "uncertainty": uncertainty_figure(doubts) if doubts else None,
    }
    return {name: figure for name, figure in found.items() if figure}


def summary_figure(rows: dict[str, Row]):
    """Perplexity relative to softmax, and ECE: a mark for each seed, a bar for their mean."""
    figure, axes = panels(1, 2, 0.9 + 0.3 * len(rows), sharey=True)
    base = rows.get("softmax", NONE)
    for i, (name, row) in enumerate(rows.items()):
        for panel, values in zip(axes[0], (row.ratios(base), row.values("ece")), strict=True):
            style = {"color": COLOURS[family(name)], "marker": MARKERS[family(name) % len(MARKERS)]}
            panel.plot(values, [i] * len(values), linestyle="", markerfacecolor="none", **style)
            panel.plot(
                [mean(values)] if values else [],
                [i] * bool(values),
                "|",
                markersize=14,
                color=COLOURS[0],
            )
    axes[0, 0].axvline(1.0, color=COLOURS[0], linewidth=0.8, linestyle="--")
    axes[0, 0].set_yticks(
        range(len(rows)), [wrap(row.label, 46) for row in rows.values()], fontsize=7
    )
    axes[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    axes[0, 0].locator_params(axis="x", nbins=5)
    found = [ece for row in rows.values() for ece in row.values("ece") if ece > 0] or [1.0]
    axes[0, 1].set_xscale("log")  # from thousandths to tenths
    wide = max(found) > 9 * min(found)
    axes[0, 1].xaxis.set_major_locator(
        LogLocator(subs=(1, 2, 5) if wide else (1, 1.5, 2, 3, 4, 5, 7))
    )
    axes[0, 1].xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes[0, 1].xaxis.set_minor_formatter(NullFormatter())
    axes[0, 1].tick_params(axis="x", labelsize=7)
    axes[0, 0].set_xlabel("test perplexity / softmax's")
    axes[0, 1].set_xlabel("expected calibration error")
    return figure


def family(name: str) -> int:
    """By which a row is coloured: the last place in DRAWN of a row that its name begins with, or one behind all."""
    return max((i for i, drawn in enumerate(DRAWN) if name.startswith(drawn)), default=len(DRAWN))


def curves_figure(rows: dict[str, Row]):
    """Validation nll against tokens read, and what is left of it without softmax's of the same seed: of the rows DRAWN
    the mean over seeds, in a band from least to most. None where no run has a curve."""
    base = rows.get("softmax", NONE)
    found = {
        name: points
        for name, row in rows.items()
        if name in DRAWN and (points := shared(row, base))
    }
    if not found:
        return None
    figure, axes = panels(1, 2, 3.2)
    for name, points in found.items():
        tokens, *of_panels = zip(*points, strict=True)
        millions = [n / 1e6 for n in tokens]
        for panel, values in zip(axes[0], of_panels, strict=True):
            style = {"label": rows[name].label, **line_style(family(name), len(tokens))}
            panel.plot(millions, list(map(mean, values)), **style)
            band = {"alpha": 0.15, "color": COLOURS[family(name)]}
            panel.fill_between(millions, list(map(min, values)), list(map(max, values)), **band)
            panel.set_xlabel("training tokens (millions)")
    axes[0, 0].set_ylabel("validation nll (nats per token)")
    axes[0, 1].set_ylabel("difference to softmax, same seed")
    show_legend(figure, axes[0, 0])
    return figure


def shared(row: Row, base: Row) -> list[tuple[int, list[float], list[float]]]:
    """Tokens read, where each run of the row and the base's of its seed has an evaluation; there the runs' validation
    nlls, and what they are above the base's. Runs without a curve are left out."""
    pairs = [
        (curve, base.curves[seed])
        for seed, curve in row.curves.items()
        if curve and base.curves.get(seed)
    ]
    tokens = (
        sorted(set.intersection(*(curve.keys() & of_base.keys() for curve, of_base in pairs)))
        if pairs
        else []
    )
    return [
        (at, [curve[at] for curve, _ in pairs], [curve[at] - of[at] for curve, of in pairs])
        for at in tokens
    ]
