"""The runs of the study: variants (config/rows/) at scales (config/), their seeds and tuning."""

from dataclasses import dataclass, field

from study.logs import DISTILLED

SEEDS = (1337, 1338, 1339, 1340)  # the runs of softmax also form an ensemble
MAIN = (
    "softmax",
    "smooth",
    "bayes",
    "sigmoid",
    "bayes_sigmoid_weighted",
)  # the variants with several seeds
SIGMOIDS = ("sigmoid", "sigmoid_regularised", "sigmoid_weighted", "bayes_sigmoid_weighted")
PAPER = ("softmax", "smooth_05", "smooth", "bayes", *SIGMOIDS)  # in the order of the paper's table
KNOBS = {  # the option that the last trial changes; weight_decay for all other variants
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
# flags of a second evaluation, averaged over draws instead of by the mean weights
AVERAGED = {
    "bayes": ["--n_samples=-1"],
    "bayes_sigmoid_weighted": ["--n_samples=-1"],
    "dropout": ["--mc_dropout=True", "--n_samples=8"],
}


FOREIGN = ("speeches", "shakespeare", "wiki_markup", "python", "uniform", "shuffled")


@dataclass(frozen=True)
class Study:
    """A scale, its variants, and their tuning."""

    scale: str  # config/<scale>.py
    dataset: str  # of the scale; the Makefile prepares it
    ood: str  # the OOD data sets, in the scale's tokens
    variants: tuple[str, ...] = PAPER
    options: tuple[str, ...] = ()  # of all its runs
    rates: tuple[float, ...] = ()  # learning rates to try; if empty, see tuned_as
    # option -> its value in a last trial; empty: no such trial
    knobs: dict[str, float] = field(default_factory=dict)
    tuned_as: str = ""  # take the choices of this study; "" and no rates: those of the config files
    # variants also trained on the labels of a teacher, the softmax of this study
    distilled: tuple[str, ...] = ()
    n_seeds: int = 1  # of the main variants; more for the others would double the time
    ensemble: bool = False  # of the runs of softmax
    # variants to which a kron posterior is fitted, as variants of their own; all are then compared
    # with a better softmax run: a study, and flags of its softmax
    fitted: tuple[str, ...] = ()
    better: tuple[str, tuple[str, ...]] = ("", ())
    limit: int = 0  # windows of a text to evaluate

    def all_variants(self) -> list[str]:
        return [*self.variants, *(variant + DISTILLED for variant in self.distilled)]

    def seeds(self, variant: str) -> tuple[int, ...]:
        return SEEDS[: self.n_seeds if variant in MAIN else 1]


def foreign(name: str, *flags: str) -> Study:
    """A study's runs on foreign texts; flags: of the better softmax run."""
    return Study(
        f"train_{name}",
        name,
        ",".join(f"foreign/{text}" for text in FOREIGN),
        MAIN,
        tuned_as=name,
        n_seeds=3,
        fitted=("softmax", "bayes", "sigmoid"),
        better=("foreign_8k", flags),
        limit=400,
    )


STUDIES = {
    "wikitext2_8k": Study(
        "train_wikitext2_8k",
        "wikitext2_8k",
        "sotu_by_wikitext2_8k",
        variants=(*PAPER, "dropout"),
        rates=(4e-3, 2e-3, 1e-3),
        knobs=OTHER_VALUES,
        distilled=("softmax", *SIGMOIDS),
        n_seeds=4,
        ensemble=True,
    ),
    "wikitext2_8k_tenth": Study(
        "train_wikitext2_8k_tenth",
        "wikitext2_8k_tenth",
        "sotu_by_wikitext2_8k",
        variants=(*PAPER, "dropout"),
        rates=(2e-3, 1e-3, 5e-4),
        knobs=OTHER_VALUES | {"dropout": 0.2},  # kl_weight 0.3 was tried first and remains listed
        n_seeds=4,
        ensemble=True,
    ),
    "sotu_8k": Study(
        "train_sotu_8k",
        "sotu_8k",
        "wikitext2_by_sotu_8k",
        MAIN,
        tuned_as="wikitext2_8k",
        n_seeds=3,
    ),
    "wikitext2_8k_muon": Study(
        "train_wikitext2_8k",
        "wikitext2_8k",
        "sotu_by_wikitext2_8k",
        MAIN,
        options=("--optimizer=muon", "--kl_weight=0.03"),  # as chosen with AdamW
        rates=(8e-3, 4e-3, 2e-3),
        n_seeds=3,
    ),
    "wikitext2": Study("train_gpt2_wikitext2_cpu", "wikitext2", "sotu"),
    "foreign_8k": foreign("wikitext2_8k", "--learning_rate=0.002", "--max_iters=2632"),
    "foreign_8k_tenth": foreign("wikitext2_8k_tenth", "--learning_rate=0.002"),
    "wikitext_100m": Study("train_gpt2_wikitext_100m", "wikitext", "sotu"),  # for a GPU
}
