"""Score a text with a model, token by token, in pieces that fit into memory."""

import contextlib
from collections.abc import Iterable

import torch
from torch.nn import functional as F

from engine.base.distributed import Processes, seed_micro_batch
from engine.base.errors import UserError
from engine.data.windows import Windows
from engine.eval.metrics import MetricAccumulator
from engine.eval.texts import TextStats

NOISE_GROUP = 64  # neighbouring tokens that share their draws of the output weights' noise
# positions whose (n, V) log-probabilities exist at a time; a CPU's cache is small
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
    """The scores of all windows, which the processes share; the same on each.

    With a text also unigram_nll and scores by byte, and its documents as units of the bootstrap;
    otherwise the units are windows. See score_tokens for the names of the scores."""
    model.eval()
    scores = MetricAccumulator()
    for i, batch in enumerate(batches):
        targets = batch.y[:, batch.first :]
        units = text.read(batch.at, targets) if text else batch.at[:, :1].expand_as(batch.at)
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
            values |= text.scores(targets.flatten())
        scores.add(values, units)
    scores.join(processes)
    return scores


def check_n_samples(model: torch.nn.Module, n_samples: int, source: str) -> None:
    if model.config.bayes_mlp and n_samples < 0:
        raise UserError(f"{source} has Bayesian MLPs, which need draws: give --n_samples=16, say")


def score_windows(
    model: torch.nn.Module, batch: Windows, device: torch.device, n_samples: int
) -> dict[str, torch.Tensor]:
    """name -> (n,), the scores of the tokens that count."""
    seed_micro_batch(0, 0)  # Bayesian hidden layers draw the same weights for all windows
    hiddens = model.hiddens(batch.x.to(device), n_samples)
    hiddens = [hidden[:, batch.first :].flatten(0, 1) for hidden in hiddens]
    targets, *labels = (
        ids[:, batch.first :].flatten(0, 1).to(device) for ids in (batch.y, *batch.labels)
    )
    found = []
    for rows, seed in chunks_and_seeds(batch.at, device, n_samples):
        if n_samples > 0:
            seed_micro_batch(1, seed)
        of_labels = [ids[rows] for ids in labels]
        of_hiddens = [hidden[rows] for hidden in hiddens]
        found.append(score_tokens(model, of_hiddens, targets[rows], of_labels, n_samples))
    return {name: torch.cat([scores[name] for scores in found]) for name in found[0]}


def chunks_and_seeds(
    at: torch.Tensor, device: torch.device, n_samples: int
) -> Iterable[tuple[slice, int]]:
    """Rows to predict at a time, and the seed of their noise.

    Draws are seeded by a group's place in the split, so that they do not depend on the batch."""
    if n_samples < 1:
        return [(rows, 0) for rows in row_chunks(at.numel(), device)]
    window = torch.arange(len(at))[:, None].expand_as(at)
    groups = torch.stack([window, at // NOISE_GROUP], -1).flatten(0, 1)
    groups, sizes = groups.unique_consecutive(dim=0, return_counts=True)
    ends = sizes.cumsum(0)
    starts = ends - sizes
    rows = map(slice, starts.tolist(), ends.tolist())
    return zip(rows, groups[:, 1].tolist(), strict=True)


def row_chunks(n: int, device: torch.device, size: int = 0) -> list[slice]:
    """n rows in slices of this size, or the size that suits the device."""
    size = size or CHUNK_ROWS[device.type]
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
    nll = F.nll_loss(log_p, targets, reduction="none")
    best = log_p.topk(min(5, log_p.size(-1)))
    hits = best.indices == targets.unsqueeze(-1)
    # a norm of 50,304 fp32 numbers is too small by 1e-5 on a CPU
    sum_of_squares = log_p.exp().square_().sum(-1)
    values = {
        "nll": nll,
        "accuracy": hits[:, 0].float(),
        "accuracy_top5": hits.any(-1).float(),
        "brier": sum_of_squares - 2 * (-nll).exp() + 1,
        "entropy": prediction.total,
        "confidence": best.values[:, 0].exp(),
    }
    if model.bayes_layers() or len(hiddens) > 1:
        values["aleatoric"] = prediction.aleatoric
        values["mutual_information"] = prediction.epistemic
    if hasattr(head.likelihood, "desmoothed"):
        plain = head.likelihood.desmoothed(log_p)
        values["nll_desmoothed"] = F.nll_loss(plain, targets, reduction="none")
    if hasattr(head.likelihood, "log_sum_sigma"):
        values["log_sum_sigma"] = head.likelihood.log_sum_sigma(head.logits(hiddens[0]))
    if labels:
        values |= set_scores(log_p, *labels)
    return values


def set_scores(
    scores: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> dict[str, torch.Tensor]:
    """How well scores (n, V) rank a set of ids (n, K), those with weights (n, K) above 0.

    recall_at_k: the share of the set among the K best. lrap: label-ranking average precision, the
    mean over members of the share of members among all that rank as high."""
    of_ids, is_member = scores.gather(-1, ids), weights > 0
    ranks = [(scores >= score.unsqueeze(-1)).sum(-1) for score in of_ids.unbind(-1)]
    rank = torch.stack(ranks, -1)
    as_high = of_ids.unsqueeze(-2) >= of_ids.unsqueeze(-1)
    rank_among_members = (as_high & is_member.unsqueeze(-2)).sum(-1)
    size = is_member.sum(-1)
    recall = (is_member & (rank <= ids.size(-1))).sum(-1) / size
    return {"recall_at_k": recall, "lrap": (is_member * rank_among_members / rank).sum(-1) / size}
