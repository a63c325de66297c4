"""The options of a head."""

from dataclasses import dataclass
from typing import Annotated, Literal

from engine.base.errors import UserError
from engine.base.options import NonNegativeFloat, check_options


@dataclass(frozen=True)
class HeadConfig:
    """The two choices that make a head, and their options."""

    weights: Literal["point", "bayes"] = "point"  # point | bayes
    # categorical | smooth | sigmoid
    likelihood: Literal["categorical", "smooth", "sigmoid"] = "categorical"
    # the output weights (for bayes: their means) are the token embedding, as in GPT-2
    tie_head: bool = True
    # start of a bias per token: unigram (corpus frequencies) | uniform | none (no bias) | auto:
    # unigram for sigmoid, else none. Pretrained weights keep their bias; without one, it starts
    # equal for all tokens
    logit_bias: Literal["auto", "unigram", "uniform", "none"] = "auto"
    # smooth: the probability that is spread over the V - 1 other tokens
    label_smoothing: Annotated[float, ">= 0", "<= 0.5"] = 0.1
    # sigmoid: weight of the true token's term; predictions undo it: they use z - ln pos_weight
    pos_weight: Annotated[float, ">= 1e-6", "<= 1e6"] = 1.0
    # sigmoid: weight of (sum_v sigmoid(z_v) - 1)^2, nats per token
    sum_penalty: NonNegativeFloat = 0.0
    # bayes: row (a std per token, almost free) | kron (row with a covariance of the columns, fitted
    # to a trained run: --max_iters=0) | full (a std per weight) | torchbnn (that library's layer)
    posterior: Literal["row", "kron", "full", "torchbnn"] = "row"
    # bayes: how to estimate E_q[loss]: bound (an upper bound, no sampling) | local (noise on each
    # logit) | sample (a matrix per micro-batch)
    estimator: Literal["bound", "local", "sample"] = "bound"
    # bayes: mean of the prior N(prior_mean, prior_std^2) of every weight
    prior_mean: Annotated[float, ">= -1e6", "<= 1e6"] = 0.0
    # bayes: std of the prior: a number, or "empirical": fitted to the posterior at every step
    prior_std: Annotated[float, ">= 1e-6", "<= 1e6"] | Literal["empirical"] = "empirical"
    # bayes: 1 is the ELBO; less is a tempered ("cold") posterior, for data sets below 1e9 tokens
    kl_weight: NonNegativeFloat = 1.0
    # bayes: number of training tokens, the N of KL / N; train.py reads it from the data
    n_data: Annotated[int, ">= 0", "<= 1e15"] = 0

    @property
    def is_kron(self) -> bool:
        return self.weights == "bayes" and self.posterior == "kron"

    def __post_init__(self):
        check_options(self)
        if self.posterior == "torchbnn" and self.estimator == "local":
            raise UserError(
                "posterior = 'torchbnn' draws whole matrices; "
                "for estimator = 'local' use --posterior=full"
            )
