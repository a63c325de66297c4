"""The numbers that all heads share. Everything comes from log_probs, so it means the same for every head."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable

import torch

from engine.base.distributed import Processes, seed_micro_batch
from engine.base.errors import UserError
from engine.data.windows import Windows
from engine.eval.metrics import MetricAccumulator
from engine.eval.texts import TextStats

MAX_SCALE = 1000.0  # of a posterior's width
NOISE = 64  # neighbouring tokens that share their draws of the output weights' noise
ROWS = {
    "cpu": 64
}  # positions whose (ROWS, V) log-probabilities exist at a time: a CPU's cache is small


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    batches: Iterable[Windows],
    processes: Processes,
    cast: contextlib.AbstractContextManager | None = None,
    n_samples: int = 0,
    text: TextStats | None = None,
) -> MetricAccumulator:
    """The scores of the windows, the same on all processes, which share the work; Tally.result() names them.

    Where the head has them also aleatoric, mutual_information, nll_desmoothed, log_sum_sigma; of windows with labels, a
    set for each token, recall_at_k and lrap (see set_scores); with a text unigram_nll and its bytes. The noise of
    n_samples draws depends on a token's place in the split alone."""
    model.eval()
    tally, last = MetricAccumulator(), -1
    for i, batch in enumerate(batches):
        y = batch.y[:, batch.first :]
        units = text.units(batch.at, y) if text else batch.at[:, :1].expand_as(batch.at)
        units = units.flatten()
        tally.n_units, last = (
            tally.n_units + len(units.unique()) - int(units[0] == last),
            int(units[-1]),
        )
        if text:
            text.count(y)
        if i % processes.world_size == processes.rank:
            with cast or contextlib.nullcontext():
                values = _of_tokens(model, batch, processes.device, n_samples)
            if not values["nll"].isfinite().all():
                raise UserError(
                    "this model's log-probabilities are not finite; train it again, or use --dtype=float32"
                )
            if text:
                values["unigram_nll"] = -text.log_frequencies[y.flatten()]
            tally.add(
                values, units, text.bytes[y.flatten()] if text else torch.zeros_like(units), len(y)
            )
    tally.join(processes)
    return tally


def _of_tokens(
    model: torch.nn.Module, batch: Windows, device: torch.device, n_samples: int
) -> dict[str, torch.Tensor]:
    """name -> (n,), of the tokens that count."""
    seed_micro_batch(0, 0)  # of Bayesian hidden layers: the same draws for all windows
    hiddens = [x[:, batch.first :] for x in model.hiddens(batch.x.to(device), n_samples)]
    of_tokens = [t[:, batch.first :].to(device) for t in (batch.y, *batch.labels)]
    found, sizes, seeds = [], None, itertools.repeat(None)
    if (
        n_samples > 0
    ):  # the output weights' noise is that of a token's place, whatever else is in the batch
        groups = torch.arange(len(batch.at))[:, None] * (1 << 40) + batch.at // NOISE
        seeds, sizes = (t.tolist() for t in groups.flatten().unique_consecutive(return_counts=True))
    for seed, (pieces, targets, *labels) in zip(
        seeds, in_pieces(hiddens, *of_tokens, n=sizes), strict=False
    ):
        if seed is not None:
            seed_micro_batch(1, seed % (1 << 40))
        found.append(_per_token(model, pieces, targets, labels, n_samples))
    return {name: torch.cat([values[name] for values in found]) for name in found[0]}


