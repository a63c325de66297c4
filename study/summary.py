"""A study's tables and pictures from its logs alone: means over seeds, and how far seeds differ.

    # the tables of all pages that ask for one, the pictures in training_logs/<study>/
    python -m study.summary

A page asks with <!-- table: STUDY KIND --> ... <!-- end -->; KIND is summary, prediction, doubt or tuning, or
for several studies with + between them beside.
A run that somebody adds, training_logs/<study>/<row>-seed<k>/ with metrics.jsonl and eval_test.json, is in them too.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from engine.base.errors import UserError, run_main
from engine.base.files import atomic_write, read_json, read_json_lines
from study.logs import LABELS, NONE, Row, place, plain_label, read, read_trials
from study.plots import figures

ROOT = Path(__file__).resolve().parents[1]
LOGS, BENCH = ROOT / "training_logs", ROOT / "bench/results.jsonl"
PAGES = [
    ROOT / "README.md",
    LOGS / "README.md",
    *sorted(LOGS.glob("*/README.md")),
    *sorted(ROOT.glob("docs/*.md")),
]
MARKED = re.compile(r"(<!-- table: ([^\n]*?) -->).*?(<!-- end -->|(?=<!-- table: )|\Z)", re.DOTALL)
MEASURED_AS = {
    "smooth_05": "smooth",
    "sigmoid_weighted": "sigmoid",
    "bayes_sigmoid_weighted": "bayes_sigmoid",
}
RATIOS = {
    "time_ratio": "time of a step",
    "memory_ratio": "memory",
}  # a training step's, relative to softmax's


class Column(NamedTuple):
    head: str
    values: Callable[[Row, Row], list[float]]  # of a row and of the study's softmax
    form: str
    spread: bool = False  # whether the standard deviation over seeds is shown


def of(head: str, name: str, form: str, spread: bool = False) -> Column:
    return Column(head, lambda row, base: row.values(name), form, spread)


SEEDS = Column("seeds", lambda row, base: [] if row.of_all else [len(row.seeds)], "{:.0f}")
NLL = of("nll", "nll", "{:.3f}", True)
PERPLEXITY = of("perplexity", "perplexity", "{:.2f}")
RATIO = Column(
    "vs softmax", lambda row, base: [1.0] if row is base else row.ratios(base), "{:.3f}", True
)
SCORES = (
    of("ECE", "ece", "{:.4f}", True),
    of("Brier", "brier", "{:.4f}"),
    of("AURC", "aurc_confidence", "{:.4f}"),
)
BY_TOTAL = of("by total", "ood_auroc_entropy_block", "{:.3f}", True)
COLUMNS = {
    "summary": (
        SEEDS,
        NLL,
        PERPLEXITY,
        RATIO,
        *SCORES,
        BY_TOTAL._replace(head="foreign text"),
        of("Self-BLEU", "continuations_self_bleu", "{:.2f}"),
        of("Distinct-4", "continuations_distinct_4", "{:.3f}"),
    ),
    "prediction": (
        SEEDS,
        NLL,
        of("± documents", "nll_se", "{:.3f}"),
        PERPLEXITY,
        RATIO,
        of("de-smoothed", "perplexity_desmoothed", "{:.2f}"),
        of("bits per byte", "bits_per_byte", "{:.4f}"),
        of("accuracy", "accuracy", "{:.4f}"),
        *SCORES,
    ),
    "doubt": (
        of("foreign text by nll", "ood_auroc_nll_block", "{:.3f}"),
        BY_TOTAL,
        of("by epistemic", "ood_auroc_mutual_information_block", "{:.3f}", True),
        of("token by total", "ood_auroc_entropy_token", "{:.3f}"),
        of("token by epistemic", "ood_auroc_mutual_information_token", "{:.3f}"),
        of("total", "entropy", "{:.3f}"),
        of("epistemic", "mutual_information", "{:.4f}"),
        of("AURC by epistemic", "aurc_mutual_information", "{:.4f}"),
        of("ln Σσ", "log_sum_sigma", "{:+.4f}"),
    ),
}


def cell(values: list[float], form: str, spread: bool) -> str:
    if not values:
        return ""
    return form.format(mean(values)) + (
        f" ± {form.format(stdev(values))}" if spread and len(values) > 1 else ""
    )


def markdown(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Columns without a number are left out; no table without lines."""
    rows = [list(header), *map(list, lines)]
    kept = [i for i in range(len(rows[0])) if i == 0 or any(row[i] for row in rows[1:])]
    rows = [[row[i] for i in kept] for row in rows]
    return "\n".join(
        f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(kept), *rows[1:]] if rows[1:]
    )


def table(study: Path, kind: str) -> str:
    """A table of a study in Markdown; ± is the standard deviation over seeds, ratios are of the same seed."""
    if other := {"tuning": tuning, "beside": beside}.get(kind):
        return other(study)
    if kind not in COLUMNS:
        raise UserError(
            f"a table of kind {kind!r} is none of: {', '.join([*COLUMNS, 'tuning', 'beside'])}"
        )
    rows, columns = read(study), COLUMNS[kind]
    base = rows.get("softmax", NONE)
    costs = cost(study, rows) if kind == "summary" else {}
    if kind in ("summary", "prediction"):
        rows = unigram(rows.values()) | rows
    cells = (
        [
            row.label,
            *(cell(c.values(row, base), c.form, c.spread) for c in columns),
            *costs.get(name, ["", ""]),
        ]
        for name, row in rows.items()
    )
    header = ["head", *(column.head for column in columns), *RATIOS.values()]
    return markdown(header, (line for line in cells if any(line[1:])))


