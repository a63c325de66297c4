"""Fit a kron posterior to a trained head, in one pass over the training text."""

from collections.abc import Iterator

import torch
from tqdm import tqdm

from engine.base.errors import UserError
from engine.data.tokens import TokenFile, gather
from engine.data.windows import eval_batches

POSITIONS = 100_000  # of the training split, in evenly spaced blocks
POSITIONS_PER_DIMENSION = 20  # at least, for a second moment with n_embd^2 entries
VAL_POSITIONS = 4096
DAMPINGS = (1e-3, 1e-2, 1e-1)
SCALES = (0.25, 1.0, 4.0)  # of the variances


def check_text(n_embd: int, file: TokenFile) -> None:
    """Refuse a training split that is too short for a fit."""
    least = POSITIONS_PER_DIMENSION * n_embd
    if len(file) < least:
        raise UserError(
            f"posterior = 'kron' needs {least} tokens of training text for n_embd = {n_embd}, "
            f"and {file.path} has {len(file)}; use --posterior=row"
        )


def fit_posterior(model, data: dict[str, TokenFile], processes, cast) -> str:
    """Fit the covariance of the output weights, whose means stay; returns a line that says how.

    The validation split chooses damping and scale: by the nll of the prediction that averages over
    the weights. The hidden states are those of evenly spaced blocks, so any number of processes
    finds the same posterior.
    """
    weights = model.lm_head.weights
    vocab_size, n_embd = weights.weight.shape
    frequencies = data["train"].frequencies(vocab_size)
    rank, world_size = processes.rank, processes.world_size
    sums = torch.zeros(n_embd * n_embd + 1, dtype=torch.float64)  # the last one counts positions
    for x, _ in states(model, data["train"], POSITIONS, cast, rank, world_size):
        x = x.cpu().double()
        sums[:-1] += (x.T @ x).flatten()
        sums[-1] += len(x)
    *sums, n = processes.all_reduce(sums.to(processes.device))
    second_moment = torch.tensor(sums, dtype=torch.float64).view(n_embd, n_embd) / n
    validation = list(states(model, data["val"], VAL_POSITIONS, cast))
    tried = {}
    for damping in DAMPINGS:
        for scale in SCALES:
            weights.fit_columns(second_moment, frequencies, damping, scale)
            tried[damping, scale] = mean_nll(model.lm_head, validation)
    best = min(tried, key=tried.get)
    weights.fit_columns(second_moment, frequencies, *best)
    return (
        f"kron posterior fitted on {n:,.0f} positions: damping {best[0]}, scale {best[1]}, "
        f"validation nll {tried[best]:.4f} averaged over the weights"
    )


@torch.no_grad()
def states(
    model, file: TokenFile, n: int, cast, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Hidden states (T, C) and next tokens (T,) of a process's blocks, in all of at least n
    positions if the split has them."""
    block_size, device = model.config.block_size, model.lm_head.weights.weight.device
    n_blocks = -(-n // block_size)
    blocks = eval_batches(file, block_size, 1, n_blocks)[rank::world_size]
    was_training = model.training
    model.eval()
    for start in tqdm(blocks, desc="posterior", leave=False, disable=None):
        x, y = gather(file, start, block_size)
        with cast:
            hidden = model.hidden(x.to(device))
        yield hidden.flatten(0, 1), y.flatten().to(device)
    model.train(was_training)


@torch.no_grad()
def mean_nll(head, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The nll of the prediction that averages over the weights, nats per token."""
    total = 0.0
    for x, y in batches:
        log_probs = head.log_probs(x, n_samples=-1)
        total -= log_probs.gather(1, y.unsqueeze(1)).mean().item()
    return total / len(batches)
