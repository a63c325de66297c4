"""Scores of predictions, accumulated token by token in memory that does not grow with the text.

All that a MetricAccumulator holds adds up: sums, bins, counts of finely rounded values, and sums
under a bootstrap's weights of documents. So any batch size and any number of processes have the
same result, up to rounding.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.base.distributed import Processes
from engine.eval.validation import N_BINS, bins_of, exp

N_REPLICATES = 1000  # of the bootstrap: a standard error is right to 2 %
MIN_UNITS = 10  # with fewer there is nothing to resample
# what ranks tokens by how uncertain they are; confidence: 1 minus it
UNCERTAINTIES = ("confidence", "entropy", "aleatoric", "mutual_information")
RESAMPLED = ("n_tokens", "n_bytes", "nll", "accuracy", "accuracy_top5", "brier")
# values are counted in 2^BITS bins for each power of two; within a bin they are ties
MIN_EXPONENT, MAX_EXPONENT, BITS = -40, 8, 11
N_FINE = (MAX_EXPONENT - MIN_EXPONENT) << BITS
FIRST = (127 + MIN_EXPONENT) << BITS  # the upper bits of the float32 2^MIN_EXPONENT
EDGES = {  # of histograms, the same for all runs and texts
    "confidence": np.linspace(0, 1, 41),
    "entropy": np.linspace(0, 12, 49),
    "aleatoric": np.linspace(0, 12, 49),
    "mutual_information": np.geomspace(1e-5, 10, 61),
    "nll": np.linspace(0, 20, 41),
}
COVERAGES = np.arange(1, 101) / 100


class MetricAccumulator:
    """Sums over the tokens scored so far. parts: name -> float64; all of them add up."""

    def __init__(self):
        self.parts, self.n_units, self.last_unit = {}, 0, -1

    def count_units(self, units: Tensor) -> None:
        """units (B, T): what the bootstrap resamples, by number; of all batches, in their order."""
        self.n_units += len(units.unique()) - int(units[0, 0] == self.last_unit)
        self.last_unit = units[-1, -1].item()

    def add(self, values: dict[str, Tensor], units: Tensor) -> None:
        """values: name -> (B * T,), the scores of B blocks. units (B, T): see count_units."""
        values = {name: value.cpu().double() for name, value in values.items()}
        ones = torch.ones_like(values["nll"])
        values = {"n_bytes": torch.zeros_like(ones)} | values | {"n_tokens": ones}
        for name, value in values.items():
            self._part(f"sum {name}", ()).add_(value.sum())
        confidence, accuracy = values["confidence"], values["accuracy"]
        bins = bins_of(confidence)
        self._add_at("bins", N_BINS, bins, [ones, confidence, accuracy])
        for name in EDGES:
            if name in values:
                value = 1 - confidence if name == "confidence" else values[name]
                columns = [ones, 1 - accuracy, confidence]
                self._add_at(f"token {name}", N_FINE, fine_bin(value), columns)
                block_means = value.view(units.shape).mean(1)
                self._add_at(f"block {name}", N_FINE, fine_bin(block_means), [ones[: len(units)]])
        resampled = torch.stack([values[name] for name in RESAMPLED], 1)
        gaps = F.one_hot(bins, N_BINS) * (confidence - accuracy)[:, None]
        columns = torch.cat([resampled, gaps], 1)
        numbers, index = units.flatten().unique(return_inverse=True)
        of_units = columns.new_zeros(len(numbers), columns.size(1)).index_add_(0, index, columns)
        weights = bootstrap_weights(numbers.tolist())
        self._part("replicates", (N_REPLICATES, columns.size(1))).add_(weights.T @ of_units)

    def join(self, processes: Processes) -> None:
        """Add up the parts of all processes; the same on each."""
        if processes.world_size == 1:
            return
        shapes = processes.broadcast({name: part.shape for name, part in self.parts.items()})
        for name, shape in shapes.items():
            total = processes.all_reduce(self._part(name, shape).flatten().to(processes.device))
            self.parts[name] = torch.tensor(total, dtype=torch.float64).view(shape)

    def mean(self, name: str) -> float:
        return (self.parts[f"sum {name}"] / self.parts["sum n_tokens"]).item()

    def result(self) -> dict:
        """All scores, nats per token if they have a unit. `_se`: the bootstrap's standard error."""
        names = [name.removeprefix("sum ") for name in self.parts if name.startswith("sum ")]
        result = {name: self.mean(name) for name in names}
        for name in names:
            if name.startswith("nll"):
                result[name.replace("nll", "perplexity")] = exp(result[name])
        n_tokens = int(self.parts["sum n_tokens"].item())
        n_bytes = int(self.parts["sum n_bytes"].item())
        result |= {"n_tokens": n_tokens, "n_bytes": n_bytes, "n_units": self.n_units}
        if n_bytes:
            result["bits_per_byte"] = result["nll"] * n_tokens / n_bytes / math.log(2)
        n, confidence, correct = self.parts["bins"].unbind(1)
        result["ece"] = ((confidence - correct).abs().sum() / n_tokens).item()
        result["adaptive_ece"] = adaptive_ece(self.parts["token confidence"])
        if self.n_units >= MIN_UNITS:
            result |= {f"{name}_se": spread(values) for name, values in self.replicates().items()}
        result["calibration"] = {
            "n": n.long().tolist(),
            "confidence": means(confidence, n),
            "accuracy": means(correct, n),
        }
        ranked = {
            name: self.parts[f"token {name}"]
            for name in UNCERTAINTIES
            if f"token {name}" in self.parts
        }
        result["aurc"] = {name: aurc(table) for name, table in ranked.items()}
        n_right = correct.sum().item()
        n_wrong = n_tokens - n_right
        best = torch.tensor([[n_right, 0.0], [n_wrong, n_wrong]])  # all wrong answers come last
        result["aurc"]["oracle"] = aurc(best.double())
        risk = {name: risks(table, COVERAGES) for name, table in ranked.items()}
        result["risk_coverage"] = {"coverage": COVERAGES.tolist(), "risk": risk}
        result["histograms"] = self.histograms()
        return result

    def replicates(self) -> dict[str, Tensor]:
        """name -> (N_REPLICATES,): the scores of as many resampled texts."""
        sums, gaps = self.parts["replicates"].split([len(RESAMPLED), N_BINS], dim=1)
        n_tokens, n_bytes, nll, *_ = sums.unbind(1)
        values = dict(zip(RESAMPLED[2:], (sums[:, 2:] / n_tokens[:, None]).unbind(1), strict=True))
        values["perplexity"] = values["nll"].clamp(max=700).exp()
        values["ece"] = gaps.abs().sum(1) / n_tokens
        if n_bytes.any():
            values["bits_per_byte"] = nll / n_bytes / math.log(2)
        return values

    def histograms(self) -> dict[str, dict[str, list[float]]]:
        """The share of the tokens between each two edges; values beyond the ends count there."""
        found, centers = {}, fine_bin_centers()
        for name, edges in EDGES.items():
            if f"token {name}" in self.parts:
                counts = self.parts[f"token {name}"][:, 0].numpy()
                values = 1 - centers if name == "confidence" else centers
                shares, _ = np.histogram(values.clip(edges[0], edges[-1]), edges, weights=counts)
                shares = shares / max(1.0, shares.sum())
                found[name] = {"edges": edges.tolist(), "share": shares.tolist()}
        return found

    def _part(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self.parts:
            self.parts[name] = torch.zeros(shape, dtype=torch.float64)
        return self.parts[name]

    def _add_at(self, name: str, n_rows: int, at: Tensor, columns: list[Tensor]) -> None:
        """Add columns, (n,) each, to the rows at (n,) of a table (n_rows, len(columns))."""
        self._part(name, (n_rows, len(columns))).index_add_(0, at, torch.stack(columns, 1))


def means(sums: Tensor, n: Tensor) -> list[float | None]:
    """sums / n; None where n is 0."""
    return [total / k if k else None for total, k in zip(sums.tolist(), n.tolist(), strict=True)]


def fine_bin(values: Tensor) -> Tensor:
    """values (n,), at least 0 -> (n,) int64 below N_FINE, in the same order."""
    highest = 2.0**MAX_EXPONENT * (1 - 2**-24)
    bits = values.float().clamp(2.0**MIN_EXPONENT, highest).view(torch.int32).long()
    return (bits >> (23 - BITS)) - FIRST


def fine_bin_centers() -> np.ndarray:
    """(N_FINE,) float64."""
    lower_edges = (np.arange(N_FINE) + FIRST) << (23 - BITS)
    bits = lower_edges + (1 << (22 - BITS))
    return bits.astype(np.int32).view(np.float32).astype(np.float64)


def bootstrap_weights(units: list[int]) -> Tensor:
    """(len(units), N_REPLICATES): how often each unit is in each resampled text.

    Poisson(1) is the bootstrap's multinomial without its fixed total (Hanley and MacGibbon 2006).
    It depends on the unit's number alone, so two models are compared on the same texts."""
    generators = [np.random.Generator(np.random.Philox(key=unit)) for unit in units]
    draws = [generator.poisson(1.0, N_REPLICATES) for generator in generators]
    return torch.from_numpy(np.stack(draws).astype(np.float64))


def spread(replicates: Tensor) -> float:
    """The standard deviation, without resampled texts that happen to hold no unit."""
    return replicates[replicates.isfinite()].std().item()


def cumulative(counts: Tensor) -> np.ndarray:
    """counts (n,) -> (n + 1,): the sums before each and at the end."""
    return np.concatenate([[0.0], counts.cumsum(0).numpy()])


def adaptive_ece(table: Tensor) -> float:
    """The calibration error in N_BINS bins of equally many tokens (Nixon et al. 2019).

    table (N_FINE, 3), by uncertainty: tokens, wrong ones, and the sum of their confidence."""
    n, wrong, confidence = (cumulative(column) for column in table.unbind(1))
    ends = np.linspace(0, n[-1], N_BINS + 1)
    correct = ends - np.interp(ends, n, wrong)
    gaps = np.diff(np.interp(ends, n, confidence)) - np.diff(correct)
    return float(np.abs(gaps).sum() / n[-1])


def aurc(table: Tensor) -> float:
    """The area under risk against coverage (Geifman et al. 2019): the mean over k of the error rate
    of the k most certain tokens, ties in random order. table: as in adaptive_ece."""
    n, wrong = table[:, 0], table[:, 1]
    n_before, wrong_before = n.cumsum(0) - n, wrong.cumsum(0) - wrong
    # of c tokens after C: the sum over j <= c of 1 / (C + j), and of (E + e j / c) / (C + j)
    reciprocals = torch.digamma(n_before + n + 1) - torch.digamma(n_before + 1)
    areas = wrong + reciprocals * (wrong_before - wrong * n_before / n.clamp(min=1))
    return (areas.sum() / n.sum()).item()


def risks(table: Tensor, coverages: np.ndarray) -> list[float]:
    """The error rate of the most certain share of the tokens. table: see adaptive_ece."""
    n, wrong = cumulative(table[:, 0]), cumulative(table[:, 1])
    n_answered = coverages * n[-1]
    return (np.interp(n_answered, n, wrong) / n_answered).tolist()


def auroc_and_fpr95(in_domain: Tensor, ood: Tensor) -> tuple[float, float]:
    """Tell out-of-domain text by its higher uncertainty; counts (N_FINE,) by uncertainty.

    The area under the ROC curve, ties counted half; and the share of OOD text accepted at the
    threshold that accepts 95 % of the in-domain text (Liang et al. 2018), ties in random order."""
    ood_below = ood.cumsum(0) - ood
    auroc = 1 - (in_domain @ (ood_below + ood / 2)) / (in_domain.sum() * ood.sum())
    n_in_domain, n_ood = cumulative(in_domain), cumulative(ood)
    wanted = 0.95 * n_in_domain[-1]
    last = n_in_domain.searchsorted(wanted)
    around = slice(last - 1, last + 1)
    accepted = np.interp(wanted, n_in_domain[around], n_ood[around])
    return auroc.item(), float(accepted / n_ood[-1])


def out_of_domain(in_domain: MetricAccumulator, ood: MetricAccumulator) -> dict:
    """How well each uncertainty tells OOD text, by token and by the mean over a block."""
    result = {"n_tokens": int(ood.parts["sum n_tokens"].item()), "nll": ood.mean("nll")}
    result |= {"auroc": {}, "fpr95": {}, "histograms": ood.histograms()}
    for name in ood.histograms():
        found = {}
        for level in ("token", "block"):
            counts = [scores.parts[f"{level} {name}"][:, 0] for scores in (in_domain, ood)]
            found[level] = auroc_and_fpr95(*counts)
        result["auroc"][name] = {level: auroc for level, (auroc, _) in found.items()}
        result["fpr95"][name] = {level: fpr95 for level, (_, fpr95) in found.items()}
    return result


def selective_accuracy(correct: Tensor, uncertainty: Tensor) -> dict[str, float]:
    """Are uncertain answers wrong more often? correct, uncertainty (n,) -> the accuracy of the more
    certain half and of the rest, and the area under risk against coverage."""
    correct = correct[uncertainty.argsort(stable=True)].double()
    half = (len(correct) + 1) // 2
    error_rates = 1 - correct.cumsum(0) / torch.arange(1, len(correct) + 1)
    rest = correct[half:] if len(correct) > 1 else correct
    return {
        "accuracy_certain_half": correct[:half].mean().item(),
        "accuracy_rest": rest.mean().item(),
        "risk_coverage_area": error_rates.mean().item(),
    }
