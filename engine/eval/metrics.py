"""Scores of predictions, token by token, gathered in memory that does not grow with the text.

All that a Tally holds is additive: sums, bins, counts of finely rounded values, and sums again under a bootstrap's
weights of documents. So any batch size and any number of processes has the same result, up to rounding.
"""

import math

import numpy as np
import torch
from torch import Tensor

from engine.base.distributed import Processes
from engine.eval.validation import N_BINS, bins_of, exp

N_REPLICATES = 1000  # of the bootstrap: a standard error is right to 2 %
FEW = 10  # units: too few to resample
# what orders tokens by doubt; nll, which needs the true token, tells own text from foreign alone
DOUBTS = ("confidence", "entropy", "aleatoric", "mutual_information")
RESAMPLED = (
    "nll",
    "accuracy",
    "accuracy_top5",
    "brier",
)  # with n_tokens, n_bytes and the calibration's bins
# doubts are told apart to a 2,048th of themselves from 2^-40 to 2^8; within that they are ties
OCTAVES, BITS = range(-40, 8), 11
N_FINE = len(OCTAVES) << BITS
FIRST = (127 + OCTAVES[0]) << BITS  # the upper bits of a float32 of 2^-40
EDGES = {  # of histograms, the same for all runs and texts
    "confidence": np.linspace(0, 1, 41),
    "entropy": np.linspace(0, 12, 49),
    "aleatoric": np.linspace(0, 12, 49),
    "mutual_information": np.geomspace(1e-5, 10, 61),
    "nll": np.linspace(0, 20, 41),
}
COVERAGES = np.arange(1, 101) / 100


