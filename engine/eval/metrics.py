"""What follows from the scores of a text's tokens: means, calibration, rankings, OOD detection.

All scores of all tokens are kept, some 120 bytes a token. So ranks and quantiles are exact, and
any batch size and any number of processes give the same result.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from engine.eval.validation import N_BINS, bins_of, exp

N_REPLICATES = 1000  # of the bootstrap: a standard error is right to 2 %
MIN_UNITS = 10  # with fewer there is nothing to resample
# tokens are ranked by them; confidence: by 1 - confidence
UNCERTAINTIES = ("confidence", "entropy", "mutual_information", "mahalanobis")
TEMPERED = "_tempered"  # ends the names of scores at the fitted temperature


@dataclass
class Scores:
    """The scores of the tokens of a text, in order."""

    columns: dict[str, Tensor]  # name -> (n,), float64
    units: Tensor  # (n,), the number of each token's unit, which the bootstrap resamples
    blocks: Tensor  # (n,), the number of each token's block

    def __len__(self) -> int:
        return len(self.units)

    def mean(self, name: str) -> float:
        return self.columns[name].mean().item()

    def uncertainties(self) -> dict[str, Tensor]:
        """name -> (n,), those that this model has: point weights have no mutual information."""
        found = {name: self.columns[name] for name in UNCERTAINTIES if name in self.columns}
        return found | {"confidence": 1 - found["confidence"]}

    def block_means(self, values: Tensor) -> Tensor:
        """values (n,) -> (number of blocks,)"""
        return torch.bincount(self.blocks, values) / torch.bincount(self.blocks)

    def result(self) -> dict:
        """All scores; those with a unit are in nats per token. `_se`: bootstrap standard error."""
        result = {}
        for name in self.columns:
            mean = result[name] = self.mean(name)
            if name.startswith("nll"):
                perplexity = name.replace("nll", "perplexity")
                result[perplexity] = exp(mean)
        n_units = len(self.units.unique())
        result |= {"n_tokens": len(self), "n_units": n_units}
        if n_units >= MIN_UNITS:
            for name, values in self.replicates.items():
                result[f"{name}_se"] = spread(values)
        for suffix in ("", TEMPERED):
            if f"confidence{suffix}" in self.columns:
                result[f"ece{suffix}"], bins = self.calibration(suffix)
                result[f"calibration{suffix}"] = bins
        return result | self.selective_prediction()

    @cached_property
    def replicates(self) -> dict[str, Tensor]:
        """name -> (N_REPLICATES,): the score of each resampled text."""
        numbers, index, n = self.units.unique(return_inverse=True, return_counts=True)
        n_units = len(numbers)
        nll = torch.bincount(index, self.columns["nll"])
        confidence = self.columns["confidence"]
        bins = index * N_BINS + bins_of(confidence)
        gaps = torch.bincount(bins, confidence - self.columns["accuracy"], n_units * N_BINS)
        sums = torch.column_stack([n, nll, gaps.view(n_units, N_BINS)])
        total = 0.0
        for unit, of_unit in zip(numbers.tolist(), sums, strict=True):
            total = total + bootstrap_weights(unit).outer(of_unit)
        n_tokens, nll, *gaps = total.unbind(1)
        ece = torch.stack(gaps).abs().sum(0) / n_tokens
        return {"nll": nll / n_tokens, "ece": ece}

    def calibration(self, suffix: str = "") -> tuple[float, dict]:
        """The calibration error, and confidence and accuracy in each bin (0 in empty ones)."""
        confidence = self.columns[f"confidence{suffix}"]
        bins = bins_of(confidence)
        n = torch.bincount(bins, minlength=N_BINS)
        sums = torch.bincount(bins, confidence, N_BINS)
        n_correct = torch.bincount(bins, self.columns["accuracy"], N_BINS)
        ece = (sums - n_correct).abs().sum() / len(self)
        not_0 = n.clamp(min=1)
        bins = {
            "n": n.tolist(),
            "confidence": (sums / not_0).tolist(),
            "accuracy": (n_correct / not_0).tolist(),
        }
        return ece.item(), bins

    def selective_prediction(self) -> dict[str, dict]:
        """AURC, AUGRC and PRR by each uncertainty: see risk()."""
        found = {"aurc": {}, "augrc": {}, "prr": {}}
        wrong = 1 - self.columns["accuracy"]
        for name, values in self.uncertainties().items():
            for area, value in risk(values, wrong).items():
                found[area][name] = value
        return found


def bootstrap_weights(unit: int) -> Tensor:
    """(N_REPLICATES,): how often a unit occurs in each resampled text.

    Poisson(1) is the bootstrap's multinomial without its fixed total (Hanley and MacGibbon 2006).
    The weights depend on the unit's number alone, so all models are compared on the same texts."""
    generator = np.random.Generator(np.random.Philox(key=unit))
    return torch.from_numpy(generator.poisson(1.0, N_REPLICATES)).double()


