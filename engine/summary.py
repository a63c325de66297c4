"""A study's tables and pictures from its logs alone: means over seeds, and how far seeds differ.

    python -m engine.summary       # the tables of all pages that ask for one, the pictures in training_logs/<study>/

A page asks with <!-- table: STUDY KIND --> ... <!-- end -->; KIND is prediction, doubt, tuning or cost. Whoever
adds a run, training_logs/<study>/<row>-seed<k>/ with metrics.jsonl and eval_test.json, finds it in them the next time.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from engine.errors import UserError, run
from engine.files import replace
from engine.logger import read_records
from engine.pictures import COLOURS, MARKERS, line_style, panels, reliability_figure, show_legend, uncertainty_figure
from engine.table import flat

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "training_logs"
PAGES = [ROOT / "README.md", LOGS / "README.md", *sorted(ROOT.glob("docs/*.md"))]
LABELS = {  # of rows, in their order
    "softmax": "softmax",
    "smooth_05": "smooth, ε = 0.05",
    "smooth": "smooth, ε = 0.1",
    "bayes": "Bayes",
    "sigmoid": "sigmoid",
    "sigmoid_regularised": "sigmoid regularised",
    "sigmoid_weighted": "sigmoid weighted",
    "bayes_sigmoid": "Bayes + sigmoid",
    "bayes_sigmoid_weighted": "Bayes + sigmoid weighted",
    "dropout": "softmax, dropout",
}
KINDS_OF_RUN = {"": "", "_averaged": ", averaged", "_ensemble_of_4": ", ensemble of 4"}  # eval_test<...>.json
MAIN = ("softmax", "smooth", "bayes", "sigmoid", "bayes_sigmoid", "bayes_sigmoid_weighted")


class Row(NamedTuple):
    """A row of a study: its numbers (flat names) by seed, and the records of its training."""

    label: str
    seeds: dict[int, dict]
    curves: dict[int, list[dict]]

    def values(self, name: str) -> list[float]:
        return [numbers[name] for numbers in self.seeds.values() if name in numbers]


NONE = Row("", {}, {})


def read(study: Path) -> dict[str, Row]:
    """All rows of a study's folder by name (a row's, with what its predictions were averaged over), in order."""
    found: dict[str, Row] = {}
    for folder in sorted(study.glob("*-seed*"), key=place):
        row, seed = folder.name.rpartition("-seed")[::2]
        curve = read_records(folder / "metrics.jsonl")
        for kind in KINDS_OF_RUN:
            path = folder / f"eval_test{kind}.json"
            if path.is_file():
                numbers = result(path)
                label = label_of(row, numbers) + KINDS_OF_RUN[kind]
                name = found.setdefault(row + kind, Row(label, {}, {}))
                name.seeds[int(seed)], name.curves[int(seed)] = numbers, curve
    return found


def result(path: Path) -> dict:
    try:
        return flat(json.loads(path.read_text()))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); copy it from its run again") from None


def place(folder: Path) -> tuple:
    """Rows in their order, a taught one behind its own; unknown ones last."""
    row, seed = folder.name.rpartition("-seed")[::2]
    known, plain = list(LABELS), row.removesuffix("_taught")
    return known.index(plain) if plain in known else len(known), plain, row != plain, int(seed)


def label_of(row: str, numbers: dict) -> str:
    """A tempered posterior says so."""
    plain = row.removesuffix("_taught")
    tempered = f", kl_weight {numbers['kl_weight']:g}" if numbers.get("kl_weight", 1) != 1 else ""
    return LABELS.get(plain, plain) + tempered + (", taught" if row != plain else "")


def ratios(row: Row, base: Row) -> list[float]:
    """Perplexities over those of the same seed of the base; an ensemble's over the mean of the base's."""
    paired = {seed: [base.seeds[seed]] for seed in row.seeds if seed in base.seeds}
    if base.seeds and row.label.endswith("ensemble of 4"):
        paired = dict.fromkeys(row.seeds, list(base.seeds.values()))
    return [math.exp(row.seeds[seed]["nll"] - mean(one["nll"] for one in of)) for seed, of in paired.items()]


def lowest(row: Row) -> list[float]:
    return [min(nlls(curve)) for curve in row.curves.values()]


class Column(NamedTuple):
    head: str
    values: Callable[[Row, Row], list[float]]  # of a row and of the study's softmax
    form: str
    spread: bool = False  # whether the standard deviation over seeds is shown


def of(head: str, name: str, form: str, spread: bool = False) -> Column:
    return Column(head, lambda row, base: row.values(name), form, spread)


COLUMNS = {
    "prediction": (
        Column("seeds", lambda row, base: [len(row.seeds)], "{:.0f}"),
        of("nll", "nll", "{:.3f}", True),
        of("perplexity", "perplexity", "{:.2f}"),
        Column("vs softmax", lambda row, base: [1.0] if row is base else ratios(row, base), "{:.3f}", True),
        of("de-smoothed", "perplexity_desmoothed", "{:.2f}"),
        Column("lowest val nll", lambda row, base: lowest(row), "{:.3f}"),
        of("bits per byte", "bits_per_byte", "{:.4f}"),
        of("accuracy", "accuracy", "{:.4f}"),
        of("ECE", "ece", "{:.4f}", True),
        of("Brier", "brier", "{:.4f}"),
        of("AURC", "aurc_confidence", "{:.4f}"),
    ),
    "doubt": (
        of("foreign text by nll", "ood_auroc_nll_block", "{:.3f}"),
        of("by total", "ood_auroc_entropy_block", "{:.3f}", True),
        of("by epistemic", "ood_auroc_mutual_information_block", "{:.3f}", True),
        of("total", "entropy", "{:.3f}"),
        of("epistemic", "mutual_information", "{:.4f}"),
        of("AURC by epistemic", "aurc_mutual_information", "{:.4f}"),
        of("ln Σσ", "log_sum_sigma", "{:+.4f}"),
        of("Self-BLEU", "continuations_self_bleu", "{:.2f}"),
        of("Distinct-4", "continuations_distinct_4", "{:.3f}"),
        of("repetition", "continuations_repetition", "{:.4f}"),
    ),
}


def cell(values: list[float], form: str, spread: bool) -> str:
    if not values:
        return ""
    texts = [form.format(mean(values)), form.format(stdev(values)) if spread and len(values) > 1 else ""]
    texts = [re.sub(r"^([+-]?)0\.", r"\1.", text) if form in ("{:.4f}", "{:+.4f}") else text for text in texts]
    return " ± ".join(filter(None, texts))


def markdown(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Columns without a number are left out."""
    rows = [list(header), *map(list, lines)]
    kept = [i for i in range(len(rows[0])) if i == 0 or any(row[i] for row in rows[1:])]
    rows = [[row[i] for i in kept] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(kept), *rows[1:]])


