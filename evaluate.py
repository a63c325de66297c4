"""How good are runs on held-out text, and do they know what they do not know?

    python evaluate.py --out_dir=out/quickstart/softmax,out/quickstart/bayes --split=test --ood_dataset=shakespeare

Every number comes from log_probs, the normalised distribution over the next token, over the whole split: consecutive
blocks of block_size, each token predicted once. Each run gets eval_<split>.json, the comparison a folder with tables,
pictures and report.html. `unigram` is what the training text's token frequencies alone reach. With
--std_tolerance=0.01 --n_samples=16 a Bayesian run has a second row: its posterior as wide as costs no more than that on
the validation split. A+B+C names the ensemble of three runs. torchrun shares the work between
processes; the results are the same.
"""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.base import distributed
from engine.base.errors import MANY, UserError, check_ranges, run_main
from engine.base.files import atomic_write, check_writable, write_json
from engine.base.options import load_config
from engine.eval import table
from engine.eval.ensemble import members_of
from engine.eval.examine import Evaluation, result_file
from engine.eval.report import Document, write_report
from engine.gpt2.loading import HUB
from engine.runs.checkpoint import folder_of
from engine.runs.logger import read_records


@dataclass(frozen=True)
class EvaluateConfig:
    # runs (the newest checkpoint) or checkpoint files, with commas; gpt2* with --dataset; A+B
    out_dir: str = "out"
    split: str = "test"  # test | val | train
    dataset: str = ""  # another data set than the run's own (same tokenizer)
    # the same split of this one as foreign text: which doubt tells it from the run's own?
    ood_dataset: str = ""
    stride: int = 0  # windows this far apart: more context for each token, more time; 0: block_size
    batch_size: int = 16  # windows at a time: speed and memory
    limit: int = 0  # this many windows, evenly spread over the split; 0: the whole split
    # Bayesian: posterior draws averaged per prediction; 0: the mean weights; -1: all, not sampled
    n_samples: int = 0
    mc_dropout: bool = False  # runs trained with dropout: leave it on and average n_samples passes
    # Bayesian: also with the widest posterior within so many nats on val; 0: do not
    std_tolerance: float = 0.0
    # a label set of this split (augmentation/teacher_labels.py --split): recall@k and LRAP
    labels: str = ""
    # also generate so many, behind beginnings from the split: Self-BLEU, distinct-n, repetition
    continuations: int = 0
    prompt_tokens: int = 32  # of each beginning
    max_new_tokens: int = 100  # of each continuation
    temperature: float = 1.0  # of the continuations; these four are the same for all runs
    top_k: int = 0  # of the continuations: draw from the k likeliest tokens; 0: from all
    # the report colours the beginning of this document of the split by uncertainty
    document: int = 0
    # folder of tables, pictures, report.html; default: report_<split> beside the first run; none
    report: str = ""
    device: str = "auto"  # cpu | cuda | cuda:1 | mps | auto
    dtype: str = "float32"  # float32 | bfloat16 | float16 | auto

    def __post_init__(self):
        check_ranges(self, {"batch_size": (1, MANY), "limit": (0, MANY), "n_samples": (-1, 10**6)})
        check_ranges(
            self, {"std_tolerance": (0.0, 1e6), "stride": (0, MANY), "continuations": (0, 10**6)}
        )
        check_ranges(
            self, {"prompt_tokens": (1, 10**6), "max_new_tokens": (1, 10**6), "top_k": (0, MANY)}
        )
        check_ranges(self, {"temperature": (0.0, 1e6), "document": (0, MANY)})
        if self.report and Path(self.report).is_file():
            raise UserError(f"report = {self.report!r} is a file; name a folder")
        if self.mc_dropout and self.n_samples < 1:
            raise UserError("mc_dropout averages passes: give --n_samples=16, say")
        if self.mc_dropout and self.continuations:
            raise UserError(
                "continuations are written without dropout; leave --mc_dropout or --continuations out"
            )
        if self.std_tolerance and self.n_samples == 0:
            raise UserError(
                "std_tolerance needs predictions that see the width: give --n_samples=16, say, or -1"
            )