class MetricAccumulator:
    """What is known of the tokens scored so far; parts: name -> float64 of one shape, all of which add up."""

    def __init__(self):
        self.parts, self.n_units = {}, 0

    def add(self, values: dict[str, Tensor], units: Tensor, n_bytes: Tensor, n_rows: int) -> None:
        """values: name -> (n,) of the tokens in n_rows rows of one length, with nll, accuracy, accuracy_top5, brier,
        entropy and confidence among them; units (n,): the number of the document of each, n_bytes (n,)."""
        values = {name: value.cpu().double() for name, value in values.items()}
        for name, value in values.items():
            self._part(f"sum {name}", ()).add_(value.sum())
        ones, confidence, correct = (
            torch.ones_like(values["nll"]),
            values["confidence"],
            values["accuracy"],
        )
        self._part("sum n_tokens", ()).add_(len(ones))
        bins = bins_of(confidence)
        self._part("bins", (N_BINS, 3)).index_add_(
            0, bins, torch.stack([ones, confidence, correct], 1)
        )
        for name in (*DOUBTS, "nll"):
            if name in values:
                doubt = 1 - confidence if name == "confidence" else values[name]
                columns = torch.stack([ones, 1 - correct, confidence], 1)
                self._part(f"tokens {name}", (N_FINE, 3)).index_add_(0, place_of(doubt), columns)
                blocks = place_of(doubt.view(n_rows, -1).mean(1))
                self._part(f"blocks {name}", (N_FINE, 1)).index_add_(
                    0, blocks, torch.ones(n_rows, 1).double()
                )
        numbers, which = units.unique(return_inverse=True)
        columns = torch.stack([ones, n_bytes.double(), *(values[name] for name in RESAMPLED)], 1)
        gaps = (
            torch.zeros(len(ones), N_BINS)
            .double()
            .scatter_(1, bins[:, None], (confidence - correct)[:, None])
        )
        columns = torch.cat([columns, gaps], 1)
        of_units = columns.new_zeros(len(numbers), columns.size(1)).index_add_(0, which, columns)
        self._part("replicates", (N_REPLICATES, columns.size(1))).add_(
            weights_of(numbers.tolist()).T @ of_units
        )
        self._part("sum n_bytes", ()).add_(n_bytes.sum())

    def join(self, processes: Processes) -> None:
        """Add up what all processes have; the same on each."""
        if processes.world_size > 1:
            shapes = processes.broadcast({name: part.shape for name, part in self.parts.items()})
            mine = [self._part(name, shape).flatten() for name, shape in shapes.items()]
            sizes = [len(part) for part in mine]
            whole = torch.tensor(
                processes.all_reduce(torch.cat(mine).to(processes.device)), dtype=torch.float64
            )
            pieces = zip(shapes.items(), whole.split(sizes), strict=True)
            self.parts = {name: piece.view(shape) for (name, shape), piece in pieces}

    def mean(self, name: str) -> float:
        return (self.parts[f"sum {name}"] / self.parts["sum n_tokens"]).item()

    def result(self) -> dict:
        """All scores; nats per token where they have a unit, `_se` the standard error by the bootstrap (of a text that
        has units enough)."""
        names = [name.removeprefix("sum ") for name in self.parts if name.startswith("sum ")]
        n_tokens, n_bytes = (
            int(self.parts[f"sum {name}"].item()) for name in ("n_tokens", "n_bytes")
        )
        result = {name: self.mean(name) for name in names if name not in ("n_tokens", "n_bytes")}
        result |= {
            name.replace("nll", "perplexity"): exp(result[name])
            for name in names
            if name.startswith("nll")
        }
        result |= {"n_tokens": n_tokens, "n_bytes": n_bytes, "n_units": self.n_units}
        if n_bytes:
            result["bits_per_byte"] = result["nll"] * n_tokens / n_bytes / math.log(2)
        n, confidence, correct = self.parts["bins"].unbind(1)
        result["ece"] = ((confidence - correct).abs().sum() / n_tokens).item()
        result["adaptive_ece"] = adaptive_ece(self.parts["tokens confidence"])
        if self.n_units >= FEW:
            result |= {f"{name}_se": spread(values) for name, values in self.replicates().items()}
        result["calibration"] = {
            "n": n.long().tolist(),
            "confidence": [
                c / k if k else None for c, k in zip(confidence.tolist(), n.tolist(), strict=True)
            ],
            "accuracy": [
                c / k if k else None for c, k in zip(correct.tolist(), n.tolist(), strict=True)
            ],
        }
        ranked = {
            name: self.parts[f"tokens {name}"] for name in DOUBTS if f"tokens {name}" in self.parts
        }
        result["aurc"] = {name: aurc(table) for name, table in ranked.items()}
        n_right = correct.sum().item()  # the least area there is: all wrong answers come last
        n_wrong = n_tokens - n_right
        result["aurc"]["oracle"] = aurc(
            torch.tensor([[n_right, 0.0], [n_wrong, n_wrong]], dtype=torch.float64)
        )
        risk = {name: risks(table, COVERAGES) for name, table in ranked.items()}
        result["risk_coverage"] = {"coverage": COVERAGES.tolist(), "risk": risk}
        result["histograms"] = self.histograms()
        return result

    def replicates(self) -> dict[str, Tensor]:
        """name -> (N_REPLICATES,): the scores of as many resampled texts."""
        n, n_bytes, *sums = self.parts["replicates"].unbind(1)
        values = {name: column / n for name, column in zip(RESAMPLED, sums, strict=False)}
        values["perplexity"] = values["nll"].clamp(max=700).exp()
        values["ece"] = torch.stack(sums[len(RESAMPLED) :]).abs().sum(0) / n
        if n_bytes.any():
            values["bits_per_byte"] = sums[0] / n_bytes / math.log(2)
        return values

    def histograms(self) -> dict[str, dict[str, list[float]]]:
        """Of each doubt, the share of the tokens between each two edges; what lies beyond them counts to the ends."""
        found, values = {}, fine_values()
        for name, edges in EDGES.items():
            if (table := self.parts.get(f"tokens {name}")) is not None:
                at = 1 - values if name == "confidence" else values
                shares = np.histogram(
                    at.clip(edges[0], edges[-1]), edges, weights=table[:, 0].numpy()
                )[0]
                shares = (shares / max(1.0, shares.sum())).tolist()
                found[name] = {"edges": edges.tolist(), "share": shares}
        return found

    def _part(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self.parts:
            self.parts[name] = torch.zeros(shape, dtype=torch.float64)
        return self.parts[name]


def place_of(doubts: Tensor) -> Tensor:
    """doubts (n,), at least 0 -> (n,) int64 below N_FINE, in the same order."""
    doubts = doubts.float().clamp(2.0 ** OCTAVES[0], 2.0 ** (OCTAVES[-1] + 1) * (1 - 2**-24))
    return (doubts.view(torch.int32).long() >> (23 - BITS)) - FIRST


def fine_values() -> np.ndarray:
    """The doubt in the middle of each place, (N_FINE,) float64."""
    bits = (np.arange(N_FINE) + FIRST << 23 - BITS) + (1 << 22 - BITS)
    return bits.astype(np.int32).view(np.float32).astype(np.float64)


def weights_of(units: list[int]) -> Tensor:
    """(len(units), N_REPLICATES): how often each document is in each resampled text. Poisson(1), the bootstrap's
    multinomial but for the total number (Hanley and MacGibbon 2006); a function of the document's number alone, so that
    two models are compared on the same texts."""
    draws = [
        np.random.Generator(np.random.Philox(key=unit)).poisson(1.0, N_REPLICATES) for unit in units
    ]
    return torch.from_numpy(np.stack(draws).astype(np.float64))


def spread(replicates: Tensor) -> float:
    """Their standard deviation. Of a few units a resampled text may hold none, and has no scores: it is left out."""
    return replicates[replicates.isfinite()].std().item()


def adaptive_ece(table: Tensor) -> float:
    """The calibration error in N_BINS bins of as many tokens each (Nixon et al. 2019). table: (N_FINE, 3) of tokens, of
    wrong ones and of the sum of confidence, in order of doubt."""
    n, wrong, confidence = (
        np.concatenate([[0.0], column.cumsum(0).numpy()]) for column in table.unbind(1)
    )
    ends = np.linspace(0, n[-1], N_BINS + 1)
    of_bins = np.diff(np.interp(ends, n, confidence)) - np.diff(ends - np.interp(ends, n, wrong))
    return float(np.abs(of_bins).sum() / n[-1])


def aurc(table: Tensor) -> float:
    """The area under risk against coverage (Geifman et al. 2019): the mean over k of the error rate of the k tokens
    with the least doubt, ties in random order. table: (N, 2 or more) of tokens and wrong ones, in order of doubt."""
    n, wrong = table[:, 0], table[:, 1]
    n_before, wrong_before = n.cumsum(0) - n, wrong.cumsum(0) - wrong
    # of c tokens behind C: the sum over j <= c of 1 / (C + j), and of (E + e j / c) / (C + j)
    reciprocals = torch.digamma(n_before + n + 1) - torch.digamma(n_before + 1)
    areas = wrong + reciprocals * (wrong_before - wrong * n_before / n.clamp(min=1))
    return (areas.sum() / n.sum()).item()


def risks(table: Tensor, coverages: np.ndarray) -> list[float]:
    """The error rate among each share of the tokens, those with the least doubt."""
    n, wrong = (np.concatenate([[0.0], table[:, i].cumsum(0).numpy()]) for i in range(2))
    return (np.interp(coverages * n[-1], n, wrong) / (coverages * n[-1])).tolist()


def tell_apart(own: Tensor, foreign: Tensor) -> tuple[float, float]:
    """own, foreign (N_FINE,): how many have each doubt. Returns the area under the ROC curve (foreign text has more
    doubt than own; ties count half) and FPR95, the share of the foreign that passes for own where 95 % of the own do
    (Liang et al. 2018)."""
    before = foreign.cumsum(0) - foreign
    auroc = 1 - (own @ (before + foreign / 2)) / (own.sum() * foreign.sum())
    n_own, n_foreign = (
        np.concatenate([[0.0], column.cumsum(0).numpy()]) for column in (own, foreign)
    )
    last = n_own.searchsorted(
        0.95 * n_own[-1]
    )  # the first place by which so many of the own have passed
    at = slice(last - 1, last + 1)  # within a tie as many as a random order lets pass
    return auroc.item(), float(
        np.interp(0.95 * n_own[-1], n_own[at], n_foreign[at]) / n_foreign[-1]
    )


def out_of_domain(own: MetricAccumulator, foreign: MetricAccumulator) -> dict:
    """How well each doubt tells foreign text from own, by the token and by the mean over a block."""
    result = {"n_tokens": int(foreign.parts["sum n_tokens"].item()), "nll": foreign.mean("nll")}
    result |= {"auroc": {}, "fpr95": {}, "histograms": foreign.histograms()}
    for name in (*DOUBTS, "nll"):
        if f"tokens {name}" in own.parts:
            for level in ("tokens", "blocks"):
                pair = (tally.parts[f"{level} {name}"][:, 0] for tally in (own, foreign))
                for score, value in zip(("auroc", "fpr95"), tell_apart(*pair), strict=True):
                    result[score].setdefault(name, {})[level.removesuffix("s")] = value
    return result
