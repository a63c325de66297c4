"""A trained model from Python: in a notebook, or in another program.

from engine.eval.run import Run
run = Run("out/quickstart/bayes")                 # a run, a checkpoint file, a transformers folder, or "gpt2"
run.generate_text("The old prince", max_new_tokens=50)
run.uncertainty("The old prince looked at Napoleon.")
run.predict("The old prince", n_samples=16).epistemic
"""

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from engine.base.distributed import autocast, pick_device, seed_micro_batch
from engine.base.errors import MANY, UserError, check_ranges
from engine.base.options import flat_fields
from engine.eval.generation import stream
from engine.eval.reading import Reading, Token, figures, read, reader
from engine.runs.checkpoint import load_model, tokenizer_of
from heads import Prediction


@dataclass(frozen=True)
class Sampling:
    """How a text goes on, and where it ends."""

    max_new_tokens: int = 500  # length of each continuation, at most
    temperature: float = 0.8  # below 1: safer, above 1: wilder, 0: always the likeliest token
    top_k: int = 200  # draw from the k likeliest tokens; 0: from all
    top_p: float = 1.0  # draw from the likeliest tokens that together have this probability
    # Bayesian heads: posterior draws averaged per token; 0: the mean weights; -1: all, not sampled
    n_samples: int = 0
    # end before this string, or before one of several with | between; \n: a line's end
    stop: str = ""
    # no | mark: such tokens | stop: before the first whose epistemic uncertainty is above the next
    abstain: str = "no"
    # nats; --show_uncertainty and uncertainty() show what is usual for a run
    max_epistemic: float = 0.0
    seed: int = 1337  # the same seed, the same text

    def __post_init__(self):
        for name, kind in flat_fields(Sampling).items():
            value = getattr(self, name)  # of NumPy or torch, too
            try:
                found = (
                    operator.index(value)
                    if kind is int
                    else float(value)
                    if kind is float
                    else "" + value
                )
            except (TypeError, ValueError):
                raise UserError(f"{name} = {value!r} must be of type {kind.__name__}") from None
            object.__setattr__(self, name, found)
        check_ranges(
            self,
            {"max_new_tokens": (1, 10**6), "n_samples": (-1, 10**6), "max_epistemic": (0.0, 1e6)},
        )
        check_ranges(
            self, {"temperature": (0.0, 1e6), "top_k": (0, MANY), "seed": (0, (1 << 63) - 1)}
        )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p} must lie in (0, 1]")
        if self.abstain not in ("no", "mark", "stop"):
            raise UserError(f"abstain = {self.abstain!r} is not one of: no, mark, stop")
        if self.abstain != "no" and not self.max_epistemic:
            raise UserError(f"abstain = {self.abstain!r} needs a limit: --max_epistemic=0.05, say")

    @property
    def stops(self) -> list[str]:
        parts = re.split(r"(<\|endoftext\|>)|\|", self.stop)  # whose own bars part nothing
        return [text.replace("\\n", "\n").replace("\\t", "\t") for text in parts if text]

    def too_uncertain(self, token: Token) -> bool:
        """Whether abstaining takes the token for more than the weights know."""
        return self.abstain != "no" and (token.epistemic or 0.0) > self.max_epistemic


@dataclass
class Continuation:
    """A text as it grows. Tokens in which a stop string may have begun are held back until that is known."""

    sampling: Sampling
    tokens: Reading = field(default_factory=Reading)
    held: list[Token] = field(default_factory=list)
    ended: str = ""  # why: length | stop | abstain

    @property
    def text(self) -> str:
        return self.tokens.text

    def add(self, token: Token) -> None:
        """Take the next token, unless the text has ended."""
        if self.ended:
            return
        if self.sampling.abstain == "stop" and self.sampling.too_uncertain(token):
            self._let_go(MANY, "abstain")
            return
        self.held.append(token)
        text = "".join(token.text for token in self.held)
        if found := [text.find(stop) for stop in self.sampling.stops if stop in text]:
            self._let_go(min(found), "stop")
        elif len(self.tokens) + len(self.held) == self.sampling.max_new_tokens:
            self._let_go(MANY, "length")
        else:
            begun = [
                n
                for stop in self.sampling.stops
                for n in range(1, len(stop))
                if text.endswith(stop[:n])
            ]
            self._let_go(len(text) - max(begun, default=0))

    def _let_go(self, n_chars: int, ended: str = "") -> None:
        """Tokens within the first n_chars held are final; at the end of the text also the part of one."""
        while self.held and (n_chars >= len(self.held[0].text) or (ended and n_chars > 0)):
            token = self.held.pop(0)
            self.tokens.append(token._replace(text=token.text[:n_chars]))
            n_chars -= len(token.text)
        self.ended = ended


