"""Tables of results, as aligned text for a terminal."""

from typing import NamedTuple

from engine.eval.metrics import Scores, spread
from engine.eval.validation import exp

# title of a table -> name of a score -> "column header: format"
GROUPS = {
    "likelihood (nll in nats per token; vs first: ratio of perplexities; ±: standard error)": {
        "nll": "nll: .4f",
        "nll_se": "±: .4f",
        "perplexity": "perplexity: .2f",
        "perplexity_desmoothed": "de-smoothed: .2f",
        "bits_per_byte": "bits per byte: .4f",
        "word_perplexity": "word perplexity: .1f",
        "accuracy": "accuracy: .4f",
        "vs_first": "vs first: .3f",
        "vs_first_se": "±: .3f",
    },
    "calibration (tempered: at the temperature with the lowest nll on validation text)": {
        "ece": "ECE: .4f",
        "ece_se": "±: .4f",
        "brier": "Brier: .4f",
        "temperature": "temperature: .3f",
        "nll_tempered": "tempered nll: .4f",
        "ece_tempered": "tempered ECE: .4f",
        "brier_tempered": "tempered Brier: .4f",
    },
    "uncertainty (nats per token; n_samples: draws)": {
        "entropy": "total: .4f",
        "aleatoric": "aleatoric: .4f",
        "mutual_information": "epistemic: .5f",
        "log_sum_sigma": "ln Σσ: +.4f",
        "kl_weight": "kl_weight: g",
        "n_samples": "n_samples: d",
    },
}
BY_UNCERTAINTY = {  # title -> the start of a score's name; a column for each uncertainty
    "errors: AURC, the area under error rate by coverage (lower is better)": "aurc_{}",
    "errors: AUGRC, the same for the share of all tokens answered wrong (lower is better)": (
        "augrc_{}"
    ),
    "errors: PRR, the share of the possible gain over a random order (higher is better)": "prr_{}",
    "reducible loss: Spearman's correlation with KL(--better || run)": "better_spearman_{}",
    "detection of out-of-domain (OOD) text: AUROC of blocks": "auroc_{}_block",
    "detection of OOD text: AUROC of single tokens": "auroc_{}_token",
}
NAMES = {  # of uncertainties in tables
    "nll": "nll",
    "confidence": "1 - confidence",
    "entropy": "total",
    "mutual_information": "epistemic",
    "mahalanobis": "Mahalanobis",
}
OTHER_TEXTS = (
    "the runs were evaluated on different texts, tokenizers or windows (--limit): compare bits per "
    "byte alone, and only on the same text"
)


class Table(NamedTuple):
    title: str
    header: list[str]
    lines: list[list[str]]  # cells, the name of the run first


def tables(rows: dict[str, dict], scores: dict[str, Scores]) -> list[Table]:
    """The results by group, without columns that no run has. rows, scores: by run name."""
    texts = {(row["sha256"], str(row["tokenizer"]), row["n_tokens"]) for row in rows.values()}
    if len(texts) > 1:
        return [table_of(OTHER_TEXTS, {"bits_per_byte": "bits per byte: .4f"}, rows)]
    first = next(iter(rows))
    nll = rows[first]["unigram_nll"]
    numbers = {"unigram": {"nll": nll, "perplexity": exp(nll)}}
    for name, row in rows.items():
        numbers[name] = flat(row)
    for name, row in numbers.items():
        row["vs_first"] = exp(row["nll"] - rows[first]["nll"])
        if name != first and "nll_se" in row:
            row["vs_first_se"] = ratio_se(scores[name], scores[first])
    found = [table_of(title, columns, numbers) for title, columns in GROUPS.items()]
    for name, row in rows.items():
        for ood in ood_results(row):
            numbers[f"{name}, {ood['dataset']}"] = flat(ood["auroc"], "auroc_")
    for title, score in BY_UNCERTAINTY.items():
        columns = {score.format(name): f"{head}: .4f" for name, head in NAMES.items()}
        found.append(table_of(title, columns, numbers))
    return [table for table in found if table.lines]


def ood_results(row: dict) -> list[dict]:
    """One dict for each OOD data set; the first edition had one data set."""
    found = row.get("ood", [])
    return [found] if isinstance(found, dict) else found


def ratio_se(scores: Scores, first: Scores) -> float:
    """The standard error of the ratio of two perplexities on the same resampled texts."""
    differences = scores.replicates["nll"] - first.replicates["nll"]
    return spread(differences.clamp(max=700).exp())


def table_of(title: str, columns: dict[str, str], numbers: dict[str, dict]) -> Table:
    """A table of numbers by run name. columns: see GROUPS."""
    found = [["run", *numbers]]
    for name, column in columns.items():
        head, form = column.split(": ")
        cells = [format(row[name], form) if name in row else "" for row in numbers.values()]
        found.append([head, *cells])
    return without_empty(title, found)


def without_empty(title: str, columns: list[list[str]]) -> Table:
    """A table of these columns, each with its head first. Leaves out empty columns (nothing, or 0
    in all lines) and empty lines.
    """
    names, *others = columns
    kept = [column for column in others if set(column[1:]) - {"", "0"}]
    header, *lines = map(list, zip(names, *kept, strict=True))
    return Table(title, header, [line for line in lines if any(line[1:])])


def flat(row: dict, prefix: str = "") -> dict[str, float]:
    """All numbers of nested dicts, their names joined by _; no lists, strings or booleans."""
    found = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}_")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + name] = value
    return found


def as_text(table: Table) -> str:
    """Aligned columns; all but the first are numbers."""
    rows = [table.header, *table.lines]
    columns = zip(*rows, strict=True)
    width, *widths = [max(map(len, column)) for column in columns]
    lines = []
    for name, *cells in rows:
        numbers = map(str.rjust, cells, widths)
        lines.append("  ".join([name.ljust(width), *numbers]))
    return "\n".join(lines)
