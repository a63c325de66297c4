"""How good are runs on held-out text, and do they know what they do not know?

    python evaluate.py --out_dir=out/quickstart/softmax,out/quickstart/bayes --split=test --ood_dataset=shakespeare

Every number comes from log_probs, the normalised distribution over the next token, over the whole split: consecutive
blocks of block_size, each token predicted once. Each run gets eval_<split>.json, the comparison a folder with tables,
pictures and report.html. `unigram` is what the training text's token frequencies alone reach. With
--std_tolerance=0.01 --n_samples=16 a Bayesian run has a second row: its posterior as wide as costs no more than that on
the validation split. torchrun shares the work between processes; the results are the same.
"""

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from engine import distributed, table
from engine.checkpoint import check_tokenizer, folder_of, has_tokenizer, load_model, trained_on
from engine.config import load_config
from engine.diversity import continuations, diversity, prompts
from engine.errors import MANY, UserError, check_ranges, run
from engine.evaluation import evaluate, widest_posterior, windows
from engine.files import check_writable, replace, write_json
from engine.labels import LabelFile
from engine.logger import read_records
from engine.metrics import Tally, exp, out_of_domain
from engine.pretrained import HUB
from engine.report import Document, read_document, write_report
from engine.texts import Text, document
from engine.tokenizer import load_tokenizer
from engine.tokens import TokenFile, dataset_folder

SHOWN = 600  # tokens of a document that the report colours
SCALE_BLOCKS = 64  # of the validation split, to find the widest posterior on


@dataclass(frozen=True)
class EvaluateConfig:
    out_dir: str = "out"  # runs (the newest checkpoint) or checkpoint files, with commas; gpt2* with --dataset
    split: str = "test"  # test | val | train
    dataset: str = ""  # another data set than the run's own (same tokenizer)
    ood_dataset: str = ""  # the same split of this one as foreign text: which doubt tells it from the run's own?
    stride: int = 0  # windows this far apart: more context for each token, more time; 0: block_size
    batch_size: int = 16  # windows at a time: speed and memory
    limit: int = 0  # this many windows, evenly spread over the split; 0: the whole split
    n_samples: int = 0  # Bayesian: posterior draws averaged per prediction; 0: the mean weights; -1: all, not sampled
    std_tolerance: float = 0.0  # Bayesian: also with the widest posterior within so many nats on val; 0: do not
    labels: str = ""  # a label set of this split (augmentation/teacher_labels.py --split): recall@k and LRAP
    continuations: int = 0  # also generate so many, behind beginnings from the split: Self-BLEU, distinct-n, repetition
    prompt_tokens: int = 32  # of each beginning
    max_new_tokens: int = 100  # of each continuation
    temperature: float = 1.0  # of the continuations; these four are the same for all runs
    top_k: int = 0  # of the continuations: draw from the k likeliest tokens; 0: from all
    document: int = 0  # the report colours the beginning of this document of the split by uncertainty
    report: str = ""  # folder of tables, pictures, report.html; default: report_<split> beside the first run; none
    device: str = "auto"  # cpu | cuda | cuda:1 | mps | auto
    dtype: str = "float32"  # float32 | bfloat16 | float16 | auto

    def __post_init__(self):
        check_ranges(self, {"batch_size": (1, MANY), "limit": (0, MANY), "n_samples": (-1, 10**6)})
        check_ranges(self, {"std_tolerance": (0.0, 1e6), "stride": (0, MANY), "continuations": (0, 10**6)})
        check_ranges(self, {"prompt_tokens": (1, 10**6), "max_new_tokens": (1, 10**6), "top_k": (0, MANY)})
        check_ranges(self, {"temperature": (0.0, 1e6), "document": (0, MANY)})
        if self.report and Path(self.report).is_file():
            raise UserError(f"report = {self.report!r} is a file; name a folder")
        if self.std_tolerance and self.n_samples == 0:
            raise UserError("std_tolerance needs predictions that see the width: give --n_samples=16, say, or -1")


def main() -> None:
    config, _ = load_config(EvaluateConfig, sys.argv[1:])
    sources = list(dict.fromkeys(source.rstrip("/") for source in config.out_dir.split(",") if source))
    if not sources:
        raise UserError("which runs? --out_dir=RUN or --out_dir=RUN,RUN")
    for source in sources:  # before an hour goes into the ones that are there
        if source not in HUB and not Path(source).exists():
            raise UserError(f"{source} does not exist; give run folders, or one of: {', '.join(HUB)}")
    with distributed.start(config.device, "auto") as processes:
        torch.backends.cuda.matmul.allow_tf32 = False  # start() allows it, for training; float32 here is float32
        for source in sources:
            Evaluation(source, config, processes)  # refuses what is wrong before hours go into the runs before it
        compare(config, sources, processes)


