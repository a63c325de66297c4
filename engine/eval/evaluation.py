"""Score a text with a model, token by token, in chunks that fit into memory."""

import contextlib
import itertools
from collections.abc import Iterable

import torch

from engine.base.distributed import Processes, seed_micro_batch
from engine.base.errors import UserError
from engine.data.windows import Windows
from engine.eval.metrics import MetricAccumulator
from engine.eval.texts import TextStats
from heads.head import token_scores

NOISE_GROUP = 64  # this many neighbouring tokens share their draws of the output weights' noise
# number of positions whose log-probabilities (n, V) exist at a time; a CPU's cache is small
CHUNK_ROWS = {"cpu": 64, "cuda": 1024, "mps": 1024}


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    batches: Iterable[Windows],
    processes: Processes,
    cast: contextlib.AbstractContextManager | None = None,
    n_samples: int = 0,
    text: TextStats | None = None,
) -> MetricAccumulator:
    """Score all windows. The processes share the work; each returns the same result.

    With `text`, also unigram_nll, and the bootstrap resamples the units of the text (documents);
    otherwise it resamples windows. The other scores: see score_tokens."""
    model.eval()
    scores = MetricAccumulator()
    for i, batch in enumerate(batches):
        targets = batch.y[:, batch.first :]
        units = batch.at[:, :1].expand_as(batch.at)
        if text:
            units = text.read(batch.at, targets)
        scores.count_units(units)
        if i % processes.world_size != processes.rank:
            continue
        with cast or contextlib.nullcontext():
            values = score_windows(model, batch, processes.device, n_samples)
        if not values["nll"].isfinite().all():
            raise UserError(
                "the model's log-probabilities are not finite; train it again, "
                "or use --dtype=float32"
            )
        if text:
            values["unigram_nll"] = -text.log_frequencies[targets.flatten()]
        scores.add(values, units)
    scores.join(processes)
    return scores


def check_n_samples(model: torch.nn.Module, n_samples: int, source: str) -> None:
    if model.config.bayes_mlp and n_samples < 0:
        raise UserError(
            f"{source} has Bayesian MLPs, which need draws; add --n_samples=16, for example"
        )


def score_windows(
    model: torch.nn.Module, batch: Windows, device: torch.device, n_samples: int
) -> dict[str, torch.Tensor]:
    """name -> (n,), the scores of the targets that count.

    A group's position in the split seeds its draws, so they do not depend on the batch."""
    seed_micro_batch(0, 0)  # Bayesian hidden layers draw the same weights for all windows
    hiddens = model.hiddens(batch.x.to(device), n_samples)
    sizes = CHUNK_ROWS[device.type]
    seeds = itertools.repeat(0)
    if n_samples > 0:
        groups = (batch.at // NOISE_GROUP).flatten()
        groups, n_rows = groups.unique_consecutive(return_counts=True)
        sizes = n_rows.tolist()
        seeds = groups.tolist()
    columns = []
    for column in (batch.y, *batch.labels, *hiddens):
        rows = column[:, batch.first :].flatten(0, 1)
        columns.append(rows.to(device).split(sizes))
    n_labels = len(batch.labels)
    found = []
    for seed, targets, *others in zip(seeds, *columns, strict=False):
        if n_samples > 0:
            seed_micro_batch(1, seed)
        labels, states = others[:n_labels], others[n_labels:]
        found.append(score_tokens(model, states, targets, labels, n_samples))
    return {name: torch.cat([scores[name] for scores in found]) for name in found[0]}


def row_chunks(n: int, device: torch.device) -> list[slice]:
    """n rows in slices of a size that suits the device."""
    size = CHUNK_ROWS[device.type]
    return [slice(i, i + size) for i in range(0, n, size)]


def score_tokens(
    model: torch.nn.Module,
    hiddens: list[torch.Tensor],
    targets: torch.Tensor,
    labels: list[torch.Tensor],
    n_samples: int,
) -> dict[str, torch.Tensor]:
    """name -> (n,). hiddens: (n, C) each. labels: () or ids and weights, (n, K) each."""
    head = model.lm_head
    prediction = head.predict(hiddens, n_samples)
    log_p = prediction.log_probs
    nll, confidence, correct = token_scores(log_p, targets)
    # a norm of 50,304 fp32 numbers is too small by 1e-5 on a CPU
    sum_of_squares = log_p.exp().square_().sum(-1)
    values = {
        "nll": nll,
        "accuracy": correct.float(),
        "brier": sum_of_squares - 2 * (-nll).exp() + 1,
        "entropy": prediction.total,
        "confidence": confidence,
    }
    if model.bayes_layers() or len(hiddens) > 1:
        values["aleatoric"] = prediction.aleatoric
        values["mutual_information"] = prediction.epistemic
    if hasattr(head.likelihood, "desmoothed"):
        plain = head.likelihood.desmoothed(log_p)
        values["nll_desmoothed"] = token_scores(plain, targets).nll
    if hasattr(head.likelihood, "log_sum_sigma"):
        logits = head.logits(hiddens[0])
        values["log_sum_sigma"] = head.likelihood.log_sum_sigma(logits)
    if labels:
        values |= set_scores(log_p, *labels)
    return values


def set_scores(
    scores: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> dict[str, torch.Tensor]:
    """How well scores (n, V) rank a set of ids (n, K), those with weights (n, K) above 0.

    recall_at_k: the share of the set that is among the K best ids."""
    is_member = weights > 0
    best = scores.topk(ids.size(-1)).values
    found = is_member & (scores.gather(-1, ids) >= best[:, -1:])
    return {"recall_at_k": found.sum(-1) / is_member.sum(-1)}