def _per_token(
    model,
    hiddens: list[torch.Tensor],
    targets: torch.Tensor,
    labels: list[torch.Tensor],
    n_samples: int,
):
    """name -> (n,)."""
    head, hidden = model.lm_head, hiddens[0]
    prediction = head.predict(hiddens, n_samples)
    log_p, index = prediction.log_probs, targets.unsqueeze(-1)
    of_target, best = log_p.gather(-1, index).squeeze(-1), log_p.topk(min(5, log_p.size(-1)))
    values = {
        "nll": -of_target,
        "accuracy": (best.indices[:, 0] == targets).float(),
        "accuracy_top5": (best.indices == index).any(-1).float(),
        "brier": torch.linalg.vector_norm(log_p.exp(), dim=-1).square() - 2 * of_target.exp() + 1,
        "entropy": prediction.total,
        "confidence": best.values[:, 0].exp(),
    }
    if model.bayes_layers() or len(hiddens) > 1:
        values |= {"aleatoric": prediction.aleatoric, "mutual_information": prediction.epistemic}
    likelihood = getattr(head, "likelihood", None)  # an ensemble has none of its own
    if hasattr(likelihood, "desmoothed"):
        plain = likelihood.desmoothed(log_p)
        values["nll_desmoothed"] = -plain.gather(-1, index).squeeze(-1)
    if hasattr(likelihood, "log_sum_sigma"):
        values["log_sum_sigma"] = likelihood.log_sum_sigma(head.logits(hidden))
    if labels:
        values |= set_scores(log_p, *labels)
    return values


def set_scores(
    scores: torch.Tensor, ids: torch.Tensor, members: torch.Tensor
) -> dict[str, torch.Tensor]:
    """How well scores (n, V) rank the members of a set above the rest; ids (n, K), members (n, K) above 0.

    recall_at_k: the share of the set among the K best. lrap: label-ranking average precision, the mean over members of
    the share of members among all that rank as high (scikit-learn's definition).
    """
    of_ids, is_member = scores.gather(-1, ids), members > 0
    rank = torch.stack([(scores >= score.unsqueeze(-1)).sum(-1) for score in of_ids.unbind(-1)], -1)
    among_members = ((of_ids.unsqueeze(-2) >= of_ids.unsqueeze(-1)) & is_member.unsqueeze(-2)).sum(
        -1
    )
    size = is_member.sum(-1)
    recall = (is_member & (rank <= ids.size(-1))).sum(-1) / size
    return {"recall_at_k": recall, "lrap": (is_member * among_members / rank).sum(-1) / size}


def abstaining(correct: torch.Tensor, doubt: torch.Tensor) -> dict[str, float]:
    """Is it wrong where it is in doubt? Of answers, correct (n,) and doubt (n,): the accuracy of the half with less
    doubt and of the rest, and the area under the error rate of those given against their share, least doubt first
    (abstaining at random: the error rate of all)."""
    correct = correct[doubt.argsort(stable=True)].double()
    half = (len(correct) + 1) // 2
    error_rate = 1 - correct.cumsum(0) / torch.arange(1, len(correct) + 1)
    rest = correct[half:] if len(correct) > 1 else correct
    means = {
        "accuracy_certain_half": correct[:half],
        "accuracy_rest": rest,
        "risk_coverage_area": error_rate,
    }
    return {name: values.mean().item() for name, values in means.items()}


def widest_posterior(model: torch.nn.Module, nll: Callable[[], float], tolerance: float) -> float:
    """Scale the posterior's standard deviations by the largest factor with which nll() stays within the tolerance
    (nats per token) of what it is now; returns the factor, to 5 %."""
    limit, factor, step = nll() + tolerance, 1.0, 2.0
    while step > 1.04:
        scale_posterior(model, step)
        if nll() <= limit and factor * step < MAX_SCALE:
            factor *= step
        else:
            scale_posterior(model, 1 / step)
            step = math.sqrt(step)
    return factor


@torch.no_grad()
def scale_posterior(model: torch.nn.Module, factor: float) -> None:
    """Multiply all standard deviations, in place."""
    for layer in model.bayes_layers():
        layer.log_std += math.log(factor)


def in_pieces(
    hiddens: list[torch.Tensor], *of_tokens: torch.Tensor, n: int | list[int] | None = None
):
    """(B, T, C) or (N, C) each, (B, T, ...) or (N, ...) each -> pieces (<= n, C) and (<= n, ...): all logits together
    never exist. n: the most in a piece, or the number in each; None is what suits the device."""
    n, last = n or ROWS.get(hiddens[0].device.type, 1024), hiddens[0].dim() - 2
    pieces = zip(*(hidden.flatten(0, last).split(n) for hidden in hiddens), strict=True)
    return zip(pieces, *(t.flatten(0, last).split(n) for t in of_tokens), strict=True)
