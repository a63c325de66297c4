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
# does not vary in one direction. The validation nll does not depend on it (1e-5). Smaller values
# detect random ids better, larger ones similar text; 1e-4 ranks reducible loss best in both regimes
# of the study
DAMPING = 1e-4


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

    data: the training split."""
    _, second_moment, n = moments(model, data, processes, cast, POSITIONS)
    vocab_size = len(model.lm_head.weights.weight)
    model.lm_head.weights.fit_columns(second_moment, data.frequencies(vocab_size), DAMPING)
    return f"kron posterior fitted on {n:,.0f} positions of the training text"


def moments(
    model, file: TokenFile, processes, cast, n_positions: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The mean (C,) and second moment (C, C) of hidden states, float64, and their number. They are
    those of evenly spaced blocks, the same ones for any number of processes."""
    n_embd = model.config.n_embd
    sums = torch.zeros(n_embd + 1, n_embd + 1, dtype=torch.float64)
    blocks = states(model, file, n_positions, cast, processes.rank, processes.world_size)
    for hidden, _ in blocks:
        processes.heartbeat()
        x = hidden.cpu().double()
        x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
        sums += x.T @ x
    totals = processes.all_reduce(sums.flatten())
    sums = torch.tensor(totals, dtype=torch.float64).view(sums.shape)
    if not (sums.isfinite().all() and sums.trace() > sums[-1, -1]):
        raise UserError("the model's hidden states are zero or not finite; train it again")
    n = sums[-1, -1].item()
    return sums[-1, :-1] / n, sums[:-1, :-1] / n, n


@torch.no_grad()
def states(
    model, file: TokenFile, n: int, cast, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Hidden states (T, C) and targets (T,) of this process's blocks. All processes together read
    at least n positions, if the split has as many."""
    block_size, device = model.config.block_size, model.transformer.wte.weight.device
    n_blocks = -(-n // block_size)
    blocks = eval_batches(file, block_size, 1, n_blocks)[rank::world_size]
    was_training = model.training
    model.eval()
    for start in tqdm(blocks, desc=str(file.path), leave=False, disable=None):
        x, y = gather(file, start, block_size)
        with cast:
            hidden = model.hidden(x.to(device))
        yield hidden.flatten(0, 1), y.flatten().to(device)
    model.train(was_training)
