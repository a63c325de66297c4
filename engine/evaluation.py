"""The numbers that all heads share. Everything comes from log_probs, so it means the same for every head."""

import contextlib
import math
from collections.abc import Iterable

import numpy as np
import torch

from engine.distributed import Processes, seed_micro_batch
from engine.tokens import TokenFile, gather

N_BINS = 15  # of the calibration error, equally wide (Guo et al. 2017)
ROWS = 512  # positions whose (ROWS, V) log-probabilities exist at a time


def eval_batches(file: TokenFile, block_size: int, batch_size: int, n_batches: int) -> list[np.ndarray]:
    """Block starts of the fixed batches that every evaluation of a run sees: evenly spaced over the split."""
    n_blocks = max(1, (len(file) - 1) // block_size)
    n = min(n_blocks, n_batches * batch_size)
    starts = np.arange(n) * n_blocks // n * block_size
    return [starts[i : i + batch_size] for i in range(0, n, batch_size)]


def whole_split(file: TokenFile, block_size: int, batch_size: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """x, y of consecutive blocks that cover the split, every target once; the last, shorter block comes alone."""
    full, rest = divmod(len(file) - 1, block_size)
    starts = np.arange(full) * block_size
    for i in range(0, full, batch_size):
        yield gather(file.ids, starts[i : i + batch_size], block_size)
    if rest:
        yield gather(file.ids, np.array([full * block_size]), rest)


@torch.no_grad()
def mean_loss(
    model: torch.nn.Module, batches: list[np.ndarray], file: TokenFile, processes: Processes, cast
) -> dict[str, float]:
    """val_nll (nats of the true next token under the mean weights) and val_loss (what training minimises) over
    eval_batches, the work shared by all processes; the same numbers on each."""
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64)
    for i in processes.share(len(batches)):
        x, y = (t.to(processes.device) for t in gather(file.ids, batches[i], model.config.block_size))
        seed_micro_batch(0, i)  # the sampling estimators see the same noise in every evaluation
        with cast:
            for hidden, targets in _rows(model.hidden(x), y):
                log_probs = model.lm_head.log_probs(hidden)
                nll = -log_probs.gather(-1, targets.unsqueeze(-1)).sum()
                loss = model.lm_head.data_loss(hidden, targets) * len(targets)
                totals += torch.tensor([nll.item(), loss.item(), len(targets)], dtype=torch.float64)
    model.train()
    nll, loss, n = processes.sum(totals.to(processes.device, _widest(processes.device))).tolist()
    return {"val_nll": nll / n, "val_loss": loss / n + float(model.lm_head.kl_loss())}


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
    cast: contextlib.AbstractContextManager | None = None,
    n_samples: int = 0,
) -> dict[str, float]:
    """nll, perplexity, accuracy, ece, brier, entropy over batches of (x, y), streamed; nats per token.

    Where the head has them also mutual_information, log_sum_sigma, kl, kl_weight.
    """
    model.eval()
    seed_micro_batch(0, 0)  # n_samples draws the same noise each time
    sums, bins = {}, torch.zeros(3, N_BINS, dtype=torch.float64)
    for x, y in batches:
        with cast or contextlib.nullcontext():
            for hidden, targets in _rows(model.hidden(x.to(device)), y.to(device)):
                values, confidence, correct = _per_token(model.lm_head, hidden, targets, n_samples)
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + value.cpu().double().sum().item()
                sums["n_tokens"] = sums.get("n_tokens", 0) + len(targets)
                which = (confidence * N_BINS).long().clamp(max=N_BINS - 1).cpu()
                for row, value in enumerate((torch.ones_like(confidence), confidence, correct)):
                    bins[row].index_add_(0, which, value.cpu().double())
    n_tokens = sums.pop("n_tokens")
    result = {name: value / n_tokens for name, value in sums.items()}
    result["perplexity"] = math.exp(min(result["nll"], 700.0))
    result["n_tokens"] = n_tokens
    result["ece"] = ((bins[1] - bins[2]).abs().sum() / n_tokens).item()
    kl = float(model.lm_head.weights.kl())
    return result | ({"kl": kl, "kl_weight": model.lm_head.config.kl_weight} if kl else {})


def _per_token(head, hidden: torch.Tensor, targets: torch.Tensor, n_samples: int):
    """What is averaged over tokens, (n,) each; and confidence and correctness of the likeliest token, for the ECE."""
    log_probs = head.log_probs(hidden, n_samples)
    probs = log_probs.exp()
    of_target = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    confidence, guess = probs.max(-1)
    correct = (guess == targets).float()
    values = {
        "nll": -of_target,
        "accuracy": correct,
        "brier": probs.square().sum(-1) - 2 * of_target.exp() + 1,
        "entropy": -(probs * log_probs).sum(-1),
    }
    if head.weights.variance(hidden[:1]) is not None:
        values["mutual_information"] = head.uncertainty(hidden)[1]
    if hasattr(head.likelihood, "log_sum_sigma"):
        values["log_sum_sigma"] = head.likelihood.log_sum_sigma(head.logits(hidden))
    return values, confidence, correct


def unigram_nll(file: TokenFile, frequencies: torch.Tensor) -> float:
    """nats per token of the split under the training text's frequencies (V,): what a model without context reaches."""
    return -(file.counts(len(frequencies)) * frequencies.log()).sum().item() / len(file)


def _rows(hidden: torch.Tensor, targets: torch.Tensor):
    """(B, T, C) and (B, T) -> pieces of (<= ROWS, C) and (<= ROWS,): logits of the whole batch never exist."""
    return zip(hidden.flatten(0, 1).split(ROWS), targets.flatten().split(ROWS), strict=True)


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