class Run:
    """A model and its tokenizer, ready to write and to be asked. A user's mistake raises engine.base.errors.UserError.
    Writing and asking set torch's seed, so that the same call gives the same answer.

    source: a run folder, a checkpoint file (ours or nanoGPT's), a transformers folder, or gpt2 ... gpt2-xl; device and
    dtype: as sample.py's options.
    """

    def __init__(self, source: str | Path, device: str = "auto", dtype: str = "auto"):
        self.source, self.device = str(source), pick_device(device)
        self.cast, _ = autocast(self.device, dtype)
        self.model = load_model(source, self.device)
        self.tokenizer = tokenizer_of(source, self.model.config.vocab_size)

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt, at least one: "" and "<|endoftext|>" begin a new document."""
        if text not in ("", "<|endoftext|>"):
            return self._ids(text).tolist()
        if self.tokenizer.eot is None:
            raise UserError(
                "this tokenizer has no end-of-text token to start from; give some text to start with"
            )
        return [self.tokenizer.eot]

    def _ids(self, text: str) -> np.ndarray:
        if not isinstance(text, str):
            raise UserError(f"a text is wanted, not {text!r}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(
                "the text is not Unicode; is it in another encoding than UTF-8?"
            ) from None
        return self.tokenizer.encode(text)

    def check(self, sampling: Sampling) -> None:
        """Refuse what this model cannot do."""
        if sampling.abstain != "no" and not self.model.bayes_layers():
            raise UserError(
                f"{self.source} has point weights, which have no epistemic uncertainty to abstain by"
            )

    def generate_text(self, prompt: str = "", **options: float | str) -> str:
        """The prompt's continuation. Options: the fields of Sampling, such as max_new_tokens, temperature, seed."""
        sampling = Sampling(**options)
        *_, (text,) = self.stream(
            self.encode(prompt), 1, sampling, uncertain=sampling.abstain != "no"
        )
        return text.text

    def stream(
        self,
        prompt: str | list[int],
        num_samples: int = 1,
        sampling: Sampling = Sampling(),
        uncertain: bool = True,
    ) -> Iterator[list[Continuation]]:
        """Continuations of a prompt (text, or its ids) while they are written, in one batch: yields the same list after
        each token. uncertain: their tokens have figures, each of the prediction that it was drawn from."""
        self.check(sampling)
        prompt = self.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        if not prompt or num_samples < 1:
            raise UserError(
                f"{num_samples} texts behind {len(prompt)} tokens: at least one of both is needed"
            )
        if not 0 <= min(prompt) <= max(prompt) < self.model.config.vocab_size:
            raise UserError(f"the prompt has ids outside 0 .. {self.model.config.vocab_size - 1}")
        texts = [Continuation(sampling) for _ in range(num_samples)]
        readers = [reader(self.tokenizer) for _ in texts]
        for tokens in readers:
            tokens(prompt)  # a character may be split over the prompt's end
        options = {
            name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "n_samples")
        }
        options |= {"n_ids": self.tokenizer.vocab_size, "uncertain": uncertain}
        torch.manual_seed(sampling.seed)
        idx = torch.tensor([prompt] * num_samples, device=self.device)
        with self.cast:
            for ids, prediction in stream(self.model, idx, sampling.max_new_tokens, **options):
                rows = [()] * num_samples
                if uncertain:
                    last = Prediction(*(part.squeeze(1) for part in prediction))
                    rows = [[row] for row in figures(last, ids.squeeze(1), self.tokenizer)]
                for text, tokens, new, row in zip(texts, readers, ids.tolist(), rows, strict=True):
                    for token in tokens(new, row):
                        text.add(token)
                with torch.autocast(
                    self.device.type, enabled=False
                ):  # the caller's code between two tokens is its own
                    yield texts
                if all(text.ended for text in texts):
                    return

    @torch.no_grad()
    def predict(self, prompt: str = "", n_samples: int = 0) -> Prediction:
        """What comes next: log_probs (V,), and in nats total, aleatoric and epistemic (scalars). Of a long prompt the
        last block_size tokens are read. n_samples: as in Sampling; the same draws each time."""
        n_samples = Sampling(n_samples=n_samples).n_samples
        seed_micro_batch(0, 0)
        idx = torch.tensor(
            [self.encode(prompt)[-self.model.config.block_size :]], device=self.device
        )
        with self.cast:
            last = [hidden[0, -1:] for hidden in self.model.hiddens(idx, n_samples)]
            return Prediction(*(part[0] for part in self.model.lm_head.predict(last, n_samples)))

    def uncertainty(self, text: str, n_samples: int = 0) -> Reading:
        """The text's tokens with what the model predicted at each, in nats: nll, total, aleatoric, epistemic, and the
        likeliest tokens (see reading.Token). It is read as the beginning of a document; without an end-of-text
        token to stand before it, the first token has no figures. n_samples: as in Sampling."""
        n_samples = Sampling(n_samples=n_samples).n_samples
        ids, eot = self._ids(text), self.tokenizer.eot
        before = [] if eot is None else [eot]
        with self.cast:
            reading = read(
                self.model,
                self.tokenizer,
                np.concatenate([np.array(before, ids.dtype), ids]),
                n_samples,
            )
        return Reading(reading[len(before) :])
