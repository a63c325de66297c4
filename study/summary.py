"""The tables and plots of the studies, from their logs: means and deviations over seeds.

    # rewrites the tables of all pages, and the plots in training_logs/<study>/
    python -m study.summary

A page asks for a table with <!-- table: STUDY KIND --> ... <!-- end -->. KIND is a key of SHORT or
COLUMNS, or tuning. A run that you add as training_logs/<study>/<variant>-seed<k>/, with
metrics.jsonl and eval_test.json, appears in the tables too.
"""

import math
import re
from itertools import zip_longest
from pathlib import Path
from statistics import mean, stdev

from engine.base.errors import UserError, run_main
from engine.base.files import read_json_lines, write_text
from engine.eval.plots import save
from engine.eval.table import NAMES, without_empty
from study.logs import LABELS, Variant, label_of, place, read, without_kind
from study.plots import DRAWN, figures
from study.variants import FOREIGN

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "training_logs"
PAGES = [ROOT / "README.md", *sorted(LOGS.rglob("README.md")), *sorted(ROOT.glob("docs/*.md"))]
MARKED = re.compile(r"(<!-- table: ([^\n]*?) -->).*?(<!-- end -->|(?=<!-- table: )|\Z)", re.DOTALL)
RANKED = {name: head for name, head in NAMES.items() if name != "nll"}
# kind of table -> number -> head of its column: format, ± if the deviation over seeds is shown
SUMMARY = {
    "perplexity": "perplexity: .2f",
    "ratio": "vs softmax: .3f ±",
    "ece": "ECE: .4f ±",
}
SHORT = {  # only the variants of DRAWN, under labels without options
    "summary": SUMMARY,
    "brief": SUMMARY | {"training_seconds": "training (s): .0f"},
}
COLUMNS = {
    "prediction": {
        "n_seeds": "seeds: .0f",
        "nll": "nll: .3f ±",
        "nll_se": "± documents: .3f",
        "perplexity": "perplexity: .2f",
        "ratio": "vs softmax: .3f ±",
        "perplexity_desmoothed": "de-smoothed: .2f",
        "bits_per_byte": "bits per byte: .4f",
        "accuracy": "accuracy: .4f",
        "ece": "ECE: .4f ±",
        "brier": "Brier: .4f",
        "aurc_confidence": "AURC: .4f",
    },
    "uncertainty": {
        "ood_auroc_nll_block": "OOD by nll: .3f",
        "ood_auroc_entropy_block": "by total: .3f ±",
        "ood_auroc_mutual_information_block": "by epistemic: .3f ±",
        "ood_auroc_entropy_token": "token by total: .3f",
        "ood_auroc_mutual_information_token": "token by epistemic: .3f",
        "entropy": "total: .3f",
        "mutual_information": "epistemic: .4f",
        "aurc_mutual_information": "AURC by epistemic: .4f",
        "log_sum_sigma": "ln Σσ: +.4f",
    },
    "calibration": {
        "n_seeds": "seeds: .0f",
        "temperature": "temperature: .3f ±",
        "perplexity": "perplexity: .2f",
        "ratio": "vs softmax: .3f ±",
        "perplexity_tempered": "tempered: .2f",
        "ratio_tempered": "vs tempered softmax: .3f ±",
        "ece": "ECE: .4f ±",
        "ece_tempered": "tempered ECE: .4f ±",
        "brier": "Brier: .4f",
        "brier_tempered": "tempered Brier: .4f",
    },
    "errors": {f"prr_{name}": f"{head}: .3f ±" for name, head in RANKED.items()},
    "reducible": {f"better_spearman_{name}": f"{head}: .3f ±" for name, head in RANKED.items()},
    "texts": {
        "continuations_self_bleu": "Self-BLEU: .2f",
        "continuations_distinct_4": "Distinct-4: .3f",
    },
}
for kind in ("mutual_information", "mahalanobis", "entropy"):  # AUROC on each OOD text
    for level in ("block", "token"):
        COLUMNS[f"{kind}_{level}"] = {
            f"{text}_{kind}_{level}": f"{text.replace('_', ' ')}: .3f ±" for text in FOREIGN
        }


