"""Ensembles: the mean of the probabilities of several runs (Lakshminarayanan et al. 2017).

A source "A+B+C" is the ensemble of the runs A, B and C; their disagreement is its epistemic
uncertainty.
"""

from pathlib import Path

import torch
import torch.nn as nn

from engine.base.errors import UserError
from engine.runs.checkpoint import read_checkpoint
from heads import Prediction
from heads.draws import entropy, mixture
from heads.weights import BayesLinear
from model import GPT

# bayes_mlp: all members then return the same number of hidden states
ALIKE = ("block_size", "vocab_size", "bayes_mlp")


class Ensemble(nn.Module):
    """Has the interface of a GPT and of its head: hiddens(), then predict(). It cannot generate."""

    likelihood = None  # a mean over likelihoods is not one of them

    def __init__(self, members: list[GPT]):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.config = members[0].config
        for name in ALIKE:
            values = {getattr(member.config, name) for member in members}
            if len(values) > 1:
                different = " and ".join(map(str, sorted(values)))
                raise UserError(
                    f"the runs of an ensemble must have the same {name}, not {different}"
                )

    @property
    def lm_head(self) -> "Ensemble":
        return self

    def hiddens(self, idx: torch.Tensor, n_samples: int = 0) -> list[torch.Tensor]:
        """idx (B, T) -> the hidden states of all members, in order: see GPT.hiddens."""
        found = []
        for member in self.members:
            found += member.hiddens(idx, n_samples)
        return found

    def predict(self, hiddens: list[torch.Tensor], n_samples: int = 0) -> Prediction:
        """As Head.predict. epistemic: the mutual information of the next token and the member (with
        its weights)."""
        n_members = len(self.members)
        per_member = len(hiddens) // n_members
        parts = []
        for i, member in enumerate(self.members):
            own = hiddens[i * per_member : (i + 1) * per_member]
            prediction = member.lm_head.predict(own, n_samples)
            parts.append((prediction.log_probs, prediction.aleatoric, 1 / n_members))
        log_probs, aleatoric = mixture(parts)
        total = entropy(log_probs)
        return Prediction(log_probs, total, total - aleatoric)

    def log_probs(self, hiddens: list[torch.Tensor], n_samples: int = 0) -> torch.Tensor:
        return self.predict(hiddens, n_samples).log_probs

    def bayes_layers(self) -> list[BayesLinear]:
        return [layer for member in self.members for layer in member.bayes_layers()]


def members_of(source: str) -> list[str]:
    """The runs of a source: one, or several separated by +."""
    if Path(source).exists():
        return [source]
    return source.split("+")


def load(source: str) -> tuple[GPT | Ensemble, str | None]:
    """The model of a source, ready to predict, and the data set of its first run, if known."""
    paths = members_of(source)
    distinct = {Path(path).resolve() for path in paths}
    if len(distinct) < len(paths):
        raise UserError(f"{source} names a run twice; the runs of an ensemble must differ")
    checkpoints = [read_checkpoint(path) for path in paths]
    members = [checkpoint.model("cpu") for checkpoint in checkpoints]
    dataset = checkpoints[0].dataset
    if len(members) == 1:
        return members[0], dataset
    return Ensemble(members).eval(), dataset
