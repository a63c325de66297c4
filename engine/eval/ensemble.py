"""Runs that predict together: the mean of their probabilities (Lakshminarayanan et al. 2017, deep ensembles).

A source "A+B+C" is the ensemble of the runs A, B and C; their disagreement is its epistemic uncertainty.
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


class Ensemble(nn.Module):
    """Stands for a GPT, and for its head, where predictions are read: hiddens, then predict. It does not generate."""

    def __init__(self, members: list[GPT]):
        super().__init__()
        self.members, self.config = nn.ModuleList(members), members[0].config
        alike = (
            "block_size",
            "vocab_size",
            "bayes_mlp",
        )  # the last: predict() takes as many hidden states of each
        for name in alike:
            if len(values := {getattr(member.config, name) for member in members}) > 1:
                said = " and ".join(map(str, sorted(values)))
                raise UserError(f"the runs of an ensemble must have the same {name}, not {said}")

    @property
    def lm_head(self) -> "Ensemble":
        return self

    def hiddens(self, idx: torch.Tensor, n_samples: int = 0) -> list[torch.Tensor]:
        """idx (B, T) -> the hidden states (B, T, C) of each member, or n_samples of each: see GPT.hiddens."""
        return [hidden for member in self.members for hidden in member.hiddens(idx, n_samples)]

    def predict(self, hiddens: list[torch.Tensor], n_samples: int = 0) -> Prediction:
        """As Head.predict; epistemic: the mutual information of the next token and the member (and its weights)."""
        n, each = len(self.members), len(hiddens) // len(self.members)
        parts = (hiddens[i : i + each] for i in range(0, len(hiddens), each))
        found = (
            member.lm_head.predict(part, n_samples)
            for member, part in zip(self.members, parts, strict=True)
        )
        log_probs, aleatoric = mixture((p.log_probs, p.aleatoric, 1 / n) for p in found)
        total = entropy(log_probs)
        return Prediction(log_probs, total, total - aleatoric)

    def bayes_layers(self) -> list[BayesLinear]:
        return [layer for member in self.members for layer in member.bayes_layers()]


def members_of(source: str) -> list[str]:
    """The runs that a source names: one, or with + several."""
    return [source] if Path(source).exists() else source.split("+")


def load(source: str, device: torch.device | str = "cpu") -> tuple[GPT | Ensemble, str | None]:
    """The model of a source, ready to predict, and the data set that its first run was trained on."""
    paths = members_of(source)
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise UserError(f"{source} names a run twice; an ensemble is one of different runs")
    members, datasets = [], []
    for path in paths:
        checkpoint = read_checkpoint(path)
        members.append(checkpoint.model(device))
        datasets.append(checkpoint.dataset)
    model = members[0] if len(members) == 1 else Ensemble(members).eval()
    return model, datasets[0]
