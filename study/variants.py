"""What the study trains: rows (config/rows/) on scales (config/), with which seeds, and how they are tuned."""

import runpy
from dataclasses import dataclass, field
from pathlib import Path

SEEDS = (1337, 1338, 1339, 1340)  # those of softmax make an ensemble, too
MAIN = ("softmax", "smooth", "bayes", "sigmoid", "bayes_sigmoid_weighted")  # have several of them
SIGMOIDS = ("sigmoid", "sigmoid_regularised", "sigmoid_weighted", "bayes_sigmoid_weighted")
PAPER = ("softmax", "smooth_05", "smooth", "bayes", *SIGMOIDS)  # in the order of its table
KNOBS = {  # what the last trial changes; of all other rows weight_decay
    "bayes": "kl_weight",
    "bayes_sigmoid_weighted": "kl_weight",
    "sigmoid_regularised": "sum_penalty",
    "sigmoid_weighted": "pos_weight",
    "dropout": "dropout",
}
OTHER_VALUES = {
    "kl_weight": 0.03,
    "sum_penalty": 0.1,
    "pos_weight": 4.0,
    "dropout": 0.05,
    "weight_decay": 0.3,
}
NEEDS = {  # data set -> the one whose tokenizer it has
    "wikitext2_8k_tenth": "wikitext2_8k",
    "sotu_by_wikitext2_8k": "wikitext2_8k",
    "wikitext2_by_sotu_8k": "sotu_8k",
}
# rows whose predictions are also averaged over more than the mean of their weights, and how
AVERAGED = {
    "bayes": ["--n_samples=-1"],
    "bayes_sigmoid_weighted": ["--n_samples=-1"],
    "dropout": ["--mc_dropout=True", "--n_samples=8"],
}


@dataclass(frozen=True)
class Study:
    """A scale, its rows, and how they are tuned."""

    scale: str  # config/<scale>.py
    foreign: str  # data set of the other kind in the scale's tokens
    rows: tuple[str, ...] = PAPER
    rates: tuple[float, ...] = ()  # learning rates to try; none: see tuned_as
    knobs: dict[str, float] = field(default_factory=dict)  # the last trial's value, by knob
    # the study whose choice is taken; empty with no rates: what the config files say
    tuned_as: str = ""
    taught: tuple[
        str, ...
    ] = ()  # rows trained on a teacher's labels too; the teacher is the softmax of this study
    n_seeds: int = 1  # of the main rows; several for all else would double the hours
    ensemble: bool = False  # of softmax's runs

    def dataset(self, root: Path) -> str:
        """What the scale's file names."""
        return runpy.run_path(str(root / "config" / f"{self.scale}.py"))["dataset"]

    def all_rows(self) -> list[str]:
        return [*self.rows, *(f"{row}_taught" for row in self.taught)]

    def seeds(self, row: str) -> tuple[int, ...]:
        return SEEDS[: self.n_seeds if row in MAIN else 1]


STUDIES = {
    "wikitext2_8k": Study(
        "train_wikitext2_8k",
        "sotu_by_wikitext2_8k",
        rows=(*PAPER, "dropout"),
        rates=(4e-3, 2e-3, 1e-3),
        knobs=OTHER_VALUES,
        taught=("softmax", *SIGMOIDS),
        n_seeds=4,
        ensemble=True,
    ),
    "wikitext2_8k_tenth": Study(
        "train_wikitext2_8k_tenth",
        "sotu_by_wikitext2_8k",
        rows=(*PAPER, "dropout"),
        rates=(2e-3, 1e-3, 5e-4),
        knobs=OTHER_VALUES | {"dropout": 0.2},  # kl_weight 0.3 was tried first, and stays listed
        n_seeds=4,
        ensemble=True,
    ),
    "sotu_8k": Study(
        "train_sotu_8k", "wikitext2_by_sotu_8k", MAIN, tuned_as="wikitext2_8k", n_seeds=3
    ),
    "wikitext2": Study("train_gpt2_wikitext2_cpu", "sotu"),
    "wikitext_100m": Study("train_gpt2_wikitext_100m", "sotu"),  # for a GPU
}


def preparation(name: str, source: str, addresses: str) -> list[str]:
    """The command that makes a data set; source: a folder with WikiText-2, empty for the hub's; addresses: a file."""
    wikitext = ["data/wikitext/prepare.py", "--version=2", f"--folder=data/{name}"]
    wikitext += [f"--source={source}"] if source else []
    sotu = ["data/text/prepare.py", f"--source={addresses}", r"--separator=\n\n", f"--name={name}"]
    learnt = ["--tokenizer=bpe", "--vocab_size=8192"]
    return {
        "wikitext": ["data/wikitext/prepare.py"],  # WikiText-103, of the hub
        "wikitext2": wikitext,
        "wikitext2_8k": wikitext + learnt,
        "wikitext2_8k_tenth": [*wikitext, "--tokenizer=data/wikitext2_8k", "--train_articles=60"],
        "wikitext2_by_sotu_8k": [*wikitext, "--tokenizer=data/sotu_8k"],
        "sotu": [*sotu, "--tokenizer=gpt2"],
        "sotu_8k": sotu + learnt,
        "sotu_by_wikitext2_8k": [*sotu, "--tokenizer=data/wikitext2_8k"],
    }[name]
