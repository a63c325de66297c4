"""Read a study's folder: the numbers and curves of each variant, by seed.

A run is training_logs/<study>/<variant>-seed<k>/ with eval_test.json, and if it has them
metrics.jsonl, config.json, and eval_test<kind>.json for each of KINDS.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from engine.base.errors import UserError
from engine.base.files import read_json, read_json_lines
from engine.eval.plots import validation_curve
from engine.eval.table import flat
from engine.runs.logger import read_records

DISTILLED = "_taught"  # ends the names of variants that learn from a teacher's labels
LABELS = {  # of variants, in their order
    "softmax": "softmax",
    "softmax_again": "softmax, trained again",
    "softmax_two_epochs": "softmax, twice the tokens",
    "softmax_taught_everywhere": "softmax, taught at every position",
    "smooth_05": "smooth, ε = 0.05",
    "smooth": "smooth, ε = 0.1",
    "bayes": "Bayes",
    "bayes_again": "Bayes, trained again",
    "bayes_stronger_prior": "Bayes, stronger prior",
    "bayes_more_decay": "Bayes, more decay",
    "sigmoid": "sigmoid",
    "sigmoid_regularised": "sigmoid regularised",
    "sigmoid_weighted": "sigmoid weighted",
    "bayes_sigmoid": "Bayes + sigmoid",
    "bayes_sigmoid_weighted": "Bayes + sigmoid weighted",
    "dropout": "softmax, dropout",
}
# options that a label names: the value that is not worth it, and the weights or likelihood that
# have the option
NAMED = {
    "kl_weight": (1, "bayes"),
    "pos_weight": (1, "sigmoid"),
    "sum_penalty": (0, "sigmoid"),
    "dropout": (0, ""),
}
KINDS = {  # of evaluations of a run
    "": "",
    "_averaged": ", averaged",
    "_ensemble_of_4": ", ensemble of 4",
}


@dataclass
class Variant:
    """A variant of a study: its numbers (flat names) and its validation curves, by seed."""

    label: str
    seeds: dict[int, dict[str, float]] = field(default_factory=dict)
    curves: dict[int, dict[int, float]] = field(default_factory=dict)  # tokens -> validation nll

    def values(self, name: str) -> list[float]:
        return [numbers[name] for numbers in self.seeds.values() if name in numbers]


def read(study: Path) -> dict[str, Variant]:
    """All variants of a study's folder in order; the kind of evaluation ends the name.

    Their `ratio` is the perplexity relative to softmax's of the same seed; an ensemble's, which
    has no seed of its own, relative to the mean of softmax's.
    """
    found: dict[str, Variant] = {}
    for name, seed, folder in runs_of(study):
        config = read_json(path) if (path := folder / "config.json").is_file() else {}
        for kind, ending in KINDS.items():
            path = folder / f"eval_test{kind}.json"
            if path.is_file():
                variant = found.setdefault(name + kind, Variant(label_of(name, config) + ending))
                variant.seeds[seed] = read_numbers(path)
        curve = validation_curve(read_records(folder / "metrics.jsonl"))
        if curve and name in found:
            found[name].curves[seed] = curve
    softmax = found.get("softmax", Variant("")).seeds
    nlls = {seed: numbers["nll"] for seed, numbers in softmax.items()}
    for name, variant in found.items():
        for seed, numbers in variant.seeds.items():
            if seed in nlls:
                base = mean(nlls.values()) if "ensemble" in name else nlls[seed]
                numbers["ratio"] = math.exp(numbers["nll"] - base)
    return found


def runs_of(study: Path) -> list[tuple[str, int, Path]]:
    """The runs in order: variant, seed, folder."""
    runs = []
    for folder in filter(Path.is_dir, study.glob("*-seed*")):
        if not (match := re.fullmatch(r"(.+)-seed(\d+)", folder.name)):
            raise UserError(f"{folder} is not named <variant>-seed<number>; rename it or move it")
        runs.append((match[1], int(match[2]), folder))
    return sorted(runs, key=lambda run: (place(run[0]), run[1]))


def place(name: str) -> tuple:
    """Sorts variants as in LABELS, a distilled one after its own, unknown ones last."""
    known = list(LABELS)
    plain = name.removesuffix(DISTILLED)
    return known.index(plain) if plain in known else len(known), plain, name != plain


def label_of(name: str, config: dict) -> str:
    """A variant's label, with options of its config.json."""
    plain = name.removesuffix(DISTILLED)
    label = LABELS.get(plain, plain)
    head = f"{config.get('weights')} {config.get('likelihood')}"
    numbers = flat(config)
    for option, (usual, part_of_head) in NAMED.items():
        value = numbers.get(option, usual)
        if part_of_head in head and value != usual:
            label = f"{label.removesuffix(f', {option}')}, {option} {value:g}"
    return label if name == plain else f"{label}, taught"


def plain_label(name: str) -> str:
    """The label of a variant of read() without options, which differ between studies."""
    kind = next(kind for kind in reversed(KINDS) if name.endswith(kind))
    return label_of(name.removesuffix(kind), {}) + KINDS[kind]


def read_numbers(path: Path) -> dict[str, float]:
    numbers = flat(read_json(path))
    if not 0 < numbers.get("nll", 0) < 100:
        raise UserError(f"{path} has no nll between 0 and 100; copy it from its run again")
    return numbers


def read_trials(path: Path) -> list[dict]:
    """The trials of a tuning.jsonl: row (the variant), flags, final val_nll, options. Of several
    with the same flags, which had other options, the latest."""
    trials = read_json_lines(path)
    for i, trial in enumerate(trials, 1):
        if not (trial.get("row") and "flags" in trial and isinstance(trial.get("val_nll"), float)):
            raise UserError(f"{path}: trial {i} lacks its row, flags or val_nll; delete its line")
    latest = {(trial["row"], *trial["flags"]): trial for trial in trials}
    return list(latest.values())