def table(study: Path, kind: str) -> str:
    """A table of a study in Markdown; ± is the standard deviation over seeds, ratios are of the same seed."""
    if other := {"tuning": tuning, "cost": cost}.get(kind):
        return other(study)
    if kind not in COLUMNS:
        raise UserError(f"a table of kind {kind!r} is none of: {', '.join([*COLUMNS, 'tuning', 'cost'])}")
    rows, columns = read(study), COLUMNS[kind]
    base = rows.get("softmax", NONE)
    lines = ([row.label, *(cell(c.values(row, base), c.form, c.spread) for c in columns)] for row in rows.values())
    return markdown(["head", *(column.head for column in columns)], lines)


def tuning(study: Path) -> str:
    """All trials of a study: what each changed, and the validation nll that it ended with; the lowest is taken."""
    trials: dict[str, list[dict]] = {}
    path = study / "tuning.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else ():
        trials.setdefault((trial := json.loads(line))["row"], []).append(trial)
    lines = []
    for row in sorted(trials, key=lambda row: place(Path(f"{row}-seed0"))):
        best = min(trials[row], key=lambda trial: trial["val_nll"])
        cells = []
        for trial in trials[row]:
            flags = ", ".join(flag.removeprefix("--").replace("=", " ") for flag in trial["flags"])
            text = f"{flags}: {trial['val_nll']:.3f}"
            cells.append(f"**{text}**" if trial is best else text)
        lines.append([LABELS.get(row, row), *cells, *[""] * (3 - len(cells))])
    return markdown(["head", "trial 1", "trial 2", "trial 3"], lines)


def cost(study: Path) -> str:
    """What a step of each head takes, relative to softmax's: bench/step.py's latest records for the study's size."""
    rows = read(study)
    if "softmax" not in rows:
        return ""
    options = json.loads((study / f"softmax-seed{min(rows['softmax'].seeds)}" / "config.json").read_text())
    latest = {}
    for line in (ROOT / "bench/results.jsonl").read_text().splitlines():
        record = json.loads(line)
        same = record["bench"] == "step" and all(
            record["shapes"][size] == options[size] for size in ("n_layer", "n_embd")
        )
        if same and record["baseline"] == "softmax":
            latest[record["case"]] = record
    lines = [["softmax", "1.00", "1.00"]]
    for row in rows:
        record = latest.get(row) or latest.get(row.removesuffix("_05").removesuffix("_weighted"))
        if record:
            lines.append([rows[row].label, f"{record['time_ratio']:.2f}", f"{record['memory_ratio']:.2f}"])
    return markdown(["head", "time of a step", "peak memory"], lines)


