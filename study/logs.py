"""What lies in a study's folder: the numbers and curves of each row, by seed.

A run is training_logs/<study>/<row>-seed<k>/ with eval_test.json, and of what it has more: metrics.jsonl, config.json,
and eval_test<kind>.json for each of KINDS.
"""

import math
import re
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from engine.base.errors import UserError
from engine.base.files import read_json, read_json_lines
from engine.eval.table import flat
from engine.runs.logger import read_records

LABELS = {  # of rows, in their order
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
# options that a label tells: the value that goes without saying, and the weights or likelihood that
# have it
TOLD = {
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


class Row(NamedTuple):
    """A row of a study by seed: its numbers (flat names); a run's validation nll by tokens read, but for averages."""

    label: str
    seeds: dict[int, dict]
    curves: dict[int, dict[int, float]]
    of_all: bool = False  # a prediction that all seeds share

    def values(self, name: str) -> list[float]:
        return [numbers[name] for numbers in self.seeds.values() if name in numbers]

    def ratios(self, base: "Row") -> list[float]:
        """Perplexities over those of the same seed of the base; of what all seeds share over their mean."""
        others = {seed: [one["nll"]] for seed, one in base.seeds.items()}
        if self.of_all and others:
            others = dict.fromkeys(self.seeds, base.values("nll"))
        return [
            math.exp(one["nll"] - mean(others[seed]))
            for seed, one in self.seeds.items()
            if seed in others
        ]


NONE = Row("", {}, {})


def read(study: Path) -> dict[str, Row]:
    """All rows of a study's folder by name (a row's, with the kind of evaluation behind it), in order. UserError names
    what is damaged."""
    found: dict[str, Row] = {}
    for row, seed, folder in runs_of(study):
        label = label_of(row, read_json(path) if (path := folder / "config.json").is_file() else {})
        for kind, path in evaluations(folder).items():
            entry = found.setdefault(
                row + kind, Row(label + KINDS[kind], {}, {}, "ensemble" in kind)
            )
            entry.seeds[seed] = numbers_of(path)
            if not kind:
                entry.curves[seed] = curve_of(folder)
    return found


def runs_of(study: Path) -> list[tuple[str, int, Path]]:
    """The evaluated runs in order: row, seed, folder."""
    runs = []
    for folder in filter(Path.is_dir, study.glob("*-seed*")):
        if not (match := re.fullmatch(r"(.+)-seed(\d+)", folder.name)):
            raise UserError(
                f"{folder} is not named <row>-seed<number>; rename it, or move it elsewhere"
            )
        if evaluations(folder):
            runs.append((match[1], int(match[2]), folder))
    return sorted(runs, key=lambda run: (place(run[0]), run[1]))


def evaluations(folder: Path) -> dict[str, Path]:
    """Those on the test split that a run has, by kind."""
    return {kind: path for kind in KINDS if (path := folder / f"eval_test{kind}.json").is_file()}


def place(row: str) -> tuple:
    """Rows in their order, a taught one behind its own; unknown ones last."""
    known, plain = list(LABELS), row.removesuffix("_taught")
    return known.index(plain) if plain in known else len(known), plain, row != plain


def label_of(row: str, config: dict) -> str:
    """A row's label, with what its config.json tells of its options."""
    plain = row.removesuffix("_taught")
    label = LABELS.get(plain, plain)
    head, numbers = f"{config.get('weights')} {config.get('likelihood')}", flat(config)
    for name, (usual, of) in TOLD.items():
        if of in head and numbers.get(name, usual) != usual:
            label = f"{label.removesuffix(f', {name}')}, {name} {numbers[name]:g}"
    return label + (", taught" if row != plain else "")


def plain_label(name: str) -> str:
    """Of a row of read, without options: those differ between studies."""
    kind = next(kind for kind in reversed(KINDS) if name.endswith(kind))
    return label_of(name.removesuffix(kind), {}) + KINDS[kind]


def numbers_of(path: Path) -> dict:
    numbers = flat(read_json(path))
    if not isinstance(nll := numbers.get("nll"), float) or not 0 < nll < 100:
        raise UserError(f"{path} has no nll between 0 and 100; copy it from its run again")
    return numbers


def curve_of(folder: Path) -> dict[int, float]:
    """Tokens read -> validation nll, of a run's evaluations but for the one before the first step."""
    trained = [record for record in read_records(folder / "metrics.jsonl") if record["step"]]
    points = ((record.get("tokens"), record.get("val_nll")) for record in trained)
    return {
        tokens: nll
        for tokens, nll in points
        if isinstance(tokens, int) and isinstance(nll, int | float)
    }


def read_trials(path: Path) -> list[dict]:
    """Of a study's tuning.jsonl: each trial's row, its flags, the val_nll that it ended with, its options."""
    trials, kinds = read_json_lines(path), {"row": str, "flags": list, "val_nll": float}
    for i, trial in enumerate(trials, 1):
        if not all(isinstance(trial.get(name), kind) for name, kind in kinds.items()):
            raise UserError(f"{path}: trial {i} lacks its row, flags or val_nll; delete its line")
    return trials