def spread(replicates: Tensor) -> float:
    """The standard deviation, without the resampled texts that happen to be empty."""
    return replicates[replicates.isfinite()].std().item()


def risk(uncertainty: Tensor, wrong: Tensor) -> dict[str, float]:
    """Areas under risk curves, if only the k most certain tokens are answered; means over k.

    uncertainty, wrong (n,). Ties share the mean of their errors. aurc: of the error rate among the
    answers (Geifman et al. 2019). augrc: of the share of all tokens that are answered wrong (Traub
    et al. 2024). prr: how much of the possible gain in aurc an uncertainty has; 0 is a random
    order, 1 the best one (Malinin et al. 2020).
    """
    _, group, n = uncertainty.unique(return_inverse=True, return_counts=True)
    shares = torch.bincount(group, wrong) / n
    n_wrong = shares.repeat_interleave(n).cumsum(0)  # among the k most certain
    total = len(wrong)
    k = torch.arange(1, total + 1)
    aurc = (n_wrong / k).mean().item()
    best = (wrong.sort().values.cumsum(0) / k).mean().item()  # all wrong tokens last
    by_chance = wrong.mean().item()
    possible = by_chance - best
    return {
        "aurc": aurc,
        "augrc": n_wrong.mean().item() / total,
        "prr": (by_chance - aurc) / possible if possible else 0.0,
    }


def ranks(values: Tensor) -> Tensor:
    """(n,) -> (n,), from 1 on; ties share the mean of their ranks."""
    _, group, n = values.unique(return_inverse=True, return_counts=True)
    last = n.cumsum(0).double()
    return (last - (n - 1) / 2)[group]


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of a and b (n,); 0 if all values of one are the same."""
    both = torch.stack([ranks(a), ranks(b)])
    return torch.corrcoef(both)[0, 1].nan_to_num().item()


def auroc(in_domain: Tensor, ood: Tensor) -> float:
    """The area under the ROC curve of OOD detection by a higher uncertainty; ties count half."""
    n = len(ood)
    of_ood = ranks(torch.cat([in_domain, ood]))[-n:]
    n_below = of_ood.sum() - n * (n + 1) / 2
    return (n_below / (n * len(in_domain))).item()


def out_of_domain(in_domain: Scores, ood: Scores) -> dict:
    """How well each uncertainty detects OOD text: by token, and by the mean over a block."""
    result = {
        "n_tokens": len(ood),
        "nll": ood.mean("nll"),
        "auroc": {},
    }
    texts = (in_domain, ood)
    usual, found = (text.uncertainties() | {"nll": text.columns["nll"]} for text in texts)
    for name, values in found.items():
        by_block = auroc(in_domain.block_means(usual[name]), ood.block_means(values))
        result["auroc"][name] = {"token": auroc(usual[name], values), "block": by_block}
    return result


def reducible_loss(scores: Scores) -> dict:
    """What a better model would have known, KL(better || run) in nats, and Spearman's correlation
    of each uncertainty with it (Ahdritz et al. 2024)."""
    reducible = scores.columns["reducible"]
    found = {name: spearman(values, reducible) for name, values in scores.uncertainties().items()}
    return {"nats": scores.mean("reducible"), "spearman": found}
