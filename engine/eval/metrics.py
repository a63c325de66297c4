"""Scores of predictions, accumulated in memory that does not grow with the text.

A MetricAccumulator holds only sums: sums of scores, counts by bin, counts of finely rounded values,
and sums weighted by the bootstrap. So any batch size and any number of processes give the same
result, up to rounding.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.base.distributed import Processes
from engine.eval.validation import N_BINS, bins_of, exp

N_REPLICATES = 1000  # of the bootstrap: a standard error is right to 2 %
MIN_UNITS = 10  # with fewer there is nothing to resample
EDGES = {  # of histograms, the same for all runs and texts
    "confidence": np.linspace(0, 1, 41),
    "entropy": np.linspace(0, 12, 49),
    "mutual_information": np.geomspace(1e-5, 10, 61),
}
RANKED = (*EDGES, "nll")  # tokens are ranked by these; for confidence, by 1 - confidence
# values are counted in 2^BITS bins for each power of two; values in the same bin are ties
MIN_EXPONENT, MAX_EXPONENT, BITS = -40, 8, 11
N_FINE = (MAX_EXPONENT - MIN_EXPONENT) << BITS
FIRST = (127 + MIN_EXPONENT) << BITS  # the upper bits of the float32 2^MIN_EXPONENT


class MetricAccumulator:
    """Sums over the tokens scored so far. parts: name -> float64 sums."""

    def __init__(self):
        self.parts = {}
        self.n_units = 0
        self.last_unit = -1

    def count_units(self, units: Tensor) -> None:
        """units (B, T): the number of each token's unit, which the bootstrap resamples.

        Call it for all batches, in order, also for those that other processes score."""
        continues = units[0, 0] == self.last_unit
        self.n_units += len(units.unique()) - int(continues)
        self.last_unit = units[-1, -1].item()

    def add(self, values: dict[str, Tensor], units: Tensor) -> None:
        """values: name -> (B * T,), the scores of B blocks. units (B, T): see count_units."""
        values = {name: value.cpu().double() for name, value in values.items()}
        n = values["n_tokens"] = torch.ones_like(values["nll"])
        confidence = values["confidence"]
        accuracy = values["accuracy"]
        for name, value in values.items():
            self._add(f"sum {name}", value.sum())
            if name in RANKED:
                self._add_ranks(name, value, 1 - accuracy, len(units))
            if name in EDGES:
                edges = EDGES[name]
                value = value.clamp(edges[0], edges[-1])
                counts, _ = np.histogram(value, edges)
                self._add(f"histogram {name}", torch.from_numpy(counts))
        bins = bins_of(confidence)
        in_bin = F.one_hot(bins, N_BINS).double().T
        columns = torch.stack([n, confidence, accuracy], 1)
        self._add("bins", in_bin @ columns)
        gaps = in_bin * (confidence - accuracy)
        resampled = torch.stack([n, values["nll"], *gaps], 1)
        self._add_replicates(resampled, units.flatten())

    def _add(self, name, part):
        so_far = self.parts.get(name, 0.0)
        self.parts[name] = so_far + part.double()

    def _add_ranks(self, name, values, wrong, n_blocks):
        """Count by uncertainty: the tokens, the wrong ones, and the blocks."""
        if name == "confidence":
            values = 1 - values
        token_bins = fine_bin(values)
        block_means = values.view(n_blocks, -1).mean(1)
        block_bins = fine_bin(block_means)
        self._add(f"token {name}", torch.bincount(token_bins, minlength=N_FINE))
        self._add(f"wrong {name}", torch.bincount(token_bins, wrong, N_FINE))
        self._add(f"block {name}", torch.bincount(block_bins, minlength=N_FINE))

    def _add_replicates(self, columns, units):
        """Add the sums of the columns (n, k) in each resampled text."""
        numbers, index = units.unique(return_inverse=True)
        sums = columns.new_zeros(len(numbers), columns.size(1))
        sums.index_add_(0, index, columns)
        weights = bootstrap_weights(numbers.tolist())
        self._add("replicates", weights.T @ sums)

    def join(self, processes: Processes) -> None:
        """Add up the parts of all processes; all of them get the result."""
        if processes.world_size == 1:
            return
        shapes = processes.broadcast({name: part.shape for name, part in self.parts.items()})
        for name, shape in shapes.items():
            part = self.parts.get(name, torch.zeros(shape))
            total = processes.all_reduce(part.flatten().to(processes.device))
            self.parts[name] = torch.tensor(total, dtype=torch.float64).view(shape)

    def mean(self, name: str) -> float:
        mean = self.parts[f"sum {name}"] / self.parts["sum n_tokens"]
        return mean.item()

    def result(self) -> dict:
        """All scores; those with a unit are in nats per token. `_se`: bootstrap standard error."""
        result = {}
        for part in self.parts:
            kind, _, name = part.partition(" ")
            if kind == "sum":
                mean = result[name] = self.mean(name)
                if name.startswith("nll"):
                    perplexity = name.replace("nll", "perplexity")
                    result[perplexity] = exp(mean)
        n_tokens = int(self.parts["sum n_tokens"])
        result |= {"n_tokens": n_tokens, "n_units": self.n_units}
        if self.n_units >= MIN_UNITS:
            for name, values in self.replicates().items():
                result[f"{name}_se"] = spread(values)
        result |= self.calibration() | self.selective_prediction()
        return result | {"histograms": self.histograms()}

    def replicates(self) -> dict[str, Tensor]:
        """name -> (N_REPLICATES,): the score of each resampled text."""
        n_tokens, nll, *gaps = self.parts["replicates"].unbind(1)
        ece = torch.stack(gaps).abs().sum(0) / n_tokens
        return {"nll": nll / n_tokens, "ece": ece}

    def calibration(self) -> dict:
        """The calibration error, and confidence and accuracy in each bin (0 in empty ones)."""
        n, confidence, accuracy = self.parts["bins"].unbind(1)
        ece = (confidence - accuracy).abs().sum() / n.sum()
        not_0 = n.clamp(min=1)
        bins = {
            "n": n.long().tolist(),
            "confidence": (confidence / not_0).tolist(),
            "accuracy": (accuracy / not_0).tolist(),
        }
        return {"ece": ece.item(), "calibration": bins}

    def selective_prediction(self) -> dict:
        """The area under risk against coverage, by each uncertainty."""
        areas = {}
        for name in self.uncertainties():
            areas[name] = aurc(self.parts[f"token {name}"], self.parts[f"wrong {name}"])
        return {"aurc": areas}

    def histograms(self) -> dict[str, dict]:
        """The share of the tokens in each bin; values beyond the edges count in the last bins."""
        found = {}
        for name in self.uncertainties():
            counts = self.parts[f"histogram {name}"]
            shares = counts / counts.sum()
            found[name] = {"edges": EDGES[name].tolist(), "share": shares.tolist()}
        return found

    def uncertainties(self) -> list[str]:
        """The uncertainties that this model has: point weights have no mutual information."""
        return [name for name in EDGES if f"token {name}" in self.parts]


def fine_bin(values: Tensor) -> Tensor:
    """values (n,), at least 0 -> (n,) int64 below N_FINE, in the same order."""
    lowest = 2.0**MIN_EXPONENT
    highest = 2.0**MAX_EXPONENT * (1 - 2**-24)
    values = values.float().clamp(lowest, highest)
    bits = values.view(torch.int32).long()
    return (bits >> (23 - BITS)) - FIRST


def bootstrap_weights(units: list[int]) -> Tensor:
    """(len(units), N_REPLICATES): how often each unit occurs in each resampled text.

    Poisson(1) is the bootstrap's multinomial without its fixed total (Hanley and MacGibbon 2006).
    The weights depend on the unit's number alone, so all models are compared on the same texts."""
    draws = []
    for unit in units:
        generator = np.random.Generator(np.random.Philox(key=unit))
        draws.append(generator.poisson(1.0, N_REPLICATES))
    return torch.from_numpy(np.stack(draws)).double()


