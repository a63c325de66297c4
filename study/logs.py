"""Read a study's folder: the numbers and validation curves of each variant, by seed.

A run is training_logs/<study>/<variant>-seed<k>/ with eval_test.json. It may also have
metrics.jsonl, config.json, and eval_test<kind>.json for each of KINDS.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from engine.base.files import read_json
from engine.eval.plots import validation_curve
from engine.eval.table import flat, ood_results
from engine.runs.logger import read_records

DISTILLED = "_taught"  # ends the names of variants that learn from a teacher's labels
LABELS = {  # of variants, in the order of the tables
    "softmax": "softmax",
    "softmax_again": "softmax, trained again",
    "softmax_two_epochs": "softmax, twice the tokens",
    "softmax_taught_everywhere": "softmax, distilled at every position",
    "smooth_05": "smooth, ε = 0.05",
    "smooth": "smooth, ε = 0.1",
    "softmax_kron": "softmax, kron fitted",
    "bayes": "Bayes",
    "bayes_kron": "Bayes, kron fitted",
    "bayes_again": "Bayes, trained again",
    "bayes_stronger_prior": "Bayes, stronger prior",
    "bayes_more_decay": "Bayes, more decay",
    "sigmoid": "sigmoid",
    "sigmoid_kron": "sigmoid, kron fitted",
    "sigmoid_regularised": "sigmoid regularised",
    "sigmoid_weighted": "sigmoid weighted",
    "bayes_sigmoid": "Bayes + sigmoid",
    "bayes_sigmoid_weighted": "Bayes + sigmoid weighted",
    "dropout": "softmax, dropout",
}
# options that a label names: the value that it leaves out, and the weights or likelihood that
# have the option
NAMED = {
    "kl_weight": (1, "bayes"),
    "pos_weight": (1, "sigmoid"),
    "sum_penalty": (0, "sigmoid"),
    "dropout": (0, ""),
}
RATIOS = {"nll": "ratio", "nll_tempered": "ratio_tempered"}
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

    `ratio` is the perplexity relative to softmax's of the same seed. An ensemble has no seed of
    its own: its ratio is relative to the mean of softmax's seeds.
    """
    found: dict[str, Variant] = {}
    for name, seed, folder in runs_of(study):
        path = folder / "config.json"
        config = read_json(path) if path.is_file() else {}
        for kind in KINDS:
            path = folder / f"eval_test{kind}.json"
            if path.is_file():
                variant = found.setdefault(name + kind, Variant(label_of(name + kind, config)))
                row = read_json(path)
                numbers = variant.seeds[seed] = flat(row)
                texts = ood_results(row)
                for ood in texts:
                    numbers |= flat(ood["auroc"], f"{Path(ood['dataset']).name}_")
                if len(texts) == 1:
                    numbers |= flat(ood["auroc"], "ood_auroc_")
        records = read_records(folder / "metrics.jsonl")
        if curve := validation_curve(records):
            found[name].curves[seed] = curve
            if "seconds" in records[-1]:
                found[name].seeds[seed]["training_seconds"] = records[-1]["seconds"]
    softmax = found.get("softmax", Variant(""))
    for name, variant in found.items():
        for seed, numbers in variant.seeds.items():
            if "ensemble" not in name:
                numbers["n_seeds"] = len(variant.seeds)
            for nll, ratio in RATIOS.items():
                base = softmax.seeds.get(seed, {}).get(nll)
                if "ensemble" in name:
                    base = mean(softmax.values(nll) or [0])
                if base and nll in numbers:
                    numbers[ratio] = math.exp(numbers[nll] - base)
    return found


def runs_of(study: Path) -> list[tuple[str, int, Path]]:
    """The runs in order: variant, seed, folder."""
    runs = []
    for path in study.glob("*-seed*/eval_test.json"):
        name, _, seed = path.parent.name.rpartition("-seed")
        runs.append((name, int(seed), path.parent))
    return sorted(runs, key=lambda run: (place(run[0]), run[1]))


def place(name: str) -> tuple:
    """Sorts variants as in LABELS, a distilled one after its plain one, unknown ones last."""
    known = list(LABELS)
    plain = name.removesuffix(DISTILLED)
    return known.index(plain) if plain in known else len(known), plain, name != plain


def without_kind(name: str) -> str:
    """The variant of a name of read(), without the kind of its evaluation."""
    for kind in KINDS:
        name = name.removesuffix(kind)
    return name


def label_of(name: str, config: dict) -> str:
    """The label of a variant of read(), with options of its config.json."""
    variant = without_kind(name)
    plain = variant.removesuffix(DISTILLED)
    label = LABELS.get(plain, plain)
    head = f"{config.get('weights')} {config.get('likelihood')}"
    for option, (usual, part_of_head) in NAMED.items():
        value = config.get(option, usual)
        if part_of_head in head and value != usual:
            label = f"{label.removesuffix(f', {option}')}, {option} {value:g}"
    if variant != plain:
        label += ", distilled"
    return label + KINDS[name.removeprefix(variant)]
