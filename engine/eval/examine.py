"""One run and the text that it is asked about: its scores, continuations, and readings of documents.

evaluate.py compares runs; its options are those that `config` has here.
"""

import json
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from engine.base.distributed import Processes, autocast
from engine.base.errors import UserError
from engine.base.files import atomic_write
from engine.data.labels import LabelFile
from engine.data.tokenizer import has_tokenizer, load_tokenizer
from engine.data.tokens import TokenFile, dataset_folder
from engine.data.windows import windows
from engine.eval.diversity import continuations, diversity, prompts
from engine.eval.ensemble import load, members_of
from engine.eval.evaluation import evaluate, widest_posterior
from engine.eval.metrics import MetricAccumulator, out_of_domain
from engine.eval.scored_text import ScoredText, score_text
from engine.eval.texts import TextStats, document
from engine.eval.validation import exp
from engine.gpt2.loading import HUB
from engine.runs.checkpoint import check_tokenizer, folder_of

if TYPE_CHECKING:
    from evaluate import EvaluateConfig

SHOWN = 600  # tokens of a document that the report colours
SCALE_BLOCKS = 64  # of the validation split, to find the widest posterior on


class Evaluation:
    """A run, or GPT-2 by name, and the text that it is asked about."""

    def __init__(self, source: str, config: "EvaluateConfig", processes: Processes):
        self.source, self.config, self.processes = source, config, processes
        self.cast, _ = autocast(processes.device, config.dtype)
        self.model, dataset = load(source, processes.device)
        self.members = members_of(source)
        self.models = list(getattr(self.model, "members", [self.model]))
        self.drops_out = config.mc_dropout and self._drop_out()
        self.n_samples = config.n_samples if self.model.bayes_layers() or self.drops_out else 0
        if config.continuations and len(self.members) > 1:
            raise UserError(
                f"{source} is an ensemble, which does not write; leave --continuations out"
            )
        if config.std_tolerance and not self.model.bayes_layers() and source == config.out_dir:
            raise UserError(f"{source} has no posterior to scale; leave --std_tolerance out")
        if self.model.config.bayes_mlp and config.n_samples < 0:
            raise UserError(
                f"{source} has Bayesian MLPs, which only draws reach: give --n_samples=16, say"
            )
        if config.stride > self.model.config.block_size:
            raise UserError(
                f"stride = {config.stride} leaves tokens out: {source} reads {self.model.config.block_size}"
            )
        self.dataset = config.dataset or dataset
        if self.dataset is None:
            raise UserError(f"{source} does not say what it was trained on; add --dataset=NAME")
        self.foreign = self._split(config.ood_dataset, config.split) if config.ood_dataset else None
        self.file, self.train = (
            self._split(self.dataset, config.split),
            TokenFile(self.dataset, "train"),
        )
        if self.foreign and self.foreign.sha256 == self.file.sha256:
            raise UserError(
                f"ood_dataset = {config.ood_dataset!r} is the run's own text; name another data set"
            )
        self.labels = LabelFile(self.file, config.labels, "set") if config.labels else None
        widens = config.std_tolerance and self.model.bayes_layers()
        self.val = self._split(self.dataset, "val") if widens else None
        for file in filter(None, (self.foreign, self.file, self.labels, self.val)):
            file.check(self.model.config.vocab_size)
        folder = folder_of(self.members[0])
        self.tokenizer = load_tokenizer(
            folder if has_tokenizer(folder) else dataset_folder(self.dataset)
        )
        eot, name = (
            self.tokenizer.eot,
            f"{self.dataset}, {config.split} split, document {config.document}",
        )
        self.shown = {name: document(self.file, eot, config.document, SHOWN)}
        if self.foreign:
            self.shown[f"foreign: {config.ood_dataset}"] = document(self.foreign, eot, 0, SHOWN)
        if config.continuations:
            self.prompts = prompts(
                self.file, self.tokenizer, config.continuations, config.prompt_tokens
            )

    def _drop_out(self) -> bool:
        """Leave dropout on, if the run (of an ensemble each one) was trained with it; whether it was."""
        without = [
            name
            for name, model in zip(self.members, self.models, strict=True)
            if not model.config.dropout
        ]
        if without and (len(without) < len(self.models) or self.source == self.config.out_dir):
            raise UserError(f"{without[0]} was trained without dropout; leave --mc_dropout out")
        for model in self.models:
            model.mc_dropout = not without
        return not without

    def _split(self, dataset: str, split: str) -> TokenFile:
        for member in self.members:
            check_tokenizer(member, dataset_folder(dataset))
        return TokenFile(dataset, split)

    def scores(self) -> tuple[dict, MetricAccumulator]:
        """All numbers on the whole split, and what they were made of."""
        config, n_ids = self.config, self.model.config.vocab_size
        heads = dict.fromkeys(
            f"{m.config.head.weights} x {m.config.head.likelihood}" for m in self.models
        )
        n_documents = (
            0 if self.tokenizer.eot is None else self.file.counts(n_ids)[self.tokenizer.eot].item()
        )
        text = TextStats(
            self.tokenizer, self.train.frequencies(n_ids), n_documents, part=bool(config.limit)
        )
        tally = self._evaluate(self.file, config.limit, self.source, text, self.labels)
        ensemble = f", ensemble of {len(self.members)}" if len(self.members) > 1 else ""
        row = {
            "head": " + ".join(heads) + ensemble,
            "dataset": str(self.dataset),
            "split": config.split,
        }
        row |= {
            "sha256": self.file.sha256,
            "tokenizer": self.tokenizer.describe(),
            "unit": text.unit,
        }
        row |= {
            "block_size": self.model.config.block_size,
            "stride": config.stride or self.model.config.block_size,
        }
        row |= {"mc_dropout": True} if self.drops_out else {}
        row |= {"n_samples": self.n_samples, "limit": config.limit, "n_words": text.n_words}
        row |= {"labels": config.labels, "k": self.labels.about["k"] + 1} if self.labels else {}
        row |= tally.result()
        row["word_perplexity"] = exp(row["nll"] * row["n_tokens"] / max(1, text.n_words))
        if len(self.members) == 1 and (kl := float(torch.as_tensor(self.model.kl()).detach())):
            row |= {"kl": kl, "kl_weight": self.model.config.head.kl_weight}
        if self.foreign:
            foreign = self._evaluate(
                self.foreign, config.limit, f"{self.source}: {config.ood_dataset}"
            )
            row["ood"] = {"dataset": config.ood_dataset} | out_of_domain(tally, foreign)
        return row, tally

    def continuations(self) -> dict:
        """How varied what the run writes is, and by which settings; the texts go beside its numbers."""
        names = ("max_new_tokens", "temperature", "top_k", "n_samples")
        settings = {name: getattr(self.config, name) for name in names} | {
            "seed": 1337,
            "batch_size": 32,
        }
        ids = {"n_ids": self.tokenizer.vocab_size, "eot": self.tokenizer.eot}
        with self.cast:
            found = continuations(
                self.model, self.prompts, **settings, **ids, desc=f"{self.source}: continuations"
            )
        texts = [self.tokenizer.decode(row) for row in found]
        pairs = zip(map(self.tokenizer.decode, self.prompts.tolist()), texts, strict=True)
        lines = "".join(
            json.dumps({"prompt": prompt, "continuation": text}) + "\n" for prompt, text in pairs
        )
        path = result_file(self.source, self.config)
        path = path.with_name(path.name.replace("eval_", "continuations_", 1) + "l")
        atomic_write(path, lambda temporary: temporary.write_text(lines))
        settings |= {"prompt_tokens": self.config.prompt_tokens, "split": self.config.split}
        return diversity(texts, found) | {"settings": settings}

    def documents(self) -> Iterator[tuple[str, ScoredText]]:
        """Of the split and of the foreign text the beginning of a document, token by token."""
        for title, ids in self.shown.items():
            yield title, score_text(self.model, self.tokenizer, ids, self.n_samples)

    def widen(self) -> float:
        """Scale the posterior to the widest that costs no more than std_tolerance on the validation split."""
        nll = partial(self._evaluate, self.val, SCALE_BLOCKS, f"{self.source}: width")
        return widest_posterior(self.model, lambda: nll().mean("nll"), self.config.std_tolerance)

    def _evaluate(
        self, file: TokenFile, limit: int, what: str, text: TextStats | None = None, labels=None
    ) -> MetricAccumulator:
        shape = (self.model.config.block_size, self.config.batch_size, limit, self.config.stride)
        n = (len(file) - 1) / (self.config.stride or shape[0])
        hidden = not (sys.stderr.isatty() and self.processes.is_main)
        show = {
            "desc": what,
            "total": math.ceil(min(limit or n, n) / shape[1]),
            "leave": False,
            "disable": hidden,
        }
        batches = tqdm(windows(file, *shape, labels), **show)
        return evaluate(self.model, batches, self.processes, self.cast, self.n_samples, text)


def result_file(source: str, config: "EvaluateConfig") -> Path:
    """Where the numbers of a run go; those of GPT-2 by name to out/<name>, of an ensemble beside its first run's."""
    first, *others = members_of(source)
    home = Path("out", first) if first in HUB else folder_of(first)
    name = f"_{Path(first).stem}" if Path(first).is_file() else ""
    return (
        home
        / f"eval_{config.split}{name}{f'_ensemble_of_{1 + len(others)}' if others else ''}.json"
    )