def main() -> None:
    config, _ = load_config(EvaluateConfig, sys.argv[1:])
    sources = list(
        dict.fromkeys(source.rstrip("/") for source in config.out_dir.split(",") if source)
    )
    if not sources:
        raise UserError("which runs? --out_dir=RUN or --out_dir=RUN,RUN")
    for member in (
        member for source in sources for member in members_of(source)
    ):  # before an hour goes into others
        if member not in HUB and not Path(member).exists():
            raise UserError(
                f"{member} does not exist; give run folders, or one of: {', '.join(HUB)}"
            )
    files = {}
    for source in sources:
        if (other := files.setdefault(result_file(source, config).resolve(), source)) != source:
            said = f"{other} and {source} would both be written to {result_file(source, config)}"
            raise UserError(f"{said}; name each run once, and begin each ensemble with another run")
    with distributed.init(config.device, "auto") as processes:
        # start() allows it, for training; float32 here is float32
        torch.backends.cuda.matmul.allow_tf32 = False
        for source in sources:
            Evaluation(
                source, config, processes
            )  # refuses what is wrong before hours go into the runs before it
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
            write_json(
                result_file(source, config), row | ({"scaled": rows[scaled]} if scaled else {})
            )
    if processes.is_main:
        report(config, sources, rows, tallies, texts)


def report(
    config: EvaluateConfig, sources: list[str], rows: dict, tallies: dict, texts: dict
) -> None:
    """The comparison on the screen and in a folder. rows, tallies: by the names of the runs; texts: of each document,
    its tokens as each run reads them."""
    tables = table.tables(rows, tallies)
    first = next(iter(rows.values()))
    units = {"stretch": "stretches"}.get(first["unit"], first["unit"] + "s")
    of_what = "{dataset}, {split} split, {n_tokens:,} tokens in {n_units:,} {units}".format(
        **first, units=units
    )
    parts = [f"{t.title}\n{table.as_text(t.header, t.lines)}" for t in tables]
    print("\n\n".join([of_what, *parts]))
    if config.report == "none":
        return
    folder = report_folder(sources, config)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"{t.title}\n\n{table.as_markdown(t.header, t.lines)}" for t in tables]
    markdown = "\n\n".join([of_what, *parts]) + "\n"
    for name, text in (("tables.md", markdown), ("tables.csv", table.as_csv(rows, tallies))):
        atomic_write(
            folder / name, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8")
        )
    runs = {
        name: source
        for source, name in short_names(sources).items()
        if len(members_of(source)) == 1
    }
    curves = {
        name: read_records(folder_of(source) / "metrics.jsonl") for name, source in runs.items()
    }
    same = table.comparable(rows)  # else pictures would compare what the tables do not
    pairs = dict.fromkeys(
        "{block_size} tokens, {stride} apart".format(**row) for row in rows.values()
    )
    settings = f"n_samples = {config.n_samples}, windows of {' or '.join(pairs)}"
    documents = [Document(title, tokens) for title, tokens in texts.items()]
    write_report(
        folder, of_what, settings, tables, rows if same else {}, curves if same else {}, documents
    )
    print(f"report: {os.path.relpath(folder / 'report.html')}")


def report_folder(sources: list[str], config: EvaluateConfig) -> Path:
    """The one named; else in the folder of a run, of several runs beside the first."""
    home = result_file(sources[0], config).parent
    return Path(
        config.report or (home if len(sources) == 1 else home.parent) / f"report_{config.split}"
    )


def short_names(sources: Iterable[str]) -> dict[str, str]:
    """source -> the last part of its path, or all of it where two share that part."""
    last = {
        source: "+".join(Path(member).name or member for member in members_of(source))
        for source in sources
    }
    return {
        source: name if list(last.values()).count(name) == 1 else source
        for source, name in last.items()
    }


if __name__ == "__main__":
    run_main(main)
