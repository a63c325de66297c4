"""Tables of results: aligned text for a terminal, Markdown, CSV."""

import csv
import io
from collections.abc import Mapping
from typing import NamedTuple

from engine.eval.metrics import MetricAccumulator, spread
from engine.eval.validation import exp

# title of a table -> name of a score -> head of its column: format
GROUPS = {
    "likelihood (nll in nats per token; vs first: ratio of perplexities; ±: standard error)": {
        "nll": "nll: .4f",
        "nll_se": "±: .4f",
        "perplexity": "perplexity: .2f",
        "perplexity_desmoothed": "de-smoothed: .2f",
        "bits_per_byte": "bits per byte: .4f",
        "word_perplexity": "word perplexity: .1f",
        "accuracy": "accuracy: .4f",
        "accuracy_top5": "top 5: .4f",
        "recall_at_k": "recall at k: .4f",
        "lrap": "lrap: .4f",
        "vs_first": "vs first: .3f",
        "vs_first_se": "±: .3f",
    },
    "calibration and uncertainty (nats per token; AURC: area under error rate by coverage)": {
        "ece": "ECE: .4f",
        "ece_se": "±: .4f",
        "adaptive_ece": "adaptive ECE: .4f",
        "brier": "Brier: .4f",
        "entropy": "total: .4f",
        "aleatoric": "aleatoric: .4f",
        "mutual_information": "epistemic: .5f",
        "aurc_confidence": "AURC by confidence: .4f",
        "aurc_entropy": "by total: .4f",
        "aurc_mutual_information": "by epistemic: .4f",
        "log_sum_sigma": "ln Σσ: +.4f",
        "kl_weight": "kl_weight: g",
        "n_samples": "n_samples: d",
    },
    "out-of-domain text against the run's own (AUROC of blocks and tokens, FPR95 of blocks)": {
        "ood_auroc_nll_block": "nll AUROC blocks: .4f",
        "ood_auroc_nll_token": "nll AUROC tokens: .4f",
        "ood_fpr95_nll_block": "nll FPR95 blocks: .4f",
        "ood_auroc_entropy_block": "total AUROC blocks: .4f",
        "ood_auroc_entropy_token": "total AUROC tokens: .4f",
        "ood_fpr95_entropy_block": "total FPR95 blocks: .4f",
        "ood_auroc_mutual_information_block": "epistemic AUROC blocks: .4f",
        "ood_auroc_mutual_information_token": "epistemic AUROC tokens: .4f",
        "ood_fpr95_mutual_information_block": "epistemic FPR95 blocks: .4f",
    },
    "continuations (distinct-n falls with the number of words; repetition: of 4-grams in a text)": {
        "continuations_self_bleu": "Self-BLEU: .2f",
        "continuations_distinct_1": "Distinct-1: .3f",
        "continuations_distinct_2": "Distinct-2: .3f",
        "continuations_distinct_3": "Distinct-3: .3f",
        "continuations_distinct_4": "Distinct-4: .3f",
        "continuations_repetition": "repetition: .4f",
        "continuations_loops": "loops: .3f",
        "continuations_n_words": "words: ,",
    },
}
OTHER_TEXTS = (
    "these runs have other texts or tokenizers, or with --limit other windows: only bits per byte "
    "can be compared, and for other texts not even those"
)


class Table(NamedTuple):
    title: str
    header: list[str]
    lines: list[list[str]]  # cells, the name of the run first


def tables(rows: Mapping[str, dict], scores: Mapping[str, MetricAccumulator]) -> list[Table]:
    """The results by group, without columns that no run has. rows, scores: by name of the run."""
    groups, values = GROUPS, compared_numbers(rows, scores)
    if comparable(rows):
        first = next(iter(values.values()))
        nll = first["unigram_nll"]
        unigram = {"nll": nll, "perplexity": exp(nll), "vs_first": exp(nll - first["nll"])}
        values = {"unigram": unigram, **values}
    else:
        groups = {OTHER_TEXTS: {"bits_per_byte": "bits per byte: .4f"}}
    found = []
    for title, columns in groups.items():
        specs = [(name, *column.split(": ")) for name, column in columns.items()]
        header = ["run", *(head for _, head, _ in specs)]
        lines = [
            [run, *(cell(row, name, form) for name, _, form in specs)]
            for run, row in values.items()
        ]
        header, *lines = without_empty_columns([header, *lines])
        lines = [line for line in lines if any(line[1:])]
        if lines:
            found.append(Table(title, header, lines))
    return found


def comparable(rows: Mapping[str, dict]) -> bool:
    """Whether all runs predicted the same tokens of the same text."""
    texts = {(row["sha256"], str(row["tokenizer"]), row["n_tokens"]) for row in rows.values()}
    return len(texts) == 1


def compared_numbers(
    rows: Mapping[str, dict], scores: Mapping[str, MetricAccumulator]
) -> dict[str, dict[str, float]]:
    """All numbers of each run, and the ratio of its perplexity to that of the first run; only bits
    per byte if the runs cannot be compared."""
    if not comparable(rows):
        return {name: {"bits_per_byte": row.get("bits_per_byte")} for name, row in rows.items()}
    first = next(iter(rows))
    found = {}
    for name, row in rows.items():
        found[name] = flat(row) | {"vs_first": exp(row["nll"] - rows[first]["nll"])}
        same_units = row["n_units"] == rows[first]["n_units"]
        if name != first and "nll_se" in row and same_units:
            nll, nll_of_first = (scores[run].replicates()["nll"] for run in (name, first))
            found[name]["vs_first_se"] = spread((nll - nll_of_first).clamp(max=700).exp())
    return found


def flat(row: Mapping, prefix: str = "") -> dict[str, float]:
    """All numbers of nested dicts, their names joined by _; lists and texts are left out."""
    found = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}_")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + name] = value
    return found


def cell(row: Mapping[str, float], name: str, form: str) -> str:
    return "" if row.get(name) is None else format(row[name], form)


def without_empty_columns(rows: list[list[str]]) -> list[list[str]]:
    """rows: a header and lines. Drops columns, after the first, with nothing or 0 in all lines."""
    first, *others = zip(*rows, strict=True)
    kept = [column for column in others if set(column[1:]) - {"", "0"}]
    return [list(row) for row in zip(first, *kept, strict=True)]


def as_text(header: list[str], lines: list[list[str]]) -> str:
    """Aligned columns; all but the first are numbers."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    rows = [
        [name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]
        for name, *cells in (header, *lines)
    ]
    return "\n".join("  ".join(row) for row in rows)


def as_markdown(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    escaped = [[text.replace("|", r"\|") for text in row] for row in (header, rule, *lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def as_csv(rows: Mapping[str, dict], scores: Mapping[str, MetricAccumulator]) -> str:
    """Every number of every run; only bits per byte of runs that cannot be compared."""
    values = compared_numbers(rows, scores)
    names = dict.fromkeys(name for row in values.values() for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, ["run", *names], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"run": name} | row for name, row in values.items())
    return text.getvalue()
