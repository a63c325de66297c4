"""How probable are several endings of one context? By any head's log_probs."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from engine.base.distributed import seed_micro_batch
from engine.base.errors import UserError
from engine.data.tokenizer import Tokenizer
from engine.eval.evaluation import row_chunks

# rows of logits at a time for point weights: with log_probs alone to compute, more are faster
CHUNK_ROWS = 256

Item = tuple[list[int], list[list[int]]]  # token ids of a context, and of its endings (not empty)


@torch.no_grad()
def score_endings(
    model: torch.nn.Module,
    items: Sequence[Item],
    batch_size: int = 64,
    cast: AbstractContextManager | None = None,
    n_samples: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For all endings of all items in their order, (N,) float64: the sums over their tokens of
    log p and of the epistemic uncertainty, nats (0 without Bayesian weights).

    A text that does not fit into block_size is cut from the left, as in lm-evaluation-harness."""
    model.eval()
    head, bayes = model.lm_head, bool(model.bayes_layers())
    device = next(model.parameters()).device
    texts = [
        (torch.tensor((context + ending)[-model.config.block_size - 1 :]), len(ending))
        for context, endings in items
        for ending in endings
    ]
    # texts of similar length together: little padding
    order = torch.tensor([len(ids) for ids, _ in texts]).argsort(descending=True, stable=True)
    log_p, epistemic = torch.zeros(2, len(texts), dtype=torch.float64)
    for numbers in tqdm(order.split(batch_size), desc="endings", leave=False, disable=None):
        idx = pad_sequence([texts[i][0] for i in numbers], batch_first=True)
        is_ending = torch.zeros(len(numbers), idx.size(1) - 1, dtype=torch.bool)
        for row, i in zip(is_ending, numbers, strict=True):
            ids, n_tokens = texts[i]
            end = len(ids) - 1
            row[max(0, end - n_tokens) : end] = True
        owners = numbers[:, None].expand_as(is_ending)[is_ending]
        targets = idx[:, 1:][is_ending].to(device)
        seed_micro_batch(0, 0)  # all endings are judged under the same draws of the weights
        with cast or nullcontext():
            hiddens = model.hiddens(idx[:, :-1].to(device), n_samples)
            hiddens = [hidden[is_ending.to(device)] for hidden in hiddens]
            for rows in row_chunks(len(targets), device, size=0 if bayes else CHUNK_ROWS):
                states = [hidden[rows] for hidden in hiddens]
                if bayes:
                    seed_micro_batch(1, 0)
                    prediction = head.predict(states, n_samples)
                    log_probs = prediction.log_probs
                    values = prediction.epistemic.cpu().double()
                    epistemic.index_add_(0, owners[rows], values)
                else:  # without the entropies of predict(), which take time
                    log_probs = head.log_probs(states, n_samples)
                nll = F.nll_loss(log_probs, targets[rows], reduction="none")
                log_p.index_add_(0, owners[rows], -nll.cpu().double())
    return log_p, epistemic


def encode(tokenizer: Tokenizer, context: str, endings: Sequence[str]) -> Item:
    """Context and endings are encoded separately: an item's contexts are the same tokens."""
    ids = tokenizer.encode(context).tolist()
    if not ids and tokenizer.eot is None:
        raise UserError(
            "a context is empty, and this tokenizer has no end-of-text token to start from"
        )
    return ids or [tokenizer.eot], [tokenizer.encode(ending).tolist() for ending in endings]
