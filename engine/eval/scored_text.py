"""A text with a model's prediction of each token: nll, uncertainty, likeliest alternatives."""

import html
import math
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from engine.base.distributed import seed_micro_batch
from engine.data.tokenizer import Tokenizer, incremental_decoder, token_bytes_of
from engine.data.windows import window_starts
from engine.eval.evaluation import row_chunks
from heads import Prediction, token_scores

N_TOP = 5  # likeliest next tokens that are kept
AVERAGED = ("nll", "total", "epistemic")  # over a text
NUMBERS = ("nll", "total", "aleatoric", "epistemic")
COLOURINGS = ("epistemic", "nll")


class Token(NamedTuple):
    """A token and the scores of its prediction, in nats; None if nothing predicted it."""

    text: str  # the last token of a split character has the character, the others have ""
    id: int
    nll: float | None = None  # of this token
    total: float | None = None  # entropy of the prediction
    aleatoric: float | None = None  # the part that remains if the weights are known
    epistemic: float | None = None  # the part that comes from the weights; 0 for point weights
    top: tuple[tuple[str, float], ...] = ()  # the likeliest tokens and their probabilities


class ScoredText(list[Token]):
    """Tokens in order. A notebook colours them by epistemic uncertainty, or else by nll."""

    @property
    def text(self) -> str:
        return "".join(token.text for token in self)

    def means(self) -> dict[str, float]:
        """nll, total and epistemic, nats per token."""
        n = max(1, len(self))
        return {name: sum(getattr(token, name) for token in self) / n for name in AVERAGED}

    def __repr__(self) -> str:
        return f"ScoredText({self.text!r}, {len(self)} tokens)"

    def _repr_html_(self):
        return coloured_html(self, colour_scales([self]))


def colour_scales(texts: Iterable[ScoredText]) -> dict[str, float]:
    """The value that gets the full colour, for each colouring.

    It is the 99th percentile, over all texts, of the values that are not 0."""
    tokens = [token for text in texts for token in text if token.nll is not None]
    scales = {}
    for name in COLOURINGS:
        values = np.array([getattr(token, name) for token in tokens])
        values = values[np.isfinite(values) & (values != 0)]
        scales[name] = float(np.quantile(values, 0.99)) if len(values) else 0.0
    return scales


def coloured_html(text: ScoredText, scales: dict[str, float]) -> str:
    """A <span> per token: the higher its value, the more orange; its tooltip has all scores.

    The value is the epistemic uncertainty; for point weights, which have none, the nll.
    """
    colouring = "epistemic" if any(token.epistemic for token in text) else "nll"
    spans = []
    for token in text:
        value = getattr(token, colouring) or 0.0
        share = min(1.0, max(0.0, value / (scales[colouring] or math.inf)))
        colour = f"background:rgb(254 153 41/{share:.2f})"
        about = html.escape(describe(token))
        shown = html.escape(token.text)
        spans.append(f'<span tabindex="0" title="{about}" style="{colour}">{shown}</span>')
    note = f"{colouring}, nats: white 0, orange {scales[colouring]:.3g} and more"
    style = "white-space: pre-wrap; color: black; background: white"
    return f'<p class="text" style="{style}">{"".join(spans)}</p><small>{note}</small>'


def describe(token: Token) -> str:
    """A token's scores and the likeliest alternatives, one per line."""
    if token.nll is None:
        return "given"
    lines = [f"{name} {getattr(token, name):.3g} nats" for name in NUMBERS]
    lines += [f"{name!r} {p:.1%}" for name, p in token.top]
    return "\n".join(lines)


@lru_cache(maxsize=4)  # GPT-2's take a tenth of a second
def names_of(tokenizer: Tokenizer) -> list[str]:
    """The text to show for each id."""
    names = [piece.decode(errors="replace") for piece in token_bytes_of(tokenizer)]
    if tokenizer.eot is not None:
        names[tokenizer.eot] = "<|endoftext|>"
    return names


def prediction_scores(
    prediction: Prediction, ids: torch.Tensor, tokenizer: Tokenizer
) -> list[tuple]:
    """Predictions (n, ...) of the ids (n,) -> for each id its Token's fields from nll on."""
    names = names_of(tokenizer)
    log_probs = prediction.log_probs
    nll = token_scores(log_probs, ids).nll
    best = log_probs[:, : len(names)].topk(min(N_TOP, len(names)))
    top_ids = best.indices.tolist()
    top_probs = best.values.exp().tolist()
    columns = [nll, prediction.total, prediction.aleatoric, prediction.epistemic]
    scores = []
    for n, numbers in enumerate(torch.stack(columns, dim=1).tolist()):
        top_names = [names[i] for i in top_ids[n]]
        scores.append((*numbers, tuple(zip(top_names, top_probs[n], strict=True))))
    return scores


@torch.no_grad()
def score_text(
    model: torch.nn.Module, tokenizer: Tokenizer, ids: np.ndarray, n_samples: int = 0
) -> ScoredText:
    """ids (n,) -> their Tokens; the first has no prediction. Each call uses the same draws.

    After the first window each token has at least half a block of context.
    """
    model.eval()
    seed_micro_batch(0, 0)
    device = next(model.parameters()).device
    idx = torch.as_tensor(np.asarray(ids, dtype=np.int64), device=device)
    block_size = model.config.block_size
    stride = -(-block_size // 2)
    scores = [()] if len(ids) else []
    for (start,), length in window_starts(len(ids) - 1, block_size, 1, 0, stride):
        window = idx[start : start + length]
        first = block_size - stride if start else 0
        hiddens = [hidden[0, first:] for hidden in model.hiddens(window[None], n_samples)]
        targets = idx[start + first + 1 : start + length + 1]
        for rows in row_chunks(len(targets), device):
            prediction = model.lm_head.predict([hidden[rows] for hidden in hiddens], n_samples)
            scores += prediction_scores(prediction, targets[rows], tokenizer)
    decode = incremental_decoder(tokenizer)
    tokens = zip(idx.tolist(), scores, strict=True)
    return ScoredText(Token(decode(i), i, *score) for i, score in tokens)
