"""The pictures of a comparison of runs: validation curves, calibration, selective prediction, uncertainty.

Each `..._figure` returns a matplotlib figure, or None where no run has the numbers for it; draw() writes them all as
PNG and SVG. They are made for the width of a README, 830 pixels. Rows are what evaluate.py writes, by the run's name.
"""

import math
import re
import textwrap
from functools import partial
from pathlib import Path

from engine.base.files import atomic_write

# Okabe and Ito's, which the colour-blind can tell apart, but for the yellow, too pale on white; dashes and markers
# differ too, and as the three lengths have no common divisor, so do the combinations of any 84 runs
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7")
DASHES = ("-", "--", "-.", (0, (1, 1.5)))
MARKERS = ("o", "s", "^")
IN_DOMAIN, OUTSIDE = COLOURS[2], COLOURS[4]
WIDTH = 8.3  # inches, at 100 pixels each
COLUMNS = 4  # panels beside each other
SCORES = {  # as the tables name them
    "confidence": "confidence",
    "entropy": "total uncertainty (nats)",
    "mutual_information": "epistemic uncertainty (nats)",
}


def draw(
    folder: Path, rows: dict[str, dict], curves: dict[str, list[dict]]
) -> dict[str, list[Path]]:
    """Write all pictures that there are numbers for; name -> its PNG and SVG. The same numbers give the same bytes."""
    import matplotlib

    figures = {
        "val_nll": curves_figure(curves, rows),
        "reliability": reliability_figure(rows),
        "risk_coverage": risk_coverage_figure(rows),
        "uncertainty": uncertainty_figure(rows),
    }
    written = {
        name: [folder / f"{name}.png", folder / f"{name}.svg"]
        for name, figure in figures.items()
        if figure
    }
    with matplotlib.rc_context({"svg.hashsalt": "pictures"}):  # else the ids in an SVG are random
        for name, (png, svg) in written.items():
            atomic_write(png, partial(figures[name].savefig, format="png", dpi=200))
            atomic_write(svg, partial(figures[name].savefig, format="svg", metadata={"Date": None}))
    return written


def label(name: str, row: dict) -> str:
    """The name of a run as it stands beside its numbers: a tempered posterior says so."""
    if row.get("kl_weight", 1) == 1 or "kl_weight" in name:
        return name
    tempered = f"kl_weight {row['kl_weight']:g}"
    return f"{name[:-1]}, {tempered})" if name.endswith(")") else f"{name} ({tempered})"


def curves_figure(curves: dict[str, list[dict]], rows: dict[str, dict]):
    """Validation nll against tokens and against time, a line for each run."""
    curves = {name: list(filter(_is_evaluation, curve)) for name, curve in curves.items()}
    trained = {
        name: [record for record in curve if record["step"] > 0] for name, curve in curves.items()
    }
    if any(trained.values()):  # step 0 would flatten all that follows
        curves = trained
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return None
    figure, axes = panels(1, 2, 3.4, sharey=True)
    longest = max(record["seconds"] for curve in curves.values() for record in curve)
    unit, seconds = ("hours", 3600) if longest > 2 * 3600 else ("minutes", 60)
    order = list(dict.fromkeys([*rows, *curves]))  # a run looks the same in all pictures
    for name, curve in curves.items():
        nll, about = (
            [record["val_nll"] for record in curve],
            _plain(label(name, rows.get(name, {}))),
        )
        for panel, key, scale in ((axes[0, 0], "tokens", 1e6), (axes[0, 1], "seconds", seconds)):
            x = [record[key] / scale for record in curve]
            panel.plot(
                x, nll, **line_style(order.index(name), len(x)), label=f"{about}: {nll[-1]:.3f}"
            )
    later = [
        r["val_nll"]
        for curve in curves.values()
        for r in curve
        if r["tokens"] >= curve[-1]["tokens"] / 10
    ]
    low, high = (
        min(filter(math.isfinite, later), default=0),
        max(filter(math.isfinite, later), default=0),
    )
    if low < high:  # the first tenth may leave at the top: the end is what is compared
        axes[0, 0].set_ylim(low - (high - low) / 20, high + (high - low) / 20)
    axes[0, 0].set(xlabel="training tokens (millions)", ylabel="validation nll (nats per token)")
    axes[0, 1].set(xlabel=f"time ({unit})")
    show_legend(figure, axes[0, 0])
    return figure