def unigram(rows: Iterable[Row]) -> dict[str, Row]:
    """What the training text's token frequencies alone reach, where an evaluation tells."""
    nll = next((nll for row in rows for nll in row.values("unigram_nll")), None)
    numbers = {0: {"nll": nll, "perplexity": math.exp(nll)}} if nll else {}
    return {"unigram": Row("unigram frequencies", numbers, {}, True)}


def beside(studies: Path) -> str:
    """Perplexity relative to softmax's, and ECE, in several studies (their names with + between them), of the rows that
    two of them have."""
    names = studies.name.split("+")
    found, columns = [read(studies.with_name(name)) for name in names], (RATIO, SCORES[0])
    counts = Counter(row for rows in found for row in rows)
    lines = []
    for name in (name for name in counts if counts[name] > 1):
        cells = [
            cell(column.values(rows[name], rows.get("softmax", NONE)), column.form, column.spread)
            if name in rows
            else ""
            for rows in found
            for column in columns
        ]
        lines.append([plain_label(name), *cells])
    return markdown(
        ["head", *(f"{name}: {column.head}" for name in names for column in columns)], lines
    )


def tuning(study: Path) -> str:
    """All trials of a study: what each changed, and the validation nll that it ended with; the lowest is taken."""
    trials: dict[str, list[dict]] = {}
    for trial in read_trials(study / "tuning.jsonl"):
        trials.setdefault(trial["row"], []).append(trial)
    lines, n_most = [], max(map(len, trials.values()), default=0)
    for row in sorted(trials, key=place):
        best = min(trials[row], key=lambda trial: trial["val_nll"])
        cells = []
        for trial in trials[row]:
            flags = ", ".join(flag.removeprefix("--").replace("=", " ") for flag in trial["flags"])
            text = f"{flags}: {trial['val_nll']:.3f}"
            cells.append(f"**{text}**" if trial is best else text)
        lines.append([LABELS.get(row, row), *cells, *[""] * (n_most - len(cells))])
    return markdown(["head", *(f"trial {i}" for i in range(1, n_most + 1))], lines)


def cost(study: Path, rows: dict[str, Row]) -> dict[str, list[str]]:
    """By row, what its step takes relative to softmax's: bench/step.py's latest record of each head for the study's
    size, all of the machine that the latest is of; none of what was not measured."""
    path = study / f"softmax-seed{min(rows.get('softmax', NONE).seeds, default=0)}" / "config.json"
    size = size_of(read_json(path)) if path.is_file() else None
    steps = [
        r
        for r in read_json_lines(BENCH)
        if (r.get("bench"), r.get("baseline")) == ("step", "softmax")
    ]
    steps = [record for record in steps if size_of(record["shapes"]) == size]
    latest = {
        record["case"]: record for record in steps if record["machine"] == steps[-1]["machine"]
    }
    if latest:
        latest["softmax"] = dict.fromkeys(RATIOS, 1.0)
    measured = {row: latest[case] for row in rows if (case := MEASURED_AS.get(row, row)) in latest}
    return {row: [f"{record[ratio]:.2f}" for ratio in RATIOS] for row, record in measured.items()}


def size_of(options: dict) -> tuple:
    """What a step's cost depends on; vocabularies are padded to a multiple of 64."""
    shape = [options.get(name, 0) for name in ("n_layer", "n_embd", "block_size", "vocab_size")]
    return *shape[:-1], -(-shape[-1] // 64)


def fill(page: str) -> str:
    """The text of a page with its tables made anew."""

    def made(match: re.Match) -> str:
        marker, (study, _, kind), end = match[1], match[2].rpartition(" "), match[3]
        for name in study.split("+"):
            if not (LOGS / name).is_dir() or not name:
                raise UserError(f"{marker}: there is no study {name!r} in {LOGS}")
        if not end:
            raise UserError(f"{marker} has no <!-- end --> behind it")
        try:
            lines = table(LOGS / study, kind)
        except UserError as error:
            raise UserError(f"{marker}: {error}") from None
        if not lines:
            raise UserError(f"{marker}: the logs have nothing for this table")
        return f"{marker}\n{lines}\n{end}"

    return MARKED.sub(made, page)


def main() -> None:
    wanted = set()
    pages = {page: fill(page.read_text(encoding="utf-8")) for page in PAGES}
    for text in pages.values():
        wanted |= set(re.findall(r"([^/\s(]+)/(\w+)\.png", text))
    for study in sorted({study for study, _ in wanted if (LOGS / study).is_dir()}):
        for name, figure in figures(LOGS / study).items():
            if (study, name) in wanted:
                path = LOGS / study / f"{name}.png"
                atomic_write(
                    path,
                    lambda temporary, figure=figure: figure.savefig(
                        temporary, format="png", dpi=200
                    ),
                )
        print(f"{study}: tables and pictures")
    for page, text in pages.items():
        atomic_write(
            page, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8")
        )


if __name__ == "__main__":
    run_main(main)
