"""Fit a kron posterior to a trained head, on blocks of the training text."""

from collections.abc import Iterator

import torch
from tqdm import tqdm

from engine.base.errors import UserError
from engine.data.tokens import TokenFile, gather
from engine.data.windows import eval_batches

POSITIONS = 100_000  # of the training split, in evenly spaced blocks
POSITIONS_PER_DIMENSION = 20  # at least, for a second moment with n_embd^2 entries
# added to the diagonal of the second moment, in units of its mean eigenvalue: a LayerNorm's output
# does not vary in one direction. From 1e-4 to 1e-1 the validation nll is the same to 1e-5; smaller
# values detect uniformly random ids better, larger ones detect similar text better
DAMPING = 1e-3


def check_text(n_embd: int, file: TokenFile) -> None:
    """Refuse a training split that is too short for a fit."""
    least = POSITIONS_PER_DIMENSION * n_embd
    if len(file) < least:
        raise UserError(
            f"posterior = 'kron' needs {least} tokens of training text for n_embd = {n_embd}, "
            f"but {file.path} has {len(file)}; use --posterior=row"
        )


def fit_posterior(model, data: TokenFile, processes, cast) -> str:
    """Fit the covariance of the output weights; their means do not change. Returns a line to print.

    data: the training split. The hidden states are those of evenly spaced blocks, so any number of
    processes finds the same posterior.
    """
    vocab_size, n_embd = model.lm_head.weights.weight.shape
    rank, world_size = processes.rank, processes.world_size
    sums = torch.zeros(n_embd * n_embd + 1, dtype=torch.float64)  # the last one counts positions
    for x in states(model, data, POSITIONS, cast, rank, world_size):
        processes.heartbeat()
        x = x.cpu().double()
        sums[:-1] += (x.T @ x).flatten()
        sums[-1] += len(x)
    if world_size > 1:
        sums = sums.to(processes.device)
    *sums, n = processes.all_reduce(sums)
    second_moment = torch.tensor(sums, dtype=torch.float64).view(n_embd, n_embd) / n
    model.lm_head.weights.fit_columns(second_moment, data.frequencies(vocab_size), DAMPING)
    return f"kron posterior fitted on {n:,.0f} positions of the training text"


@torch.no_grad()
def states(
    model, file: TokenFile, n: int, cast, rank: int = 0, world_size: int = 1
) -> Iterator[torch.Tensor]:
    """Hidden states (T, C) of this process's blocks. All processes together read at least n
    positions, if the split has as many."""
    block_size, device = model.config.block_size, model.lm_head.weights.weight.device
    n_blocks = -(-n // block_size)
    blocks = eval_batches(file, block_size, 1, n_blocks)[rank::world_size]
    was_training = model.training
    model.eval()
    for start in tqdm(blocks, desc="posterior", leave=False, disable=None):
        x, _ = gather(file, start, block_size)
        with cast:
            hidden = model.hidden(x.to(device))
        yield hidden.flatten(0, 1)
    model.train(was_training)
