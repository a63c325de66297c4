"""All that evaluate.py measures of one run: scores, continuations, and coloured documents."""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from tqdm import tqdm

from engine.base.distributed import Processes, autocast
from engine.base.errors import UserError
from engine.base.options import NonNegativeFloat, NonNegativeInt, PositiveInt, check_options
from engine.data.labels import LabelFile
from engine.data.tokenizer import has_tokenizer, load_tokenizer
from engine.data.tokens import TokenFile, dataset_folder
from engine.data.windows import windows
from engine.eval.diversity import continuations, diversity, prompts
from engine.eval.ensemble import load, members_of
from engine.eval.evaluation import check_n_samples, evaluate
from engine.eval.metrics import MetricAccumulator, out_of_domain
from engine.eval.scored_text import ScoredText, score_text
from engine.eval.texts import TextStats, document
from engine.eval.validation import exp
from engine.runs.checkpoint import check_tokenizer, folder_of

SHOWN_TOKENS = 600  # of a document that the report colours
WIDTH_WINDOWS = 64  # of the validation split, to find the widest posterior
MAX_STD_FACTOR = 1000.0


@dataclass(frozen=True)
class EvaluationConfig:
    split: str = "test"  # test | val | train
    dataset: str = ""  # another data set than the run's own (same tokenizer)
    # out-of-domain text, the same split of this one: which uncertainty tells it from the run's own?
    ood_dataset: str = ""
    # windows this far apart: more context for each token, more time; 0: block_size
    stride: NonNegativeInt = 0
    batch_size: PositiveInt = 16  # windows at a time: speed and memory
    # this many windows, evenly spread over the split; 0: the whole split
    limit: NonNegativeInt = 0
    # Bayesian: posterior draws averaged per prediction; 0: the mean weights; -1: all, not sampled
    n_samples: Annotated[int, ">= -1", "<= 1e6"] = 0
    # average n_samples passes with dropout, for runs that were trained with it
    mc_dropout: bool = False
    # Bayesian: also with the widest posterior within so many nats on val; 0: do not
    std_tolerance: NonNegativeFloat = 0.0
    # a label set of this split (augmentation/teacher_labels.py --split): recall@k and LRAP
    labels: str = ""
    # also generate so many texts from prompts of the split: Self-BLEU, distinct-n, repetition
    continuations: NonNegativeInt = 0
    prompt_tokens: PositiveInt = 32  # of each prompt
    max_new_tokens: PositiveInt = 100  # of each continuation
    temperature: NonNegativeFloat = 1.0  # of the continuations
    # of the continuations: draw from the k likeliest tokens; 0: from all
    top_k: NonNegativeInt = 0
    # the report colours the beginning of this document of the split by uncertainty
    document: NonNegativeInt = 0
    dtype: str = "float32"  # float32 | bfloat16 | float16 | auto

    def __post_init__(self):
        check_options(self)
        if self.mc_dropout and self.n_samples < 1:
            raise UserError("mc_dropout averages passes: give --n_samples=16, say")
        if self.mc_dropout and self.continuations:
            raise UserError(
                "continuations are generated without dropout; "
                "leave --mc_dropout or --continuations out"
            )
        if self.std_tolerance and self.n_samples == 0:
            raise UserError(
                "std_tolerance needs predictions that depend on the posterior's width: "
                "give --n_samples=16, say, or -1"
            )