def _is_evaluation(record: dict) -> bool:
    """Whether a line of metrics.jsonl, which anyone may have edited, has a point of the curve."""
    return all(isinstance(record.get(key), int | float) for key in ("val_nll", "tokens", "seconds"))


def reliability_figure(rows: dict[str, dict]):
    """A panel for each run: accuracy against confidence with its 95 % interval; as bars, the share of tokens."""
    rows = {name: row for name, row in rows.items() if sum(row.get("calibration", {}).get("n", ()))}
    if not rows:
        return None
    n_rows = math.ceil(len(rows) / COLUMNS)
    n_columns = math.ceil(len(rows) / n_rows)
    figure, axes = panels(n_rows, n_columns, 2.9 * n_rows, sharex=True, sharey=True)
    for panel in axes.flat[len(rows) :]:
        panel.set_visible(False)
    for panel, (name, row) in zip(axes.flat, rows.items(), strict=False):
        counts, n_tokens = row["calibration"]["n"], sum(row["calibration"]["n"])
        bins = list(
            zip(*(row["calibration"][key] for key in ("confidence", "accuracy", "n")), strict=True)
        )
        confidence, accuracy, n = zip(*(values for values in bins if values[2]), strict=True)
        ends = zip(*(wilson(*share) for share in zip(accuracy, n, strict=True)), strict=True)
        error = [
            [abs(end - share) for end, share in zip(side, accuracy, strict=True)] for side in ends
        ]
        edges = [i / len(counts) for i in range(len(counts) + 1)]
        panel.stairs(
            [count / n_tokens for count in counts], edges, fill=True, color=IN_DOMAIN, alpha=0.5
        )
        panel.plot([0, 1], [0, 1], color="0.5", linewidth=1)
        panel.errorbar(
            confidence, accuracy, error, color="black", marker="o", markersize=4, linewidth=1.2
        )
        panel.text(0.05, 0.92, f"ECE {row['ece']:.4f}", transform=panel.transAxes)
        panel.set(xlim=(0, 1.02), ylim=(0, 1.02), xticks=(0, 0.5, 1))
        panel.set_title(wrap(label(name, row), 26), fontsize=10)
        panel.tick_params(labelbottom=True)  # also where the panel below is not there
    figure.supxlabel("confidence: probability of the likeliest token", fontsize=10)
    figure.supylabel("accuracy; bars: share of tokens", fontsize=10)
    return figure


def wilson(share: float, n: int) -> tuple[float, float]:
    """The ends of Wilson's 95 % interval for a share seen in n trials; not empty where all of them agree."""
    z = 1.96
    middle, half = (
        share + z * z / (2 * n),
        z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2),
    )
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def risk_coverage_figure(rows: dict[str, dict]):
    """A panel for each score: the error rate of the answers that are given, the surest first."""
    risks = {name: row["risk_coverage"] for name, row in rows.items() if "risk_coverage" in row}
    scores = [
        score for score in SCORES if any(score in of_run["risk"] for of_run in risks.values())
    ]
    if not scores:
        return None
    figure, axes = panels(1, len(scores), 3.4, sharey=True)
    for panel, score in zip(axes.flat, scores, strict=True):
        for i, (name, of_run) in enumerate(risks.items()):
            coverage, risk = of_run["coverage"], of_run["risk"].get(score, [])
            x = coverage[: len(risk)]  # a line without points keeps the run's place in the legend
            panel.plot(x, risk, **line_style(i, len(x)), label=_plain(label(name, rows[name])))
        panel.set_title("by " + SCORES[score].removesuffix(" (nats)"), fontsize=10)
        panel.set(xlabel="share of tokens answered", xlim=(0, 1), xticks=(0, 0.5, 1))
    axes[0, 0].set(ylabel="error rate of the answers", ylim=(0, None))
    show_legend(figure, axes[0, 0])
    return figure


def uncertainty_figure(rows: dict[str, dict]):
    """Histograms of each score (columns) for each run (rows), in its own domain and, where there is one, outside."""
    rows = {name: row for name, row in rows.items() if "histograms" in row}
    scores = [score for score in SCORES if any(score in row["histograms"] for row in rows.values())]
    if not scores:
        return None
    figure, axes = panels(len(rows), len(scores), 0.8 + 1.4 * len(rows), sharex="col")
    for line, (name, row) in zip(axes, rows.items(), strict=True):
        for panel, score in zip(line, scores, strict=True):
            _histogram(panel, row, score)
        line[0].set_ylabel(wrap(label(name, row), 18), fontsize=9)
    for panel, score in zip(axes[-1], scores, strict=True):
        panel.set(xlabel=SCORES[score], xlim=_seen(rows, score))
    figure.supylabel("share of tokens", fontsize=10)
    show_legend(figure, *axes.flat)
    return figure


