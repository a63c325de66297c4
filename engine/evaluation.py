"""The numbers that all heads share. Everything comes from log_probs, so it means the same for every head."""

import contextlib
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch

from engine.distributed import Processes, seed_micro_batch
from engine.tokens import TokenFile, gather

MAX_SCALE = 1000.0  # of a posterior's width
N_BINS = 15  # of the calibration error, equally wide (Guo et al. 2017)
ROWS = {"cpu": 64}  # positions whose (ROWS, V) log-probabilities exist at a time: a CPU's cache is small


def eval_batches(file: TokenFile, block_size: int, batch_size: int, n_batches: int) -> list[np.ndarray]:
    """Block starts of the fixed batches that every evaluation of a run sees: evenly spaced over the split."""
    n_blocks = max(1, (len(file) - 1) // block_size)
    n = min(n_blocks, n_batches * batch_size)
    starts = np.arange(n) * n_blocks // n * block_size
    return [starts[i : i + batch_size] for i in range(0, n, batch_size)]


def whole_split(
    file: TokenFile, block_size: int, batch_size: int, limit: int = 0, labels=None
) -> Iterable[tuple[torch.Tensor, ...]]:
    """x, y of consecutive blocks that cover the split, every target once; the last, shorter block comes alone.

    limit: only so many blocks, evenly spaced; 0: all. labels: an engine.labels.LabelFile of the split, whose targets
    (B, T, K) and their weights then follow behind y.
    """
    full, rest = divmod(len(file) - 1, block_size)
    n = min(limit or full, full)
    starts = np.arange(n) * full // max(1, n) * block_size
    pieces = [(starts[i : i + batch_size], block_size) for i in range(0, n, batch_size)]
    for piece, length in pieces + ([(np.array([full * block_size]), rest)] if rest and not 0 < limit <= full else []):
        x, y = gather(file, piece, length)
        yield (x, y) if labels is None else (x, y, *labels.targets(y, piece))


@torch.no_grad()
def mean_loss(
    model: torch.nn.Module, batches: list[np.ndarray], file: TokenFile, processes: Processes, cast
) -> dict[str, float]:
    """val_nll (nats of the true next token), val_perplexity and val_ece (of the likeliest token), all under the mean
    weights, and val_loss (what training minimises, but for dropout, soft labels and the noise of Bayesian MLPs), over
    all tokens of eval_batches.

    The work is shared by all processes; the same numbers on each."""
    model.eval()
    totals, n = 0.0, len(batches)
    for i in range(processes.rank, math.ceil(n / processes.world_size) * processes.world_size, processes.world_size):
        x, y = (t.to(processes.device) for t in gather(file, batches[i % n], model.config.block_size))
        seed_micro_batch(0, i)  # the sampling estimators see the same noise in every evaluation
        with cast:
            loss, of_tokens = model.scores(x, y)
        nll, confidence, correct = of_tokens.cpu().double()
        bins = (confidence * N_BINS).long().clamp(0, N_BINS - 1)  # a confidence that is no number falls somewhere
        gaps = torch.bincount(bins, confidence - correct, N_BINS)
        sums = nll.new_tensor([nll.sum().item(), loss.item() * len(nll), len(nll)])
        values = torch.cat([sums, gaps]) * (i < n)  # as many rounds for all, or those with shards would wait for ever
        totals += np.array(processes.agree(values.to(processes.device, _widest(processes.device))))
    model.train()
    nll, loss, n_tokens, *gaps = totals.tolist()
    nll, ece = nll / n_tokens, np.abs(gaps).sum().item() / n_tokens
    perplexity = math.exp(min(nll, 700.0))
    return {"val_nll": nll, "val_perplexity": perplexity, "val_ece": ece, "val_loss": loss / n_tokens}


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    batches: Iterable[tuple[torch.Tensor, ...]],
    device: torch.device,
    cast: contextlib.AbstractContextManager | None = None,
    n_samples: int = 0,
) -> dict[str, float]:
    """nll, perplexity, accuracy, ece, brier, entropy over batches of (x, y), streamed; nats per token.

    Of batches (x, y, ids, weights) with a set of labels for each token also recall_at_k and lrap (see set_scores).
    Where the head has them also aleatoric, mutual_information, nll_desmoothed and its perplexity, log_sum_sigma, kl,
    kl_weight.
    """
    model.eval()
    seed_micro_batch(0, 0)  # n_samples draws the same noise each time
    sums, bins = {}, torch.zeros(3, N_BINS, dtype=torch.float64)
    for x, *of_tokens in batches:
        with cast or contextlib.nullcontext():
            of_tokens = [t.to(device) for t in of_tokens]
            for hiddens, targets, *labels in in_pieces(model.hiddens(x.to(device), n_samples), *of_tokens):
                values, confidence, correct = _per_token(model, hiddens, targets, labels, n_samples)
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + value.cpu().double().sum().item()
                sums["n_tokens"] = sums.get("n_tokens", 0) + len(targets)
                which = (confidence * N_BINS).long().clamp(max=N_BINS - 1).cpu()
                for row, value in enumerate((torch.ones_like(confidence), confidence, correct)):
                    bins[row].index_add_(0, which, value.cpu().double())
    n_tokens = sums.pop("n_tokens")
    result = {name: value / n_tokens for name, value in sums.items()}
    for name in [name for name in result if name.startswith("nll")]:
        result[name.replace("nll", "perplexity")] = math.exp(min(result[name], 700.0))
    result["n_tokens"] = n_tokens
    result["ece"] = ((bins[1] - bins[2]).abs().sum() / n_tokens).item()
    kl = float(model.kl())
    return result | ({"kl": kl, "kl_weight": model.lm_head.config.kl_weight} if kl else {})