def compare(config: EvaluateConfig, sources: list[str], processes: distributed.Processes) -> None:
    """Evaluate run by run, write down what each has, and report."""
    names = short_names(sources)
    rows, tallies, texts = {}, {}, {}
    if processes.is_main:  # hours before anything is written
        for source in sources:
            check_writable(result_file(source, config).parent)
        if config.report != "none":
            check_writable(report_folder(sources, config))
    for source, name in names.items():
        found = Evaluation(source, config, processes)
        rows[name], tallies[name] = row, _ = found.scores()
        scaled = ""
        if processes.is_main:
            result_file(source, config).parent.mkdir(parents=True, exist_ok=True)
        if processes.is_main and config.report != "none":
            for title, tokens in found.documents():
                texts.setdefault(title, {})[name] = tokens
        if processes.is_main and config.continuations:
            row["continuations"] = found.continuations()
        if config.std_tolerance and found.model.bayes_layers():
            factor = found.widen()
            scaled = f"{name} (std x {factor:.2f})"
            rows[scaled], tallies[scaled] = found.scores()
            rows[scaled] |= {"std_factor": factor, "std_tolerance": config.std_tolerance}
        if processes.is_main:
            write_json(result_file(source, config), row | ({"scaled": rows[scaled]} if scaled else {}))
    if processes.is_main:
        report(config, sources, rows, tallies, texts)


class Evaluation:
    """A run, or GPT-2 by name, and the text that it is asked about."""

    def __init__(self, source: str, config: EvaluateConfig, processes: distributed.Processes):
        self.source, self.config, self.processes = source, config, processes
        self.cast, _ = distributed.autocast(processes.device, config.dtype)
        self.model = load_model(source, processes.device)
        self.n_samples = config.n_samples if self.model.bayes_layers() else 0
        if config.std_tolerance and not self.model.bayes_layers() and source == config.out_dir:
            raise UserError(f"{source} has no posterior to scale; leave --std_tolerance out")
        if self.model.config.bayes_mlp and config.n_samples < 0:
            raise UserError(f"{source} has Bayesian MLPs, which only draws reach: give --n_samples=16, say")
        if config.stride > self.model.config.block_size:
            raise UserError(
                f"stride = {config.stride} leaves tokens out: {source} reads {self.model.config.block_size}"
            )
        self.dataset = config.dataset or trained_on(source)
        if self.dataset is None:
            raise UserError(f"{source} does not say what it was trained on; add --dataset=NAME")
        self.foreign = self._split(config.ood_dataset, config.split) if config.ood_dataset else None
        self.file, self.train = self._split(self.dataset, config.split), TokenFile(self.dataset, "train")
        if self.foreign and self.foreign.sha256 == self.file.sha256:
            raise UserError(f"ood_dataset = {config.ood_dataset!r} is the run's own text; name another data set")
        self.labels = LabelFile(self.file, config.labels, "set") if config.labels else None
        widens = config.std_tolerance and self.model.bayes_layers()
        self.val = self._split(self.dataset, "val") if widens else None
        for file in filter(None, (self.foreign, self.file, self.labels, self.val)):
            file.check(self.model.config.vocab_size)
        folder = folder_of(source)
        self.tokenizer = load_tokenizer(folder if has_tokenizer(folder) else dataset_folder(self.dataset))
        eot, name = self.tokenizer.eot, f"{self.dataset}, {config.split} split, document {config.document}"
        self.shown = {name: document(self.file, eot, config.document, SHOWN)}
        if self.foreign:
            self.shown[f"foreign: {config.ood_dataset}"] = document(self.foreign, eot, 0, SHOWN)
        if config.continuations:
            self.prompts = prompts(self.file, self.tokenizer, config.continuations, config.prompt_tokens)

    def _split(self, dataset: str, split: str) -> TokenFile:
        check_tokenizer(self.source, dataset_folder(dataset))
        return TokenFile(dataset, split)

    def scores(self) -> tuple[dict, Tally]:
        """All numbers on the whole split, and what they were made of."""
        config, head, n_ids = self.config, self.model.config.head, self.model.config.vocab_size
        n_documents = 0 if self.tokenizer.eot is None else self.file.counts(n_ids)[self.tokenizer.eot].item()
        text = Text(self.tokenizer, self.train.frequencies(n_ids), n_documents, part=bool(config.limit))
        tally = self._evaluate(self.file, config.limit, self.source, text, self.labels)
        row = {"head": f"{head.weights} x {head.likelihood}", "dataset": str(self.dataset), "split": config.split}
        row |= {"sha256": self.file.sha256, "tokenizer": self.tokenizer.describe(), "unit": text.unit}
        row |= {"block_size": self.model.config.block_size, "stride": config.stride or self.model.config.block_size}
        row |= {"n_samples": self.n_samples, "limit": config.limit, "n_words": text.n_words}
        row |= {"labels": config.labels, "k": self.labels.about["k"] + 1} if self.labels else {}
        row |= tally.result()
        row["word_perplexity"] = exp(row["nll"] * row["n_tokens"] / max(1, text.n_words))
        if kl := float(torch.as_tensor(self.model.kl()).detach()):
            row |= {"kl": kl, "kl_weight": head.kl_weight}
        if self.foreign:
            foreign = self._evaluate(self.foreign, config.limit, f"{self.source}: {config.ood_dataset}")
            about = {
                "dataset": config.ood_dataset,
                "n_tokens": foreign.result()["n_tokens"],
                "nll": foreign.mean("nll"),
            }
            row["ood"] = about | out_of_domain(tally, foreign)
        return row, tally

    def continuations(self) -> dict:
        """How varied what the run writes is, and by which settings; the texts go beside its numbers."""
        names = ("max_new_tokens", "temperature", "top_k", "n_samples")
        settings = {name: getattr(self.config, name) for name in names} | {"seed": 1337, "batch_size": 32}
        ids = {"n_ids": self.tokenizer.vocab_size, "eot": self.tokenizer.eot}
        with self.cast:
            found = continuations(self.model, self.prompts, **settings, **ids, desc=f"{self.source}: continuations")
        texts = [self.tokenizer.decode(row) for row in found]
        pairs = zip(map(self.tokenizer.decode, self.prompts.tolist()), texts, strict=True)
        lines = "".join(json.dumps({"prompt": prompt, "continuation": text}) + "\n" for prompt, text in pairs)
        path = result_file(self.source, self.config)
        path = path.with_name(path.name.replace("eval_", "continuations_", 1) + "l")
        replace(path, lambda temporary: temporary.write_text(lines))
        settings |= {"prompt_tokens": self.config.prompt_tokens, "split": self.config.split}
        return diversity(texts, found) | {"settings": settings}

    def documents(self) -> Iterator[tuple[str, list[dict]]]:
        """Of the split and of the foreign text the beginning of a document, token by token."""
        for title, ids in self.shown.items():
            yield title, read_document(self.model, self.tokenizer, ids, self.n_samples)

    def widen(self) -> float:
        """Scale the posterior to the widest that costs no more than std_tolerance on the validation split."""
        nll = partial(self._evaluate, self.val, SCALE_BLOCKS, f"{self.source}: width")
        return widest_posterior(self.model, lambda: nll().mean("nll"), self.config.std_tolerance)

    def _evaluate(self, file: TokenFile, limit: int, what: str, text: Text | None = None, labels=None) -> Tally:
        shape = (self.model.config.block_size, self.config.batch_size, limit, self.config.stride)
        n = (len(file) - 1) / (self.config.stride or shape[0])
        hidden = not (sys.stderr.isatty() and self.processes.is_main)
        show = {"desc": what, "total": math.ceil(min(limit or n, n) / shape[1]), "leave": False, "disable": hidden}
        batches = tqdm(windows(file, *shape, text, labels), **show)
        return evaluate(self.model, batches, self.processes, self.cast, self.n_samples, text)


