"""What evaluate.py measures of one run: scores, continuations, and scored documents."""

import math
from dataclasses import dataclass
from typing import Annotated

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
from engine.eval.texts import TextStats, first_document
from engine.eval.validation import exp
from engine.runs.checkpoint import check_tokenizer, folder_of

SHOWN_TOKENS = 600  # of a document that the report colours


@dataclass(frozen=True)
class EvaluationConfig:
    split: str = "test"  # test | val | train
    dataset: str = ""  # another data set than the run's own (same tokenizer)
    # a data set of out-of-domain (OOD) text: how well does each uncertainty detect it?
    ood_dataset: str = ""
    # distance between windows; below block_size each token has more context, and it takes longer;
    # 0: block_size
    stride: NonNegativeInt = 0
    batch_size: PositiveInt = 16  # windows at a time: speed and memory
    # this many windows, evenly spread over the split; 0: the whole split
    limit: NonNegativeInt = 0
    # Bayesian: posterior draws averaged per prediction; 0: the mean weights; -1: all, not sampled
    n_samples: Annotated[int, ">= -1", "<= 1e6"] = 0
    # average n_samples passes with dropout, for runs that were trained with it
    mc_dropout: bool = False
    # a label set of this split (augmentation/teacher_labels.py --split): recall@k
    labels: str = ""
    # also generate this many texts from prompts of the split: Self-BLEU, distinct-n
    continuations: NonNegativeInt = 0
    prompt_tokens: PositiveInt = 32  # of each prompt
    max_new_tokens: PositiveInt = 100  # of each continuation
    temperature: NonNegativeFloat = 1.0  # of the continuations
    # of the continuations: draw from the k likeliest tokens; 0: from all
    top_k: NonNegativeInt = 0
    dtype: str = "float32"  # float32 | bfloat16 | float16 | auto

    def __post_init__(self):
        check_options(self)
        if self.mc_dropout and self.n_samples < 1:
            raise UserError("mc_dropout averages passes; add --n_samples=16, for example")
        if self.mc_dropout and self.continuations:
            raise UserError(
                "continuations are generated without dropout; "
                "leave --mc_dropout or --continuations out"
            )


