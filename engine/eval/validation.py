"""The evaluation during training: nll, calibration and loss on fixed validation batches."""

import math

import numpy as np
import torch

from engine.base.distributed import Processes, seed_micro_batch
from engine.data.tokens import TokenFile, gather

N_BINS = 15  # of the calibration error (Guo et al. 2017)


@torch.no_grad()
def mean_loss(
    model: torch.nn.Module,
    batches: list[np.ndarray],
    file: TokenFile,
    processes: Processes,
    cast,
) -> dict[str, float]:
    """The means over all tokens of the batches. The processes share them; all get the result.

    val_nll (nats per token), val_perplexity and val_ece (of the likeliest token) use the mean
    weights. val_loss is what training minimises, but without dropout, soft labels and the noise of
    Bayesian MLPs."""
    model.eval()
    totals = 0.0
    n = len(batches)
    n_rounds = math.ceil(n / processes.world_size)
    # every process takes part in every round, because a sharded model's forward pass needs all
    for i in processes.share(0, n_rounds * processes.world_size):
        x, y = gather(file, batches[i % n], model.config.block_size)
        seed_micro_batch(0, i)  # estimators that sample use the same noise in every evaluation
        with cast:
            loss, scores = model.scores(x.to(processes.device), y.to(processes.device))
        nll, confidence, correct = (column.cpu().double() for column in scores)
        gaps = torch.bincount(bins_of(confidence), confidence - correct, N_BINS)
        n_tokens = len(nll)
        sums = nll.new_tensor([nll.sum().item(), loss.item() * n_tokens, n_tokens])
        values = torch.cat([sums, gaps])
        if i >= n:
            values.zero_()
        totals += np.array(processes.all_reduce(values))
    model.train()
    nll, loss, n_tokens, *gaps = totals.tolist()
    nll /= n_tokens
    return {
        "val_nll": nll,
        "val_perplexity": exp(nll),
        "val_ece": np.abs(gaps).sum().item() / n_tokens,
        "val_loss": loss / n_tokens,
    }


def bins_of(confidence: torch.Tensor) -> torch.Tensor:
    """(n,) -> the bin of each, of N_BINS equally wide ones; NaN falls into one of them too."""
    return (confidence * N_BINS).long().clamp(0, N_BINS - 1)


def exp(nll: float) -> float:
    """The perplexity, limited so that it is finite in JSON."""
    return math.exp(min(nll, 700.0))
