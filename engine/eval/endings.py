"""Score several endings of a context with any head, by its log_probs."""

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from engine.base.distributed import seed_micro_batch
from engine.eval.evaluation import row_chunks
from heads.head import token_scores

Item = tuple[list[int], list[list[int]]]  # token ids of a context and of its endings


@torch.no_grad()
def score_endings(
    model: torch.nn.Module,
    items: list[Item],
    batch_size: int = 64,
    n_samples: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns two tensors (N,) in the order of the items: the sum of log p over each ending's
    tokens, float64, and whether each of them is the likeliest.

    A text that does not fit into block_size is cut from the left, as in lm-evaluation-harness."""
    model.eval()
    device = next(model.parameters()).device
    longest = model.config.block_size + 1
    inputs, labels = [], []
    for context, endings in items:
        for ending in endings:
            ids = torch.tensor((context + ending)[-longest:])
            inputs.append(ids[:-1])
            is_context = torch.arange(len(ids), 0, -1) > len(ending)
            labels.append(ids.masked_fill(is_context, -1)[1:])
    # texts of similar length together: little padding
    lengths = torch.tensor([len(ids) for ids in inputs])
    order = lengths.argsort(descending=True, stable=True)
    sums = torch.zeros(len(inputs), dtype=torch.float64)
    are_likeliest = torch.ones(len(inputs), dtype=torch.bool)
    for numbers in tqdm(order.split(batch_size), desc="endings", leave=False, disable=None):
        x = pad_sequence([inputs[i] for i in numbers], batch_first=True)
        y = pad_sequence([labels[i] for i in numbers], batch_first=True, padding_value=-1)
        is_ending = y >= 0
        owners = numbers[:, None].expand_as(y)[is_ending]
        targets = y[is_ending].to(device)
        seed_micro_batch(0, 0)  # all endings are scored under the same draws of the weights
        hiddens = model.hiddens(x.to(device), n_samples)
        hiddens = [hidden[is_ending.to(device)] for hidden in hiddens]
        for rows in row_chunks(len(targets), device, model.config.vocab_size):
            seed_micro_batch(1, 0)
            states = [hidden[rows] for hidden in hiddens]
            log_probs = model.lm_head.log_probs(states, n_samples)
            scores = token_scores(log_probs, targets[rows])
            sums.index_add_(0, owners[rows], -scores.nll.cpu().double())
            is_wrong = ~scores.correct.cpu()
            are_likeliest[owners[rows][is_wrong]] = False
    return sums, are_likeliest