def _per_token(model, hiddens: list[torch.Tensor], targets: torch.Tensor, labels: list[torch.Tensor], n_samples: int):
    """What is averaged over tokens, (n,) each; and confidence and correctness of the likeliest token, for the ECE."""
    head, hidden = model.lm_head, hiddens[0]
    prediction = head.predict(hiddens, n_samples)
    probs, index = prediction.log_probs.exp(), targets.unsqueeze(-1)
    of_target = prediction.log_probs.gather(-1, index).squeeze(-1)
    confidence, guess = probs.max(-1)
    correct = (guess == targets).float()
    values = {
        "nll": -of_target,
        "accuracy": correct,
        "brier": probs.square().sum(-1) - 2 * of_target.exp() + 1,
        "entropy": prediction.total,
    }
    if model.bayes_layers():
        values |= {"aleatoric": prediction.aleatoric, "mutual_information": prediction.epistemic}
    if hasattr(head.likelihood, "desmoothed"):
        plain = head.likelihood.desmoothed(prediction.log_probs)
        values["nll_desmoothed"] = -plain.gather(-1, index).squeeze(-1)
    if hasattr(head.likelihood, "log_sum_sigma"):
        values["log_sum_sigma"] = head.likelihood.log_sum_sigma(head.logits(hidden))
    if labels:
        values |= set_scores(prediction.log_probs, *labels)
    return values, confidence, correct


def set_scores(scores: torch.Tensor, ids: torch.Tensor, members: torch.Tensor) -> dict[str, torch.Tensor]:
    """How well scores (n, V) rank the members of a set above the rest; ids (n, K), members (n, K) above 0.

    recall_at_k: the share of the set among the K best. lrap: label-ranking average precision, the mean over members of
    the share of members among all that rank as high (scikit-learn's definition).
    """
    of_ids, is_member = scores.gather(-1, ids), members > 0
    rank = torch.stack([(scores >= score.unsqueeze(-1)).sum(-1) for score in of_ids.unbind(-1)], -1)
    among_members = ((of_ids.unsqueeze(-2) >= of_ids.unsqueeze(-1)) & is_member.unsqueeze(-2)).sum(-1)
    size = is_member.sum(-1)
    recall = (is_member & (rank <= ids.size(-1))).sum(-1) / size
    return {"recall_at_k": recall, "lrap": (is_member * among_members / rank).sum(-1) / size}


def unigram_nll(counts: torch.Tensor, frequencies: torch.Tensor) -> float:
    """nats per token of tokens that occur counts (V,) times, under the training text's frequencies (V,): what a model
    without context reaches."""
    return -(counts @ frequencies.log()).item() / counts.sum().item()


def abstaining(correct: torch.Tensor, doubt: torch.Tensor) -> dict[str, float]:
    """Is it wrong where it is in doubt? Of answers, correct (n,) and doubt (n,): the accuracy of the half with less
    doubt and of the rest, and the area under the error rate of those given against their share, least doubt first
    (abstaining at random: the error rate of all)."""
    correct = correct[doubt.argsort(stable=True)].double()
    half = (len(correct) + 1) // 2
    error_rate = 1 - correct.cumsum(0) / torch.arange(1, len(correct) + 1)
    rest = correct[half:] if len(correct) > 1 else correct
    means = {"accuracy_certain_half": correct[:half], "accuracy_rest": rest, "risk_coverage_area": error_rate}
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


def in_pieces(hiddens: list[torch.Tensor], *of_tokens: torch.Tensor, n: int = 0):
    """(B, T, C) or (N, C) each, (B, T, ...) or (N, ...) each -> pieces (<= n, C) and (<= n, ...): all logits together
    never exist. n: 0 is what suits the device."""
    n, last = n or ROWS.get(hiddens[0].device.type, 1024), hiddens[0].dim() - 2
    pieces = zip(*(hidden.flatten(0, last).split(n) for hidden in hiddens), strict=True)
    return zip(pieces, *(t.flatten(0, last).split(n) for t in of_tokens), strict=True)


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
