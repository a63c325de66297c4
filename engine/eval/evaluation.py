"""Score a text with a model, token by token, in chunks that fit into memory."""

import contextlib
import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from engine.base.distributed import Processes, seed_micro_batch
from engine.base.errors import UserError
from engine.data.windows import Windows
from engine.eval.metrics import Scores
from engine.eval.texts import TextStats
from heads.head import Prediction, token_scores

NOISE_GROUP = 64  # this many neighbouring tokens share their draws of the output weights' noise
# log-probabilities that exist at a time; a CPU's cache is small
CHUNK_SIZE = {"cpu": 1 << 22, "cuda": 1 << 26, "mps": 1 << 26}


class Chunk(NamedTuple):
    """Some positions of a text, and a model's predictions of their tokens."""

    model: torch.nn.Module
    hiddens: list[torch.Tensor]  # (n, C) each: see GPT.hiddens
    prediction: Prediction  # (n, ...)
    targets: torch.Tensor  # (n,)
    of_better: torch.Tensor | None  # (n, V), the log-probabilities of a better model


def score_tokens(chunk: Chunk) -> dict[str, torch.Tensor]:
    """name -> (n,)."""
    model, prediction = chunk.model, chunk.prediction
    head, log_p = model.lm_head, prediction.log_probs
    nll, confidence, correct = token_scores(log_p, chunk.targets)
    values = {
        "nll": nll,
        "accuracy": correct.float(),
        "brier": brier(log_p, nll),
        "entropy": prediction.total,
        "confidence": confidence,
    }
    if model.bayes_layers() or len(chunk.hiddens) > 1:
        values["aleatoric"] = prediction.aleatoric
        values["mutual_information"] = prediction.epistemic
    if hasattr(head.likelihood, "desmoothed"):
        plain = head.likelihood.desmoothed(log_p)
        values["nll_desmoothed"] = token_scores(plain, chunk.targets).nll
    if hasattr(head.likelihood, "log_sum_sigma"):
        logits = head.logits(chunk.hiddens[0])
        values["log_sum_sigma"] = head.likelihood.log_sum_sigma(logits)
    if chunk.of_better is not None:
        of_better = chunk.of_better
        values["reducible"] = (of_better.exp() * (of_better - log_p)).sum(-1)
    return values


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    batches: Iterable[Windows],
    processes: Processes,
    cast: contextlib.AbstractContextManager | None = None,
    n_samples: int = 0,
    text: TextStats | None = None,
    score: Callable = score_tokens,
    better: torch.nn.Module | None = None,
) -> Scores:
    """Score all windows. The processes share the work; each returns the same result.

    With `text`, also unigram_nll, and the bootstrap resamples the units of the text (documents);
    otherwise it resamples windows. score: a function in place of score_tokens, which lists the
    other scores. better: a model that it compares with this one."""
    model.eval()
    units, blocks, scored = [], [], []
    n_blocks = 0
    for i, batch in enumerate(batches):
        targets = batch.y[:, batch.first :]
        numbers = torch.arange(n_blocks, n_blocks + len(targets))
        n_blocks += len(targets)
        blocks.append(numbers.repeat_interleave(targets.size(1)))
        of_batch = text.read(batch.at, targets) if text else batch.at[:, :1].expand_as(targets)
        units.append(of_batch.flatten())
        if i % processes.world_size != processes.rank:
            scored.append({})
            continue
        with cast or contextlib.nullcontext():
            values = _score_windows(model, batch, processes.device, n_samples, score, better)
        if not values["nll"].isfinite().all():
            raise UserError(
                "the model's log-probabilities are not finite; train it again, "
                "or use --dtype=float32"
            )
        if text:
            values["unigram_nll"] = -text.log_frequencies[targets.flatten()]
        scored.append(values)
    columns = {}
    for name in processes.broadcast(list(scored[0])):
        parts = []
        for values, of_batch in zip(scored, units, strict=True):
            parts.append(values[name].cpu().double() if values else torch.zeros(len(of_batch)))
        columns[name] = torch.cat(parts)
        if processes.world_size > 1:  # another process has the scores in place of zeros
            total = processes.all_reduce(columns[name].to(processes.device))
            columns[name] = torch.tensor(total, dtype=torch.float64)
    return Scores(columns, torch.cat(units), torch.cat(blocks))


def check_n_samples(model: torch.nn.Module, n_samples: int, source: str) -> None:
    if model.config.bayes_mlp and n_samples < 0:
        raise UserError(
            f"{source} has Bayesian MLPs, which need draws; add --n_samples=16, for example"
        )


def _score_windows(model, batch, device, n_samples, score=score_tokens, better=None):
    """name -> (n,), the scores of the targets that count: see evaluate().

    A group's position in the split seeds its draws, so they do not depend on the batch."""
    seed_micro_batch(0, 0)  # Bayesian hidden layers draw the same weights for all windows
    x = batch.x.to(device)
    hiddens = model.hiddens(x, n_samples)
    n_hiddens = len(hiddens)
    if better:
        hiddens = hiddens + better.hiddens(x)
    sizes = 1 + CHUNK_SIZE[device.type] // model.config.vocab_size
    seeds = itertools.repeat(0)
    if n_samples > 0:
        groups = (batch.at // NOISE_GROUP).flatten()
        groups, n_rows = groups.unique_consecutive(return_counts=True)
        sizes = n_rows.tolist()
        seeds = groups.tolist()
    columns = []
    for column in (*hiddens, batch.y):
        rows = column[:, batch.first :].flatten(0, 1)
        columns.append(rows.to(device).split(sizes))
    found = []
    for seed, *states, targets in zip(seeds, *columns, strict=False):
        if n_samples > 0:
            seed_micro_batch(1, seed)
        own = states[:n_hiddens]
        prediction = model.lm_head.predict(own, n_samples)
        of_better = None
        if better:
            of_better = better.lm_head.predict(states[n_hiddens:]).log_probs
        chunk = Chunk(model, own, prediction, targets, of_better)
        found.append(score(chunk))
    return {name: torch.cat([scores[name] for scores in found]) for name in found[0]}


def row_chunks(n: int, device: torch.device, vocab_size: int) -> list[slice]:
    """n rows of log-probabilities in slices of a size that suits the device."""
    size = 1 + CHUNK_SIZE[device.type] // vocab_size
    return [slice(i, i + size) for i in range(0, n, size)]


def brier(log_probs: torch.Tensor, nll: torch.Tensor) -> torch.Tensor:
    """(n,): the squared distance of the prediction from the true token."""
    # a norm of 50,304 fp32 numbers is too small by 1e-5 on a CPU
    sum_of_squares = log_probs.exp().square_().sum(-1)
    return sum_of_squares - 2 * (-nll).exp() + 1
