"""How probable are several endings of one context? Each context is read once, whatever the number of its endings.

A batch row is a context and all its endings, which do not see each other (Branches): no cache to
copy, and padding only where whole rows differ in length, which sorting by length keeps small.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from tqdm import tqdm

from engine.base.distributed import seed_micro_batch
from engine.base.errors import UserError
from engine.data.tokenizer import Tokenizer
from engine.eval.evaluation import in_pieces
from heads import Head

Texts = tuple[
    list[int], list[list[int]]
]  # token ids of a context and of each of its endings, none of them empty


class Row(NamedTuple):
    """Token ids: a context, and what is scored behind it, each text with the number of the ending that it is of."""

    context: tuple[int, ...]
    texts: list[tuple[int, list[int]]]

    @property
    def n_read(self) -> int:
        """Tokens of the row: nothing is predicted from the last one of a text."""
        return len(self.context) + sum(len(ids) - 1 for _, ids in self.texts)


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


@torch.no_grad()
def score_endings(
    model: torch.nn.Module,
    items: Sequence[Texts],
    batch_size: int = 16,
    cast: AbstractContextManager | None = None,
    n_samples: int = 0,
    desc: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """desc: the name of a progress bar.

    Returns for all endings of all items in their order, (N,) float64, the sum over their tokens of log p(token) and of
    the epistemic uncertainty of its prediction, nats (0 where there are no Bayesian weights).
    """
    model.eval()
    seed_micro_batch(0, 0)  # n_samples draws the same noise each time
    rows = in_rows(items, model.config.block_size)
    sums = torch.zeros(2, sum(len(endings) for _, endings in items), dtype=torch.float64)
    device, bayes = next(model.parameters()).device, bool(model.bayes_layers())
    n = (
        None if bayes else 256
    )  # with fewer passes over the logits than evaluate() has, larger products win
    with tqdm(
        total=len(rows), desc=desc, leave=False, disable=None if desc else True
    ) as bar:  # None: not in a file
        for some in by_length(rows, batch_size):
            idx, branches, at, targets, owners = batch_of(some, device)
            with cast or nullcontext():
                hiddens = [x.flatten(0, 1)[at] for x in model.hiddens(idx, n_samples, branches)]
                for of_tokens, ids, owner in in_pieces(hiddens, targets, owners, n=n):
                    values = per_token(model.lm_head, of_tokens, ids, n_samples, bayes)
                    sums.index_add_(1, owner, values.cpu().double())
            bar.update(len(some))
    return sums[0], sums[1]


def per_token(
    head: Head, hiddens: Sequence[torch.Tensor], ids: torch.Tensor, n_samples: int, bayes: bool
) -> torch.Tensor:
    """hiddens (n, C) each, ids (n,) -> log p(id) and the prediction's epistemic uncertainty, (2, n)."""
    prediction = (
        head.predict(hiddens, n_samples) if bayes else None
    )  # its entropies cost further passes over V
    log_probs = prediction.log_probs if bayes else head.log_probs(hiddens, n_samples)
    log_p = log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return torch.stack([log_p, prediction.epistemic if bayes else torch.zeros_like(log_p)])


def encode(tokenizer: Tokenizer, context: str, endings: Sequence[str]) -> Texts:
    """Context and endings are encoded apart, so that the endings share the context's tokens."""
    ids = tokenizer.encode(context).tolist()
    if not ids and tokenizer.eot is None:
        raise UserError(
            "a context is empty, and this tokenizer has no end-of-text token to start from"
        )
    return ids or [tokenizer.eot], [tokenizer.encode(ending).tolist() for ending in endings]


def in_rows(items: Sequence[Texts], block_size: int) -> list[Row]:
    """The endings together that are behind the same tokens.

    What is longer than block_size is cut from the left as in lm-evaluation-harness, for each ending by itself (whose
    contexts then differ). An ending that alone is longer goes in texts of half a block, each behind what comes before.
    """
    rows, number = {}, 0
    for item, (context, endings) in enumerate(items):
        for ids in endings:
            whole, step = (
                context + ids,
                len(ids) if len(ids) <= block_size else max(1, block_size // 2),
            )
            for start in range(len(context), len(whole), step):
                end = min(start + step, len(whole))
                before = tuple(
                    whole[max(0, end - 1 - block_size) : start]
                )  # the last token is predicted, never read
                rows.setdefault((item, before), Row(before, [])).texts.append(
                    (number, whole[start:end])
                )
            number += 1
    return list(rows.values())


def by_length(rows: Sequence[Row], batch_size: int) -> Iterator[list[Row]]:
    """Batches of at most batch_size rows, the longest first, in which no row is padded by more than a tenth."""
    batch = []
    for row in sorted(rows, key=lambda row: -row.n_read):
        if len(batch) == batch_size or (batch and batch[0].n_read > 1.1 * row.n_read):
            yield batch
            batch = []
        batch.append(row)
    yield batch


def batch_of(rows: Sequence[Row], device: torch.device) -> tuple[torch.Tensor | Branches, ...]:
    """idx (B, T) and its Branches; and of each token that is predicted, (N,): where of the B * T its prediction stands,
    its id, its ending (on the CPU)."""
    B, T = len(rows), max(row.n_read for row in rows)
    idx, branch, positions = (
        torch.zeros(B, T).long(),
        torch.full((B, T), -1),
        torch.zeros(B, T).long(),
    )
    at, targets, owners = [], [], []
    for b, (context, texts) in enumerate(rows):
        n = end = len(context)
        idx[b, :n], branch[b, :n], positions[b, :n] = torch.tensor(context), 0, torch.arange(n)
        for k, (ending, ids) in enumerate(texts, 1):
            here = slice(end, end + len(ids) - 1)
            idx[b, here], branch[b, here] = torch.tensor(ids[:-1]), k
            positions[b, here] = torch.arange(n, n + len(ids) - 1)
            at += [b * T + n - 1, *range(b * T + here.start, b * T + here.stop)]
            targets, owners, end = targets + ids, owners + [ending] * len(ids), here.stop
    at, targets = torch.tensor(at, device=device), torch.tensor(targets, device=device)
    branches = Branches(branch.to(device), positions.to(device))
    return idx.to(device), branches, at, targets, torch.tensor(owners)