def spread(replicates: Tensor) -> float:
    """The standard deviation, without the resampled texts that happen to be empty."""
    return replicates[replicates.isfinite()].std().item()


def aurc(n: Tensor, wrong: Tensor) -> float:
    """The area under risk against coverage (Geifman et al. 2019): the mean over k of the error rate
    of the k most certain tokens, ties in random order.

    n, wrong (N_FINE,): all tokens, and the wrong ones, by uncertainty."""
    n_before = n.cumsum(0) - n
    wrong_before = wrong.cumsum(0) - wrong
    # of c tokens after C: the sum over j <= c of 1 / (C + j), and of (E + e j / c) / (C + j)
    reciprocals = torch.digamma(n_before + n + 1) - torch.digamma(n_before + 1)
    rate = wrong / n.clamp(min=1)
    areas = wrong + reciprocals * (wrong_before - rate * n_before)
    return (areas.sum() / n.sum()).item()


def auroc(in_domain: Tensor, ood: Tensor) -> float:
    """The area under the ROC curve of OOD detection by a higher uncertainty; ties count half.

    in_domain, ood (N_FINE,): counts by uncertainty."""
    ood_below = ood.cumsum(0) - ood / 2
    n_pairs = in_domain.sum() * ood.sum()
    share_below = (in_domain @ ood_below) / n_pairs
    return 1 - share_below.item()


def out_of_domain(in_domain: MetricAccumulator, ood: MetricAccumulator) -> dict:
    """How well each uncertainty detects OOD text: by token, and by the mean over a block."""
    result = {
        "n_tokens": int(ood.parts["sum n_tokens"]),
        "nll": ood.mean("nll"),
        "histograms": ood.histograms(),
        "auroc": {},
    }
    for name in [*ood.uncertainties(), "nll"]:
        result["auroc"][name] = {}
        for level in ("token", "block"):
            counts = [scores.parts[f"{level} {name}"] for scores in (in_domain, ood)]
            result["auroc"][name][level] = auroc(*counts)
    return result