def report(config: EvaluateConfig, sources: list[str], rows: dict, tallies: dict, texts: dict) -> None:
    """The comparison on the screen and in a folder. rows, tallies: by the names of the runs; texts: of each document,
    its tokens as each run reads them."""
    tables = table.tables(rows, tallies)
    first = next(iter(rows.values()))
    units = {"stretch": "stretches"}.get(first["unit"], first["unit"] + "s")
    of_what = "{dataset}, {split} split, {n_tokens:,} tokens in {n_units:,} {units}".format(**first, units=units)
    print("\n\n".join([of_what, *map(table.as_text, tables)]))
    if config.report == "none":
        return
    folder = report_folder(sources, config)
    folder.mkdir(parents=True, exist_ok=True)
    markdown = "\n\n".join([of_what, *map(table.as_markdown, tables)]) + "\n"
    for name, text in (("tables.md", markdown), ("tables.csv", table.as_csv(rows, tallies))):
        replace(folder / name, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
    curves = {name: read_records(folder_of(source) / "metrics.jsonl") for source, name in short_names(sources).items()}
    same = table.comparable(rows)  # else pictures would compare what the tables do not
    pairs = dict.fromkeys("{block_size} tokens, {stride} apart".format(**row) for row in rows.values())
    settings = f"n_samples = {config.n_samples}, windows of {' or '.join(pairs)}"
    documents = [Document(title, tokens) for title, tokens in texts.items()]
    write_report(folder, of_what, settings, tables, rows if same else {}, curves if same else {}, documents)
    print(f"report: {os.path.relpath(folder / 'report.html')}")


def result_file(source: str, config: EvaluateConfig) -> Path:
    """Where the numbers of a run go; those of GPT-2 by name to out/<name>."""
    home = Path("out", source) if source in HUB else folder_of(source)
    return home / (
        f"eval_{config.split}_{Path(source).stem}.json" if Path(source).is_file() else f"eval_{config.split}.json"
    )


def report_folder(sources: list[str], config: EvaluateConfig) -> Path:
    """The one named; else in the folder of a run, of several runs beside the first."""
    home = result_file(sources[0], config).parent
    return Path(config.report or (home if len(sources) == 1 else home.parent) / f"report_{config.split}")


def short_names(sources: Iterable[str]) -> dict[str, str]:
    """source -> the last part of its path, or all of it where two share that part."""
    last = {source: Path(source).name or source for source in sources}
    return {source: name if list(last.values()).count(name) == 1 else source for source, name in last.items()}


if __name__ == "__main__":
    run(main)