def _histogram(panel, row: dict, score: str) -> None:
    """One score of one run: filled in its domain, an outline outside."""
    panel.set_yticks([])
    if score == "mutual_information":
        panel.set_xscale("log")
        panel.xaxis.set_minor_formatter("")
    if score not in row["histograms"]:
        where = {"transform": panel.transAxes, "ha": "center", "va": "center"}
        panel.text(0.5, 0.5, "point weights have none", **where, color="0.4")
        return
    inside, ood = row["histograms"][score], row.get("ood", {})
    about = {
        "fill": True,
        "color": IN_DOMAIN,
        "label": f"in domain: {_plain(Path(row['dataset']).name)}",
    }
    panel.stairs(inside["share"], inside["edges"], **about)
    if outside := ood.get("histograms", {}).get(score):
        about = {
            "linewidth": 1.5,
            "color": OUTSIDE,
            "label": f"outside: {_plain(Path(ood['dataset']).name)}",
        }
        panel.stairs(outside["share"], outside["edges"], **about)
        of_units = ", ".join(f"{unit} {value:.2f}" for unit, value in ood["auroc"][score].items())
        panel.set_title(f"AUROC: {of_units}", fontsize=9, pad=3)


def _seen(rows: dict[str, dict], score: str) -> tuple[float, float]:
    """The part of a score's axis where any run has more than a thin tail of its tokens."""
    histograms = [
        part["histograms"] for row in rows.values() for part in (row, row.get("ood")) if part
    ]
    used = []
    for share, edges in ((h[score]["share"], h[score]["edges"]) for h in histograms if score in h):
        bins = zip(share, edges[:-1], edges[1:], strict=True)
        used += [ends for here, *ends in bins if here >= max(share) / 200]
    low, high = min(low for low, _ in used), max(high for _, high in used)
    if score != "mutual_information":
        return low, high
    return 10 ** math.floor(math.log10(low or 1e-9)), 10 ** math.ceil(math.log10(high))


def panels(n_rows: int, n_columns: int, height: float, **options):
    """A figure and its axes (n_rows, n_columns); no pyplot, which would keep every figure and look for a screen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH if n_columns > 1 else WIDTH / 2, height), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False, **options)
    for panel in axes.flat:
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
    return figure, axes


def line_style(i: int, n_points: int) -> dict:
    """How run i is drawn, with some ten markers on a line of n_points, not where another run has its own."""
    style = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}
    every = max(1, n_points // 10)
    marker = {
        "marker": MARKERS[i % len(MARKERS)],
        "markevery": (3 * i % every, every),
        "markersize": 5,
    }
    return style | marker | {"markerfacecolor": "none", "linewidth": 1.5}


def _plain(text: str) -> str:
    """As matplotlib shows it: $ would begin a formula, and what begins with _ is left out of legends."""
    return (" " + text if text.startswith("_") else text).replace("$", r"\$")


def wrap(text: str, width: int) -> str:
    """In lines of about the width, what stands in brackets on its own; an option stays whole, with its value."""
    text = _plain(text).replace(" (", "\n(")
    text = re.sub(
        r"(\w+) (?=\d)", lambda match: match[1].replace("_", "\1") + "\N{NO-BREAK SPACE}", text
    )
    breakable = text.replace("_", "_\0 ")  # names may be cut behind a _
    wrapped = "\n".join(textwrap.fill(line, width) for line in breakable.splitlines())
    return wrapped.replace("\0 ", "").replace("\0", "").replace("\1", "_")


def show_legend(figure, *panels) -> None:
    """One legend below all panels, with each name once."""
    handles = {}
    for panel in panels:
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    n_columns = max(1, min(4, 118 // (8 + max(map(len, handles), default=1))))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(handles) / n_columns))
    figure.legend(
        handles.values(),
        handles,
        loc="outside lower center",
        ncols=n_columns,
        frameon=False,
        fontsize=9,
    )