class Evaluator:
    """A run, an ensemble of runs, or GPT-2 by name, and the text to evaluate it on.

    What cannot work is refused here, before hours go into other runs."""

    def __init__(self, source: str, config: EvaluationConfig, processes: Processes):
        self.source, self.config, self.processes = source, config, processes
        self.cast, _ = autocast(processes.device, config.dtype)
        self.members = members_of(source)
        self.model, dataset = load(source)
        self.models = list(getattr(self.model, "members", [self.model]))
        self.mc_dropout = config.mc_dropout and all(m.config.dropout for m in self.models)
        for model in self.models:
            model.mc_dropout = self.mc_dropout
        draws = self.model.bayes_layers() or self.mc_dropout
        self.n_samples = config.n_samples if draws else 0
        check_n_samples(self.model, self.n_samples, source)
        self.block_size = self.model.config.block_size
        self.stride = config.stride or self.block_size
        if self.stride > self.block_size:
            raise UserError(
                f"stride = {self.stride} leaves tokens out: {source} reads {self.block_size}"
            )
        self.dataset = config.dataset or dataset
        if self.dataset is None:
            raise UserError(f"{source} does not say what it was trained on; add --dataset=NAME")
        self._open_texts()

    def _open_texts(self) -> None:
        config = self.config
        self.file = self._split(self.dataset, config.split)
        self.train = TokenFile(self.dataset, "train")
        self.labels = LabelFile(self.file, config.labels, "set") if config.labels else None
        if self.labels:
            self.labels.check(self.model.config.vocab_size)
        if config.std_tolerance and self.model.bayes_layers():
            self.val = self._split(self.dataset, "val")
        folder = folder_of(self.members[0])
        if not has_tokenizer(folder):
            folder = dataset_folder(self.dataset)
        self.tokenizer = load_tokenizer(folder)
        eot = self.tokenizer.eot
        title = f"{self.dataset}, {config.split} split, document {config.document}"
        self.shown = {title: document(self.file, eot, config.document, SHOWN_TOKENS)}
        self.ood = None
        if config.ood_dataset:
            self.ood = self._split(config.ood_dataset, config.split)
            if self.ood.sha256 == self.file.sha256:
                raise UserError(
                    f"ood_dataset = {config.ood_dataset!r} is the run's own text; "
                    "name another data set"
                )
            title = f"out of domain: {config.ood_dataset}"
            self.shown[title] = document(self.ood, eot, 0, SHOWN_TOKENS)
        if config.continuations:
            if len(self.members) > 1:
                raise UserError(
                    f"{self.source} is an ensemble, which does not generate; "
                    "leave --continuations out"
                )
            self.prompts = prompts(self.file, eot, config.continuations, config.prompt_tokens)

    def _split(self, dataset: str, split: str) -> TokenFile:
        for member in self.members:
            check_tokenizer(member, dataset_folder(dataset))
        file = TokenFile(dataset, split)
        file.check(self.model.config.vocab_size)
        return file

    def scores(self) -> tuple[dict, MetricAccumulator]:
        """All numbers on the whole split, and what they were computed from."""
        config, n_ids, eot = self.config, self.model.config.vocab_size, self.tokenizer.eot
        n_documents = 0 if eot is None else self.file.counts(n_ids)[eot].item()
        frequencies = self.train.frequencies(n_ids)
        text = TextStats(self.tokenizer, frequencies, n_documents, part=bool(config.limit))
        scores = self._evaluate(self.file, config.limit, text, self.labels)
        row = {
            "head": self._describe_heads(),
            "dataset": str(self.dataset),
            "split": config.split,
            "sha256": self.file.sha256,
            "tokenizer": self.tokenizer.describe(),
            "unit": text.unit,
            "block_size": self.block_size,
            "stride": self.stride,
            "n_samples": self.n_samples,
            "limit": config.limit,
            "n_words": text.n_words,
        }
        if self.mc_dropout:
            row["mc_dropout"] = True
        if self.labels:
            row |= {"labels": config.labels, "k": self.labels.about["k"] + 1}
        row |= scores.result()
        row["word_perplexity"] = exp(row["nll"] * row["n_tokens"] / max(1, text.n_words))
        if len(self.members) == 1 and self.model.bayes_layers():
            kl_weight = self.model.config.head.kl_weight
            row |= {"kl": self.model.kl().item(), "kl_weight": kl_weight}
        if self.ood:
            found = out_of_domain(scores, self._evaluate(self.ood, config.limit))
            row["ood"] = {"dataset": config.ood_dataset} | found
        return row, scores

    def _describe_heads(self) -> str:
        heads = [model.config.head for model in self.models]
        names = " + ".join(dict.fromkeys(f"{h.weights} x {h.likelihood}" for h in heads))
        return names if len(heads) == 1 else f"{names}, ensemble of {len(heads)}"

    def continuations(self) -> tuple[dict, list[dict]]:
        """How varied the generated text is, and with which settings; the prompts and texts."""
        config = self.config
        settings = {
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "top_k": config.top_k,
            "n_samples": config.n_samples,
            "seed": 1337,
            "batch_size": 32,
        }
        decode, n_ids = self.tokenizer.decode, self.tokenizer.vocab_size
        with self.cast:
            found = continuations(
                self.model, self.prompts, eot=self.tokenizer.eot, n_ids=n_ids, **settings
            )
        texts = [decode(ids) for ids in found]
        records = [
            {"prompt": decode(prompt), "continuation": text}
            for prompt, text in zip(self.prompts.tolist(), texts, strict=True)
        ]
        settings |= {"prompt_tokens": config.prompt_tokens, "split": config.split}
        return diversity(texts, found) | {"settings": settings}, records

    def documents(self) -> dict[str, ScoredText]:
        """title -> the beginning of a document of the split and of the OOD text, token by token."""
        return {
            title: score_text(self.model, self.tokenizer, ids, self.n_samples)
            for title, ids in self.shown.items()
        }

    def widen(self) -> float:
        """Scale the posterior's standard deviations by the largest factor that costs at most
        std_tolerance nats per token on the validation split; returns the factor, to 5 %."""

        def nll() -> float:
            return self._evaluate(self.val, WIDTH_WINDOWS).mean("nll")

        return widest_posterior(self.model, nll, self.config.std_tolerance)

    def _evaluate(
        self, file: TokenFile, limit: int, text: TextStats | None = None, labels=None
    ) -> MetricAccumulator:
        batch_size = self.config.batch_size
        batches = windows(file, self.block_size, batch_size, limit, self.stride, labels)
        n_windows = (len(file) - 1) / self.stride
        bar = tqdm(
            batches,
            desc=f"{self.source}, {file.path}",
            total=math.ceil(min(limit or n_windows, n_windows) / batch_size),
            leave=False,
            disable=None if self.processes.is_main else True,  # None: if it is no terminal
        )
        return evaluate(self.model, bar, self.processes, self.cast, self.n_samples, text)


def widest_posterior(model: torch.nn.Module, nll, tolerance: float) -> float:
    """Scale the posterior's standard deviations by the largest factor with which nll() stays within
    the tolerance of what it is now; returns the factor, to 5 %."""
    limit, factor, step = nll() + tolerance, 1.0, 2.0
    while step > 1.04:
        scale_posterior(model, step)
        if nll() <= limit and factor * step < MAX_STD_FACTOR:
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
