"""How probable are several endings of one context? The context is read once for all of them.

A batch row is a context and its endings, which do not see each other (Branches). So no cache is
copied, and only whole rows are padded, which sorting by length keeps small.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from engine.base.distributed import seed_micro_batch
from engine.base.errors import UserError
from engine.data.tokenizer import Tokenizer
from engine.eval.evaluation import row_chunks

# rows of logits at a time with point weights: as nothing but log_probs is computed, more are faster
CHUNK_ROWS = 256

Item = tuple[list[int], list[list[int]]]  # token ids of a context, and of its endings (not empty)


class Branches:
    """In place of a cache: rows that hold a context and several texts that continue it.

    The texts do not see each other, and the context is read once. branch (B, T) is 0 for the
    context, 1, 2, ... for the texts and -1 for padding at the end; positions (B, T) are those of
    the tokens in their own text, context included.
    """

    def __init__(self, branch: torch.Tensor, positions: torch.Tensor):
        same_text = branch.unsqueeze(1) == branch.unsqueeze(2)
        is_context = branch.unsqueeze(1) == 0
        self.mask = (is_context | same_text).tril().unsqueeze(1)  # (B, 1, T, T)
        self._positions = positions

    def positions(self, idx: torch.Tensor) -> torch.Tensor:
        return self._positions

    def extend(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """k, v unchanged, and the mask."""
        return k, v, self.mask


class Row:
    """A context and the texts that continue it, laid out as one row of tokens."""

    def __init__(self, context: Sequence[int]):
        self.n_context, self.n_texts = len(context), 0
        # of each token to read; the last token of a text is predicted, never read
        self.ids = list(context)
        self.branch = [0] * len(context)
        self.positions = list(range(len(context)))
        # of each token to predict
        self.at: list[int] = []  # where in the row it is predicted
        self.targets: list[int] = []
        self.owners: list[int] = []  # the number of the ending that it belongs to

    def add(self, text: list[int], owner: int) -> None:
        n_read, start = len(text) - 1, len(self.ids)
        self.n_texts += 1
        self.at += [self.n_context - 1, *range(start, start + n_read)]
        self.targets += text
        self.owners += [owner] * len(text)
        self.ids += text[:-1]
        self.branch += [self.n_texts] * n_read
        self.positions += range(self.n_context, self.n_context + n_read)


@torch.no_grad()
def score_endings(
    model: torch.nn.Module,
    items: Sequence[Item],
    batch_size: int = 16,
    cast: AbstractContextManager | None = None,
    n_samples: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For all endings of all items in their order, (N,) float64: the sums over their tokens of log p
    and of the epistemic uncertainty, nats (0 without Bayesian weights)."""
    model.eval()
    seed_micro_batch(0, 0)  # the same draws each time
    head, bayes = model.lm_head, bool(model.bayes_layers())
    device = next(model.parameters()).device
    n_endings = sum(len(endings) for _, endings in items)
    log_p, epistemic = torch.zeros(2, n_endings, dtype=torch.float64)
    batches = list(by_length(make_rows(items, model.config.block_size), batch_size))
    for rows in tqdm(batches, desc="endings", leave=False, disable=None):
        idx, branches, at, targets, owners = collate(rows, device)
        with cast or nullcontext():
            hiddens = [x.flatten(0, 1)[at] for x in model.hiddens(idx, n_samples, branches)]
            for some in row_chunks(len(at), device, size=0 if bayes else CHUNK_ROWS):
                states = [hidden[some] for hidden in hiddens]
                if bayes:
                    prediction = head.predict(states, n_samples)
                    log_probs = prediction.log_probs
                    values = prediction.epistemic.cpu().double()
                    epistemic.index_add_(0, owners[some], values)
                else:  # without the entropies of predict(), which take time
                    log_probs = head.log_probs(states, n_samples)
                nll = F.nll_loss(log_probs, targets[some], reduction="none")
                log_p.index_add_(0, owners[some], -nll.cpu().double())
    return log_p, epistemic


def encode(tokenizer: Tokenizer, context: str, endings: Sequence[str]) -> Item:
    """Encode the context and each ending on its own, so that the endings share the context's tokens."""
    ids = tokenizer.encode(context).tolist()
    if not ids and tokenizer.eot is None:
        raise UserError(
            "a context is empty, and this tokenizer has no end-of-text token to start from"
        )
    return ids or [tokenizer.eot], [tokenizer.encode(ending).tolist() for ending in endings]


def make_rows(items: Sequence[Item], block_size: int) -> list[Row]:
    """One row for all endings that continue the same tokens.

    What does not fit into block_size is cut from the left as in lm-evaluation-harness, for each
    ending by itself. An ending longer than that is split into texts of half a block, each with what
    comes before it as context."""
    rows, owner = {}, 0
    for number, (context, endings) in enumerate(items):
        for ids in endings:
            whole = context + ids
            step = len(ids) if len(ids) <= block_size else max(1, block_size // 2)
            for start in range(len(context), len(whole), step):
                end = min(start + step, len(whole))
                before = tuple(whole[max(0, end - 1 - block_size) : start])
                row = rows.setdefault((number, before), Row(before))
                row.add(whole[start:end], owner)
            owner += 1
    return list(rows.values())


def by_length(rows: Sequence[Row], batch_size: int) -> Iterator[list[Row]]:
    """Batches of at most batch_size rows, the longest first, padded by at most a tenth."""
    batch = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        if len(batch) == batch_size or (batch and len(batch[0].ids) > 1.1 * len(row.ids)):
            yield batch
            batch = []
        batch.append(row)
    yield batch


def collate(rows: Sequence[Row], device: torch.device) -> tuple[torch.Tensor | Branches, ...]:
    """idx (B, T) and its Branches; and for each token to predict, (N,): its place among the B * T,
    its id, and its ending (on the CPU)."""

    def padded(name: str, value: int) -> torch.Tensor:
        parts = [torch.tensor(getattr(row, name)) for row in rows]
        return pad_sequence(parts, batch_first=True, padding_value=value).to(device)

    idx = padded("ids", 0)
    branches = Branches(padded("branch", -1), padded("positions", 0))
    at = torch.cat([torch.tensor(row.at) + b * idx.size(1) for b, row in enumerate(rows)])
    targets = torch.cat([torch.tensor(row.targets) for row in rows])
    owners = torch.cat([torch.tensor(row.owners) for row in rows])
    return idx, branches, at.to(device), targets.to(device), owners
