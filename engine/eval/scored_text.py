"""A text with a model's prediction of each token: nll, uncertainty, likeliest alternatives."""

import html
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from engine.base.distributed import seed_micro_batch
from engine.data.tokenizer import Tokenizer, incremental_decoder, token_bytes_of
from engine.data.windows import window_starts
from engine.eval.evaluation import row_chunks
from engine.runs.percentiles import Percentiles
from heads import Prediction, token_scores

N_TOP = 5  # likeliest next tokens that are kept
AVERAGED = ("nll", "total", "epistemic")  # over a text
NUMBERS = ("nll", "total", "aleatoric", "epistemic")
COLOURED = (75, 95, 99)  # percentiles beyond which a token is coloured
COLOURS = ("", "#ffeb99", "#ffb03b", "#ff6f61")


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
    """Tokens in order, coloured in a notebook by how unusual they are for the run."""

    percentiles = Percentiles()  # what is usual for the run
    colouring = "nll"  # total for a text that the model wrote itself: its tokens are no surprise
    max_epistemic = math.inf  # tokens beyond it are underlined

    @property
    def text(self) -> str:
        return "".join(token.text for token in self)

    def means(self) -> dict[str, float]:
        """nll, total and epistemic, nats per token that was predicted."""
        scored = [token for token in self if token.nll is not None]
        n = max(1, len(scored))
        return {name: sum(getattr(token, name) for token in scored) / n for name in AVERAGED}

    def percentile(self, token: Token, name: str) -> float | None:
        """The percentile of one of a token's scores; None if it or the run has none."""
        value = getattr(token, name)
        if value is None or name not in self.percentiles:
            return None
        return self.percentiles.of(name, value)

    def shade(self, token: Token) -> int:
        """From 0, usual, to 3, beyond the 99th percentile."""
        percentile = self.percentile(token, self.colouring) or 0.0
        return sum(percentile > limit for limit in COLOURED)

    def summary(self) -> str:
        """Means in nats, and how many tokens are beyond the run's 99th percentile."""
        scored = [token for token in self if token.nll is not None]
        parts = []
        for name, mean in self.means().items():
            if scored and name in self.percentiles:
                limit = self.percentiles.value(name, 99)
                share = sum(getattr(token, name) > limit for token in scored) / len(scored)
                parts.append(f"{name} {mean:.3g} nats ({share:.1%} beyond the 99th percentile)")
        return f"Means: {', '.join(parts)}." if parts else ""

    def __repr__(self) -> str:
        return f"ScoredText({self.text!r}, {len(self)} tokens)"

    def _repr_html_(self):
        return coloured_html(self)


def coloured_html(text: ScoredText) -> str:
    """A <span> per token, coloured by its percentile; its tooltip has all scores."""
    spans = []
    for token in text:
        colour = COLOURS[text.shade(token)]
        style = f' style="background:{colour}"' if colour else ""
        about = html.escape(describe(token, text))
        shown = html.escape(token.text)
        if (token.epistemic or 0.0) > text.max_epistemic:
            shown = f"<u>{shown}</u>"
        spans.append(f'<span tabindex="0" title="{about}"{style}>{shown}</span>')
    style = "white-space: pre-wrap; color: black; background: white"
    note = html.escape(f"{legend(text)} {text.summary()}")
    return f'<p class="text" style="{style}">{"".join(spans)}</p><small>{note}</small>'


def legend(text: ScoredText) -> str:
    """What the colours mean."""
    if text.colouring not in text.percentiles:
        return "No colours: evaluate.py --split=val writes the run's percentiles."
    values = [f"{text.percentiles.value(text.colouring, level):.2f}" for level in COLOURED]
    return (
        f"Yellow, orange, red: {text.colouring} beyond the 75th, 95th, 99th percentile of the "
        f"run's validation text ({', '.join(values)} nats)."
    )


def describe(token: Token, text: ScoredText) -> str:
    """A token's scores and the likeliest alternatives, one per line."""
    if token.nll is None:
        return "given"
    lines = []
    for name in NUMBERS:
        percentile = text.percentile(token, name)
        beside = "" if percentile is None else f", percentile {percentile:.3g}"
        lines.append(f"{name} {getattr(token, name):.3g} nats{beside}")
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
        for rows in row_chunks(len(targets), device, model.config.vocab_size):
            prediction = model.lm_head.predict([hidden[rows] for hidden in hiddens], n_samples)
            scores += prediction_scores(prediction, targets[rows], tokenizer)
    decode = incremental_decoder(tokenizer)
    tokens = zip(idx.tolist(), scores, strict=True)
    return ScoredText(Token(decode(i), i, *score) for i, score in tokens)