class Evaluator:
    """A run, an ensemble of runs, or GPT-2 by name, and the text to evaluate it on.

    The constructor finds mistakes before other runs are evaluated, which may take hours."""

    def __init__(self, source: str, config: EvaluationConfig, processes: Processes):
        self.source = source
        self.config = config
        self.processes = processes
        self.cast, _ = autocast(processes.device, config.dtype)
        self.members = members_of(source)
        self.model, dataset = load(source)
        self.models = getattr(self.model, "members", [self.model])
        if config.mc_dropout:
            self._drop_out()
        draws = self.model.bayes_layers() or config.mc_dropout
        self.n_samples = config.n_samples if draws else 0
        check_n_samples(self.model, self.n_samples, source)
        self.block_size = self.model.config.block_size
        self.stride = config.stride or self.block_size
        if self.stride > self.block_size:
            raise UserError(
                f"stride = {self.stride} would skip tokens: {source} has "
                f"block_size = {self.block_size}"
            )
        self.dataset = config.dataset or dataset
        if self.dataset is None:
            raise UserError(f"{source} does not name its data set; add --dataset=NAME")
        self._open_texts()

    def _drop_out(self):
        for model in self.models:
            if not model.config.dropout:
                raise UserError(
                    f"{self.source} was not trained with dropout; leave --mc_dropout out"
                )
            model.mc_dropout = True

    def _open_texts(self):
        config = self.config
        n_ids = self.model.config.vocab_size
        self.file = self._split(self.dataset)
        self.frequencies = TokenFile(self.dataset, "train").frequencies(n_ids)
        self.labels = None
        if config.labels:
            self.labels = LabelFile(self.file, config.labels, "set")
            self.labels.check(n_ids)
        folder = folder_of(self.members[0])
        if not has_tokenizer(folder):
            folder = dataset_folder(self.dataset)
        self.tokenizer = load_tokenizer(folder)
        self.ood = None
        if config.ood_dataset:
            self.ood = self._split(config.ood_dataset)
        if config.continuations:
            if len(self.members) > 1:
                raise UserError(
                    f"{self.source} is an ensemble, which cannot generate text; "
                    "leave --continuations out"
                )
            eot = self.tokenizer.eot
            self.prompts = prompts(self.file, eot, config.continuations, config.prompt_tokens)

    def _split(self, dataset):
        for member in self.members:
            check_tokenizer(member, dataset_folder(dataset))
        file = TokenFile(dataset, self.config.split)
        file.check(self.model.config.vocab_size)
        return file

    def scores(self) -> tuple[dict, MetricAccumulator]:
        """All scores of the split, and the sums that they were computed from."""
        config = self.config
        eot = self.tokenizer.eot
        n_documents = 0
        if eot is not None:
            n_documents = self.file.counts(self.model.config.vocab_size)[eot].item()
        text = TextStats(self.tokenizer, self.frequencies, n_documents, part=bool(config.limit))
        scores = self._evaluate(self.file, text, self.labels)
        row = scores.result()
        nats = row["nll"] * row["n_tokens"]
        row |= {
            "head": self._describe_heads(),
            "dataset": str(self.dataset),
            "split": config.split,
            "sha256": self.file.sha256,
            "tokenizer": self.tokenizer.describe(),
            "unit": text.unit,
            "block_size": self.block_size,
            "stride": self.stride,
            "n_samples": self.n_samples,
            "mc_dropout": config.mc_dropout,
            "limit": config.limit,
            "n_words": text.n_words,
            "n_bytes": text.n_bytes,
            "word_perplexity": exp(nats / max(1, text.n_words)),
            "bits_per_byte": nats / max(1, text.n_bytes) / math.log(2),
        }
        if self.labels:
            row |= {"labels": config.labels, "k": self.labels.about["k"] + 1}
        if self.model.bayes_layers() and len(self.members) == 1:
            row["kl"] = self.model.kl().item()
            row["kl_weight"] = self.model.config.head.kl_weight
        if self.ood:
            row["ood"] = {"dataset": config.ood_dataset}
            row["ood"] |= out_of_domain(scores, self._evaluate(self.ood))
        return row, scores

    def _describe_heads(self):
        heads = [model.config.head for model in self.models]
        return " + ".join(f"{head.weights} x {head.likelihood}" for head in heads)

    def continuations(self) -> tuple[dict, list[dict]]:
        """Returns the diversity of generated texts with their settings, and the texts."""
        config = self.config
        names = ("max_new_tokens", "temperature", "top_k", "n_samples")
        settings = {name: getattr(config, name) for name in names}
        tokenizer = self.tokenizer
        with self.cast:
            texts = continuations(self.model, tokenizer, self.prompts, **settings)
        records = []
        for ids, text in zip(self.prompts.tolist(), texts, strict=True):
            records.append({"prompt": tokenizer.decode(ids), "continuation": text})
        settings |= {"prompt_tokens": config.prompt_tokens, "split": config.split}
        return diversity(texts) | {"settings": settings}, records

    def documents(self) -> dict[str, ScoredText]:
        """title -> the first document of the split and of the OOD text, token by token."""
        found = {}
        for title, file in (("In domain", self.file), ("Out of domain", self.ood)):
            if file:
                ids = first_document(file, self.tokenizer.eot, SHOWN_TOKENS)
                scored = score_text(self.model, self.tokenizer, ids, self.n_samples)
                found[f"{title}: {file.path}"] = scored
        return found

    def _evaluate(self, file, text=None, labels=None):
        config = self.config
        n_windows = math.ceil((len(file) - 1) / self.stride)
        n_windows = min(n_windows, config.limit or n_windows)
        bar = tqdm(
            windows(file, self.block_size, config.batch_size, config.limit, self.stride, labels),
            desc=f"{self.source}, {file.path}",
            total=math.ceil(n_windows / config.batch_size),
            leave=False,
            disable=None if self.processes.is_main else True,  # None: only in a terminal
        )
        return evaluate(self.model, bar, self.processes, self.cast, self.n_samples, text)
