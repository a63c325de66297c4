"""A trained model from Python: in a notebook, or in another program.

from engine.eval.run import Run
run = Run("out/quickstart/bayes")  # a run, a checkpoint file, a transformers folder, or "gpt2"
run.generate_text("The old prince", max_new_tokens=50)
run.uncertainty("The old prince looked at Napoleon.")
run.predict("The old prince", n_samples=16).epistemic
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch

from engine.base.distributed import autocast, pick_device, seed_micro_batch
from engine.base.errors import UserError
from engine.base.options import (
    Draws,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Seed,
    check_options,
    flat_fields,
)
from engine.data.tokenizer import incremental_decoder
from engine.eval.generation import stream
from engine.eval.scored_text import ScoredText, Token, prediction_scores, score_text
from engine.runs.checkpoint import folder_of, read_checkpoint
from engine.runs.percentiles import read_percentiles
from heads import Prediction


@dataclass(frozen=True)
class Sampling:
    """How to continue a text, and where to end it."""

    max_new_tokens: PositiveInt = 500  # length of each continuation, at most
    # below 1: more predictable, above 1: more varied, 0: always the likeliest token
    temperature: NonNegativeFloat = 0.8
    top_k: NonNegativeInt = 200  # draw from the k likeliest tokens; 0: from all
    # draw from the likeliest tokens that together have this probability
    top_p: Annotated[float, "> 0", "<= 1"] = 1.0
    # Bayesian heads: posterior draws averaged per token; 0: the mean weights; -1: all, not sampled
    n_samples: Draws = 0
    # end the text before this string; | separates several strings; \n is the end of a line
    stop: str = ""
    # no | mark | stop: mark the tokens of unusually high epistemic uncertainty, or end the text
    # before the first of them; or a percentile such as 99%: end it beyond that one
    abstain: str = "no"
    # what is unusual, in nats; 0: beyond the 99th percentile of the run's own validation text
    max_epistemic: NonNegativeFloat = 0.0
    seed: Seed = 1337  # the same seed, the same text

    def __post_init__(self):
        check_options(self)
        if not isinstance(self.stop, str):
            raise UserError(f"stop = {self.stop!r} is not a string; separate several by |")
        if not re.fullmatch(r"no|mark|stop|\d\d?(\.\d+)?%", str(self.abstain)):
            raise UserError(
                f"abstain = {self.abstain!r} is not no, mark, stop, or a percentile such as 99%"
            )
        if self.abstain.endswith("%") and self.max_epistemic:
            raise UserError("a percentile and nats are two limits; use --abstain=stop with nats")

    @property
    def stops(self) -> list[str]:
        parts = re.split(r"(<\|endoftext\|>)|\|", self.stop)  # keeps <|endoftext|> whole
        return [text.replace("\\n", "\n").replace("\\t", "\t") for text in parts if text]

    def too_uncertain(self, token: Token) -> bool:
        """Whether abstaining marks this token or ends the text before it."""
        return self.abstain != "no" and (token.epistemic or 0.0) > self.max_epistemic


@dataclass
class Continuation:
    """A growing text. It holds back its last tokens while a stop string may begin in them."""

    sampling: Sampling
    tokens: ScoredText = field(default_factory=ScoredText)
    held: list[Token] = field(default_factory=list)
    ended: str = ""  # the reason: length | stop | abstain

    @property
    def text(self) -> str:
        return self.tokens.text

    def add(self, token: Token) -> None:
        """Append the next token, unless the text has ended."""
        if self.ended:
            return
        stops = self.sampling.stops
        if self.sampling.abstain == "stop" and self.sampling.too_uncertain(token):
            self.ended = "abstain"
        else:
            self.held.append(token)
        text = "".join(held.text for held in self.held)
        n_chars = len(text)
        if len(self.tokens) + len(self.held) == self.sampling.max_new_tokens:
            self.ended = "length"
        if found := [text.find(stop) for stop in stops if stop in text]:
            self.ended = "stop"
            n_chars = min(found)
        elif not self.ended:
            n_chars -= max(map(len, stops), default=1) - 1
        self._release(n_chars)

    def _release(self, n_chars):
        """Move the held tokens of the first n_chars to the text; at its end also a part of one."""
        while self.held:
            token = self.held[0]
            is_whole = n_chars >= len(token.text)
            if not is_whole and not (self.ended and n_chars > 0):
                return
            self.held.pop(0)
            self.tokens.append(token._replace(text=token.text[:n_chars]))
            n_chars -= len(token.text)


class Run:
    """A model and its tokenizer. A user's mistake raises engine.base.errors.UserError.

    source: a run folder, a checkpoint file (ours or nanoGPT's), a transformers folder, or
    gpt2 ... gpt2-xl. device and dtype: see sample.py's options. All methods set torch's seed, so
    the same call returns the same result.
    """

    def __init__(self, source: str | Path, device: str = "auto", dtype: str = "auto"):
        self.source = str(source)
        self.device = pick_device(device)
        self.cast, _ = autocast(self.device, dtype)
        checkpoint = read_checkpoint(source)
        self.model = checkpoint.model(self.device)
        self.tokenizer = checkpoint.tokenizer()
        self.percentiles = read_percentiles(folder_of(source))

    def scored(self, tokens: Iterable[Token], colouring: str) -> ScoredText:
        """A text with this run's percentiles, to be coloured by nll or total."""
        text = ScoredText(tokens)
        text.percentiles = self.percentiles
        text.colouring = colouring
        return text

    def __repr__(self) -> str:
        return f"Run({self.source!r}): {self.model.config}"

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt, at least one: "" and "<|endoftext|>" start a new document."""
        if text not in ("", "<|endoftext|>"):
            return self.tokenizer.encode(text).tolist()
        if self.tokenizer.eot is None:
            raise UserError("this tokenizer has no end-of-text token; the prompt must not be empty")
        return [self.tokenizer.eot]

    def with_limit(self, sampling: Sampling) -> Sampling:
        """The same with max_epistemic in nats. Refuses options that need a Bayesian model if this
        one has point weights."""
        needs_bayes = sampling.abstain != "no" or sampling.n_samples
        if needs_bayes and not self.model.bayes_layers():
            reason = "has point weights, so no draws and no epistemic uncertainty"
            raise UserError(f"{self.source} {reason}; leave --abstain and --n_samples out")
        if sampling.abstain == "no" or sampling.max_epistemic:
            return sampling
        if "epistemic" not in self.percentiles:
            raise UserError(
                f"{self.source} has no percentiles; run evaluate.py --out_dir={self.source} "
                "--split=val, or give --max_epistemic=NATS"
            )
        action, level = sampling.abstain, 99.0
        if action.endswith("%"):
            action, level = "stop", float(action[:-1])
        limit = self.percentiles.value("epistemic", level)
        return replace(sampling, abstain=action, max_epistemic=limit)

    def generate_text(self, prompt: str = "", **options: float | str) -> str:
        """The prompt's continuation. Options: the fields of Sampling, such as max_new_tokens."""
        known = flat_fields(Sampling)
        for name in options.keys() - known:
            raise UserError(f"{name} is not an option; known: {', '.join(known)}")
        sampling = Sampling(**options)
        *_, (text,) = self.stream(prompt, 1, sampling, uncertain=sampling.abstain != "no")
        return text.text

    def stream(
        self,
        prompt: str | list[int],
        num_samples: int = 1,
        sampling: Sampling = Sampling(),
        uncertain: bool = True,
    ) -> Iterator[list[Continuation]]:
        """Continue a prompt (text, or its ids) in one batch of num_samples texts.

        Yields the same list after each token. uncertain: the tokens carry the scores of the
        predictions that they were drawn from.
        """
        sampling = self.with_limit(sampling)
        ids = self.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        texts, decoders = [], []
        for _ in range(num_samples):
            tokens = self.scored((), "total")
            texts.append(Continuation(sampling, tokens))
            decode = incremental_decoder(self.tokenizer)
            for i in ids:
                decode(i)  # a character may be split over the prompt's end
            decoders.append(decode)
        torch.manual_seed(sampling.seed)
        steps = stream(
            self.model,
            torch.tensor([ids] * num_samples, device=self.device),
            sampling.max_new_tokens,
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.n_samples,
            n_ids=self.tokenizer.vocab_size,
            uncertain=uncertain,
        )
        # between two tokens the caller's code runs, outside our autocast
        not_cast = torch.autocast(self.device.type, enabled=False)
        with self.cast:
            for new, prediction in steps:
                new = new.squeeze(1)
                scores = [()] * num_samples
                if uncertain:
                    last = Prediction(*(part.squeeze(1) for part in prediction))
                    scores = prediction_scores(last, new, self.tokenizer)
                for text, decode, i, score in zip(
                    texts, decoders, new.tolist(), scores, strict=True
                ):
                    text.add(Token(decode(i), i, *score))
                with not_cast:
                    yield texts
                if all(text.ended for text in texts):
                    return

    @torch.no_grad()
    def predict(self, prompt: str = "", n_samples: int = 0) -> Prediction:
        """The prediction after the prompt's last block_size tokens: log_probs (V,), and in nats
        total, aleatoric and epistemic (scalars). n_samples: as in Sampling."""
        seed_micro_batch(0, 0)
        ids = self.encode(prompt)[-self.model.config.block_size :]
        idx = torch.tensor([ids], device=self.device)
        with self.cast:
            hiddens = self.model.hiddens(idx, n_samples)
            last = [hidden[0, -1] for hidden in hiddens]
            return self.model.lm_head.predict(last, n_samples)

    def uncertainty(self, text: str, n_samples: int = 0) -> ScoredText:
        """Score a text as the start of a document: see scored_text.Token.

        If the tokenizer has no end-of-text token, nothing predicts the first token. n_samples: as
        in Sampling."""
        before = [] if self.tokenizer.eot is None else [self.tokenizer.eot]
        ids = [*before, *self.tokenizer.encode(text).tolist()]
        with self.cast:
            scored = score_text(self.model, self.tokenizer, ids, n_samples)
        return self.scored(scored[len(before) :], "nll")