def table(study: Path, kind: str) -> str:
    """A table of a study in Markdown; ± is the standard deviation over seeds."""
    if kind == "tuning":
        return tuning(study)
    columns = (SHORT | COLUMNS).get(kind)
    if not columns:
        kinds = ", ".join([*SHORT, *COLUMNS, "tuning"])
        raise UserError(f"a table of kind {kind!r} is none of: {kinds}")
    found = read(study)
    variants = [unigram(found), *found.values()]
    labels = [variant.label for variant in variants]
    if kind in SHORT:
        names = [name for name in found if without_kind(name) in DRAWN]
        variants = [found[name] for name in names]
        labels = [label_of(name, {}) for name in names]
    cells = [["head", *labels]]
    for name, column in columns.items():
        head, form = column.split(": ")
        cells.append([head, *(cell(variant.values(name), form) for variant in variants)])
    return markdown(cells)


def cell(values: list[float], form: str) -> str:
    """The mean over seeds, with the standard deviation if the format ends with ±."""
    form, _, spread = form.partition(" ")
    text = format(mean(values), form) if values else ""
    if spread and len(values) > 1 and stdev(values) > 0:
        text += f" ± {stdev(values):{form}}"
    return text


def markdown(columns: list[list[str]]) -> str:
    """A table of these columns, without empty ones and empty lines; "" if no line is left."""
    _, header, lines = without_empty("", columns)
    rule = ["---"] * len(header)
    found = []
    for row in (header, rule, *lines):
        escaped = [text.replace("|", r"\|") for text in row]
        found.append(f"| {' | '.join(escaped)} |")
    return "\n".join(found) if lines else ""


def unigram(variants: dict[str, Variant]) -> Variant:
    """The scores of a prediction by the training text's token frequencies alone."""
    label = "unigram frequencies"
    nlls = [nll for variant in variants.values() for nll in variant.values("unigram_nll")]
    if not nlls:
        return Variant(label)
    numbers = {"nll": nlls[0], "perplexity": math.exp(nlls[0])}
    if "softmax" in variants:
        softmax = mean(variants["softmax"].values("nll"))
        numbers["ratio"] = math.exp(nlls[0] - softmax)
    return Variant(label, {0: numbers})


def tuning(study: Path) -> str:
    """All trials of a study: what each changed, and its validation nll; the lowest is bold."""
    trials = read_json_lines(study / "tuning.jsonl")
    names = sorted({trial["row"] for trial in trials}, key=place)
    lines = []
    for name in names:
        of_variant = [trial for trial in trials if trial["row"] == name]
        best = min(of_variant, key=lambda trial: trial["val_nll"])
        line = []
        for trial in of_variant:
            flags = ", ".join(trial["flags"]).replace("--", "").replace("=", " ")
            text = f"{flags}: {trial['val_nll']:.3f}"
            line.append(f"**{text}**" if trial is best else text)
        lines.append(line)
    columns = [["head", *(LABELS[name] for name in names)]]
    for i, column in enumerate(zip_longest(*lines, fillvalue=""), 1):
        columns.append([f"trial {i}", *column])
    return markdown(columns)


def fill(page: str) -> str:
    """The text of a page with new tables."""
    return MARKED.sub(fill_marker, page)


def fill_marker(match: re.Match) -> str:
    marker, asked, end = match.groups()
    study, _, kind = asked.rpartition(" ")
    if not study or not (LOGS / study).is_dir():
        raise UserError(f"{marker}: there is no study {study!r} in {LOGS}")
    if not end:
        raise UserError(f"{marker} has no <!-- end --> after it")
    if not (lines := table(LOGS / study, kind)):
        raise UserError(f"{marker}: the logs have nothing for this table")
    return f"{marker}\n{lines}\n{end}"


def main() -> None:
    pages = {page: fill(page.read_text(encoding="utf-8")) for page in PAGES}
    shown = set(re.findall(r"([^/\s(]+/\w+\.png)", "".join(pages.values())))
    for study in sorted(filter(Path.is_dir, LOGS.iterdir())):
        for name, figure in figures(study).items():
            if f"{study.name}/{name}.png" in shown:
                save(figure, study / f"{name}.png")
        print(f"{study.name}: tables and plots")
    for page, text in pages.items():
        write_text(page, text)


if __name__ == "__main__":
    run_main(main)
