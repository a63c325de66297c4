"""What a model makes of a text, token by token: how surprised it is, what it expected, and what it does not know."""

import html
import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from engine.base.distributed import seed_micro_batch
from engine.data.tokenizer import Tokenizer, piece_decoder, pieces_of
from engine.data.windows import window_starts
from engine.eval.evaluation import in_pieces
from heads import Prediction

N_TOP = 5  # likeliest next tokens that are kept
AVERAGED = ("nll", "total", "epistemic")  # over a text


class Token(NamedTuple):
    """A token and, in nats, what the model predicted at its place; None where nothing did: it was given."""

    text: str  # a character that is split over tokens stands whole at the last of them
    id: int
    nll: float | None = None  # of this token
    total: float | None = None  # entropy of the prediction
    aleatoric: float | None = None  # what of it stays when the weights are known
    epistemic: float | None = None  # what the weights do not know; 0 for point weights
    top: tuple[tuple[str, float], ...] = ()  # the likeliest tokens and their probabilities


class Reading(list[Token]):
    """Tokens in their order; a notebook shows them coloured by epistemic uncertainty, or by nll where there is none."""

    @property
    def text(self) -> str:
        return "".join(token.text for token in self)

    def means(self) -> dict[str, float]:
        """nll, total and epistemic, nats per token."""
        return {
            name: sum(getattr(token, name) for token in self) / max(1, len(self))
            for name in AVERAGED
        }

    def __repr__(self) -> str:
        return f"Reading({self.text!r}, {len(self)} tokens)"

    def _repr_html_(self, colouring: str = "") -> str:
        colouring = colouring or ("epistemic" if any(token.epistemic for token in self) else "nll")
        values = [getattr(token, colouring) or 0.0 for token in self]
        most = float(np.quantile(values, 0.99)) if values else 0.0
        tokens = "".join(
            self._span(*pair, most, colouring) for pair in zip(self, values, strict=True)
        )
        note = f"<small>{colouring}, nats: white 0, orange {most:.3g} and more</small>"
        return (
            f'<p style="white-space: pre-wrap; color: black; background: white">{tokens}</p>{note}'
        )

    @staticmethod
    def _span(token: Token, value: float, most: float, colouring: str) -> str:
        shade = min(1.0, value / most) if most else 0.0
        about = (
            "given" if token.nll is None else f"{colouring} {value:.3g}, nll {token.nll:.3g} nats"
        )
        title = html.escape("\n".join([about, *(f"{name!r} {p:.1%}" for name, p in token.top)]))
        style = f"background: rgba(254, 153, 41, {shade:.2f})"
        return f'<span title="{title}" style="{style}">{html.escape(token.text)}</span>'


@lru_cache(maxsize=4)  # GPT-2's take a tenth of a second
def names_of(tokenizer: Tokenizer) -> list[str]:
    """How each id is shown."""
    pieces = enumerate(pieces_of(tokenizer))
    return [
        "<|endoftext|>" if i == tokenizer.eot else piece.decode(errors="replace")
        for i, piece in pieces
    ]


def reader(tokenizer: Tokenizer) -> Callable[..., list[Token]]:
    """A function that takes a text's ids in their order, some at a time, with their figures() or without, and returns
    their Tokens."""
    decode = piece_decoder(tokenizer)

    def tokens(ids: Iterable[int], found: Iterable[tuple] = ()) -> list[Token]:
        rows = found or [()] * len(ids)
        return [
            Token(decode(token), token, *row)
            for token, row in zip(map(int, ids), rows, strict=True)
        ]

    return tokens


def figures(prediction: Prediction, ids: torch.Tensor, tokenizer: Tokenizer) -> list[tuple]:
    """Predictions (n, ...) and the ids (n,) that came -> for each what stands in its Token behind text and id."""
    names, log_probs = names_of(tokenizer), prediction.log_probs
    nll = -log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    best = log_probs[:, : len(names)].topk(min(N_TOP, len(names)))
    columns = (nll, prediction.total, prediction.aleatoric, prediction.epistemic, *best)
    return [
        (*values, tuple((names[i], math.exp(log_p)) for log_p, i in zip(top, which, strict=True)))
        for *values, top, which in zip(*(column.tolist() for column in columns), strict=True)
    ]


@torch.no_grad()
def read(
    model: torch.nn.Module, tokenizer: Tokenizer, ids: np.ndarray, n_samples: int = 0
) -> Reading:
    """ids (n,) -> their Tokens; the first is given. The same draws each time, where n_samples asks for some."""
    model.eval()
    seed_micro_batch(0, 0)
    tokens = reader(tokenizer)
    reading, block_size = Reading(tokens(ids[:1])), model.config.block_size
    idx = torch.from_numpy(np.asarray(ids).astype(np.int64)).to(next(model.parameters()).device)
    stride = -(
        -block_size // 2
    )  # but for the first window, tokens have at least half a window before them
    for (start,), length in window_starts(len(ids) - 1, block_size, 1, 0, stride):
        first, end = block_size - stride if start else 0, start + length
        hiddens = [hidden[:, first:] for hidden in model.hiddens(idx[None, start:end], n_samples)]
        for hidden, targets in in_pieces(hiddens, idx[None, start + first + 1 : end + 1]):
            reading += tokens(
                targets.tolist(),
                figures(model.lm_head.predict(hidden, n_samples), targets, tokenizer),
            )
    return reading