def summary_figure(rows: dict[str, Row]):
    """Perplexity relative to softmax, and ECE: a mark for each seed, a bar for their mean."""
    figure, axes = panels(1, 2, 0.9 + 0.26 * len(rows), sharey=True)
    base = rows.get("softmax", NONE)
    for i, row in enumerate(rows.values()):
        for panel, values in zip(axes[0], (ratios(row, base), row.values("ece")), strict=True):
            style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            panel.plot(values, [i] * len(values), linestyle="", markerfacecolor="none", **style)
            panel.plot([mean(values)] if values else [], [i] * bool(values), "|", markersize=14, color=COLOURS[0])
    axes[0, 0].axvline(1.0, color=COLOURS[0], linewidth=0.8, linestyle="--")
    axes[0, 0].set_yticks(range(len(rows)), [row.label for row in rows.values()], fontsize=8)
    axes[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    axes[0, 1].locator_params(axis="x", nbins=6)
    axes[0, 0].set_xlabel("test perplexity / softmax's, same seed")
    axes[0, 1].set_xlabel("expected calibration error")
    return figure


def curves_figure(rows: dict[str, Row]):
    """Validation nll against tokens read, and what is left of it without softmax's of the same seed: the main rows'
    mean over seeds, in a band from least to most."""
    figure, axes = panels(1, 2, 3.2)
    base = {seed: nlls(curve) for seed, curve in rows.get("softmax", NONE).curves.items()}
    for i, row in enumerate(row for name, row in rows.items() if name in MAIN):
        found = {seed: nlls(curve) for seed, curve in row.curves.items() if seed in base}
        gaps = [[nll - at for nll, at in zip(curve, base[seed], strict=True)] for seed, curve in found.items()]
        tokens = [record["tokens"] for record in next(iter(row.curves.values())) if "val_nll" in record][1:]
        for panel, curves in zip(axes[0], (found.values(), gaps), strict=True):
            points = list(zip(*curves, strict=True))
            panel.plot(tokens, list(map(mean, points)), label=row.label, **line_style(i, len(tokens)))
            panel.fill_between(tokens, list(map(min, points)), list(map(max, points)), alpha=0.15, color=COLOURS[i])
            panel.set_xlabel("training tokens read")
    axes[0, 0].set_ylabel("validation nll (nats per token)")
    axes[0, 1].set_ylabel("difference to softmax, same seed")
    show_legend(figure, axes[0, 0])
    return figure


def nlls(curve: list[dict]) -> list[float]:
    """Of a run's evaluations, but for the one before the first step."""
    return [record["val_nll"] for record in curve if "val_nll" in record and record["step"]]


def figures(study: Path) -> dict:
    """The pictures of a study, by file name; calibration and uncertainty are those of the main rows' first seeds."""
    rows = read(study)
    if "softmax" not in rows:
        return {}
    main = {row.label: study / f"{name}-seed{min(row.seeds)}" for name, row in rows.items() if name in MAIN}
    first = {label: json.loads((folder / "eval_test.json").read_text()) for label, folder in main.items()}
    foreign = {label: row for label, row in first.items() if "ood" in row}
    doubts = {label: row for label, row in foreign.items() if "aleatoric" in row or row is next(iter(foreign.values()))}
    found = {"summary": summary_figure(rows), "val_nll": curves_figure(rows)}
    found |= {"reliability": reliability_figure(first), "uncertainty": uncertainty_figure(doubts) if doubts else None}
    return {name: figure for name, figure in found.items() if figure}


def fill(page: str) -> str:
    """The text of a page with its tables made anew."""

    def made(match: re.Match) -> str:
        study, kind = match[2].split()
        return f"{match[1]}\n{table(LOGS / study, kind)}\n{match[3]}"

    return re.sub(r"(<!-- table: (\w+ \w+) -->)\n.*?\n?(<!-- end -->)", made, page, flags=re.DOTALL)


def main() -> None:
    wanted = set()
    for page in PAGES:
        text = fill(page.read_text(encoding="utf-8"))
        replace(page, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
        wanted |= set(re.findall(r"(\w+)/(\w+)\.png", text))
    for study in sorted({study for study, _ in wanted if (LOGS / study).is_dir()}):
        for name, figure in figures(LOGS / study).items():
            if (study, name) in wanted:
                path = LOGS / study / f"{name}.png"
                replace(path, lambda temporary, figure=figure: figure.savefig(temporary, format="png", dpi=200))
        print(f"{study}: tables and pictures")


if __name__ == "__main__":
    run(main)
