"""Results of runs as tables: text for a terminal, Markdown, CSV."""

import csv
import io
from collections.abc import Mapping
from typing import NamedTuple

from engine.eval.metrics import Tally, spread
from engine.eval.validation import exp

# title -> name of a score -> head of its column, and its format
GROUPS = {
    "likelihood (nll in nats per token; vs first: ratio of perplexities; ±: standard error)": {
        "nll": ("nll", "{:.4f}"),
        "nll_se": ("±", "{:.4f}"),
        "perplexity": ("perplexity", "{:.2f}"),
        "perplexity_desmoothed": ("de-smoothed", "{:.2f}"),
        "bits_per_byte": ("bits per byte", "{:.4f}"),
        "word_perplexity": ("word perplexity", "{:.1f}"),
        "accuracy": ("accuracy", "{:.4f}"),
        "accuracy_top5": ("top 5", "{:.4f}"),
        "recall_at_k": ("recall at k", "{:.4f}"),
        "lrap": ("lrap", "{:.4f}"),
        "vs_first": ("vs first", "{:.3f}"),
        "vs_first_se": ("±", "{:.3f}"),
    },
    "calibration and uncertainty (nats per token; AURC: error rate over coverage, least doubt first)": {
        "ece": ("ECE", "{:.4f}"),
        "ece_se": ("±", "{:.4f}"),
        "adaptive_ece": ("adaptive ECE", "{:.4f}"),
        "brier": ("Brier", "{:.4f}"),
        "entropy": ("total", "{:.4f}"),
        "aleatoric": ("aleatoric", "{:.4f}"),
        "mutual_information": ("epistemic", "{:.5f}"),
        "aurc_confidence": ("AURC by confidence", "{:.4f}"),
        "aurc_entropy": ("by total", "{:.4f}"),
        "aurc_mutual_information": ("by epistemic", "{:.4f}"),
        "log_sum_sigma": ("ln Σσ", "{:+.4f}"),
        "kl_weight": ("kl_weight", "{:g}"),
        "n_samples": ("n_samples", "{:d}"),
    },
    "foreign text told from own by its doubt (AUROC of blocks and tokens, FPR95 of blocks)": {
        f"ood_{score}_{doubt}_{level}": (f"{name} {score.upper()} {level}s", "{:.4f}")
        for doubt, name in (
            ("nll", "nll"),
            ("entropy", "total"),
            ("mutual_information", "epistemic"),
        )
        for score, level in (("auroc", "block"), ("auroc", "token"), ("fpr95", "block"))
    },
    "continuations (distinct-n falls with the number of words; repetition: of 4-grams, within a text)": {
        "continuations_self_bleu": ("Self-BLEU", "{:.2f}"),
        **{f"continuations_distinct_{n}": (f"Distinct-{n}", "{:.3f}") for n in range(1, 5)},
        "continuations_repetition": ("repetition", "{:.4f}"),
        "continuations_loops": ("loops", "{:.3f}"),
        "continuations_n_words": ("words", "{:,}"),
    },
}
UNUSED = {"n_samples": 0}  # what a column need not say
OTHER_TEXTS = (
    "these runs have other texts or tokenizers, or with --limit other windows: only bits per byte can be compared, "
    "and of other texts not even they"
)


class Table(NamedTuple):
    title: str
    header: list[str]
    lines: list[list[str]]  # texts, the name of the run first


def tables(rows: Mapping[str, dict], tallies: Mapping[str, Tally]) -> list[Table]:
    """The results by group; columns that no run has are left out. rows, tallies: by the names of the runs; without
    tallies (of rows read from their files) the ratios have no standard error."""
    if not comparable(rows):
        bits = {
            name: f"{row['bits_per_byte']:.4f}" if "bits_per_byte" in row else ""
            for name, row in rows.items()
        }
        lines = [[name, bits[name], str(row["dataset"])] for name, row in rows.items()]
        return [Table(OTHER_TEXTS, ["run", "bits per byte", "text"], lines)]
    first = next(iter(rows))
    values = {name: flat(row) | against(name, first, rows, tallies) for name, row in rows.items()}
    unigram = values[first]["unigram_nll"]
    ratio = exp(unigram - rows[first]["nll"])
    values = {"unigram": {"nll": unigram, "perplexity": exp(unigram), "vs_first": ratio}, **values}
    found = []
    for title, columns in GROUPS.items():
        shown = [
            name
            for name in columns
            if any(row.get(name) not in (None, UNUSED.get(name)) for row in values.values())
        ]
        lines = [
            [run, *(columns[name][1].format(row[name]) if name in row else "" for name in shown)]
            for run, row in values.items()
            if row.keys() & shown
        ]
        if shown and lines:
            found.append(Table(title, ["run", *(columns[name][0] for name in shown)], lines))
    return found


def comparable(rows: Mapping[str, dict]) -> bool:
    """Whether all runs were asked for the same tokens of the same text."""
    return (
        len({(row["sha256"], str(row["tokenizer"]), row["n_tokens"]) for row in rows.values()}) == 1
    )


def against(
    name: str, first: str, rows: Mapping[str, dict], tallies: Mapping[str, Tally]
) -> dict[str, float]:
    """The ratio of a run's perplexity to the first one's; its standard error, where both have resampled the same."""
    ratio = {"vs_first": exp(rows[name]["nll"] - rows[first]["nll"])}
    units = {(row.get("unit"), row.get("n_units")) for row in (rows[name], rows[first])}
    if name == first or len(units) > 1 or "nll_se" not in rows[name] or name not in tallies:
        return ratio
    nll, of_first = (tallies[run].replicates()["nll"] for run in (name, first))
    return ratio | {"vs_first_se": spread((nll - of_first).clamp(max=700).exp())}


def flat(row: Mapping, prefix: str = "") -> dict:
    """Scores of scores with _ between their names; without lists and texts."""
    found = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}_")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + name] = value
    return found


def as_text(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(table.header, *table.lines, strict=True)]
    rows = [
        [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        for row in (table.header, *table.lines)
    ]
    return "\n".join([table.title, *("  ".join(row) for row in rows)])


def as_markdown(table: Table) -> str:
    rule = ["---", *["---:"] * (len(table.header) - 1)]
    rows = [table.header, rule, *table.lines]
    return "\n".join(
        [
            f"{table.title}\n",
            *(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in r)} |" for r in rows),
        ]
    )


def as_csv(rows: Mapping[str, dict], tallies: Mapping[str, Tally]) -> str:
    """Every number of every run; of runs that cannot be compared bits per byte alone."""
    if comparable(rows):
        first = next(iter(rows))
        values = {
            name: flat(row) | against(name, first, rows, tallies) for name, row in rows.items()
        }
    else:
        values = {
            name: {"bits_per_byte": row.get("bits_per_byte", "")} for name, row in rows.items()
        }
    text, names = io.StringIO(), dict.fromkeys(name for row in values.values() for name in row)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *names])
    writer.writerows([run, *(row.get(name, "") for name in names)] for run, row in values.items())
    return text.getvalue()
