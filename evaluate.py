"""How good are runs on held-out text, and do they know what they do not know?

    python evaluate.py --out_dir=out/quickstart/softmax,out/quickstart/bayes --split=test
    python evaluate.py --out_dir=out/quickstart/bayes --n_samples=16 --ood_dataset=shakespeare
    python evaluate.py --out_dir=out/a+out/b+out/c            # an ensemble of three runs

Every number comes from log_probs, the normalised distribution over the next token, over the whole
split: consecutive blocks of block_size, each token predicted once. Each run gets
eval_<split>.json, the comparison a folder with tables, plots and report.html. `unigram` is what the
training text's token frequencies alone reach. With --std_tolerance=0.01 --n_samples=16 a Bayesian
run has a second row: its posterior widened until that costs 0.01 nats on the validation split.
torchrun shares the work between processes; the results are the same.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.base import distributed
from engine.base.errors import UserError, run_main
from engine.base.files import atomic_write, check_writable, write_json
from engine.base.options import load_config
from engine.eval import table
from engine.eval.ensemble import members_of
from engine.eval.evaluator import EvaluationConfig, Evaluator
from engine.eval.report import write_report
from engine.gpt2.loading import HUB
from engine.runs.checkpoint import folder_of
from engine.runs.logger import read_records


@dataclass(frozen=True)
class EvaluateConfig:
    # runs (the newest checkpoint) or checkpoint files, with commas; gpt2* with --dataset; A+B
    out_dir: str = "out"
    evaluation: EvaluationConfig = EvaluationConfig()
    # folder of tables, plots, report.html; default: report_<split> beside the first run; none
    report: str = ""
    device: str = "auto"  # cpu | cuda | cuda:1 | mps | auto

    @property
    def sources(self) -> list[str]:
        """The runs and ensembles, without repetitions."""
        return list(dict.fromkeys(name.rstrip("/") for name in self.out_dir.split(",") if name))

    @property
    def report_folder(self) -> Path:
        """By default in the folder of a run, or beside the first of several."""
        home = result_file(self.sources[0], self).parent
        folder = home if len(self.sources) == 1 else home.parent
        return Path(self.report or folder / f"report_{self.evaluation.split}")


def main() -> None:
    config, _ = load_config(EvaluateConfig, sys.argv[1:])
    check_outputs(config)
    names = short_names(config.sources)
    with distributed.init(config.device, "auto") as processes:
        torch.backends.cuda.matmul.allow_tf32 = False  # init() allows it for training
        # all are loaded, and refused if something is wrong, before hours go into the first
        runs = {
            name: Evaluator(source, config.evaluation, processes) for name, source in names.items()
        }
        refuse_useless(config.evaluation, list(runs.values()))
        compare(config, runs, processes)


def refuse_useless(config: EvaluationConfig, runs: list[Evaluator]) -> None:
    """Refuse options that would change nothing."""
    if config.mc_dropout and not any(run.mc_dropout for run in runs):
        raise UserError("no run was trained with dropout; leave --mc_dropout out")
    if config.std_tolerance and not any(run.model.bayes_layers() for run in runs):
        raise UserError("no run has a posterior to widen; leave --std_tolerance out")


def check_outputs(config: EvaluateConfig) -> None:
    """Check that all results can be written, each to a file of its own."""
    if not config.sources:
        raise UserError("which runs? --out_dir=RUN or --out_dir=RUN,RUN")
    files = {}
    for source in config.sources:
        path = result_file(source, config)
        other = files.setdefault(path.resolve(), source)
        if other != source:
            raise UserError(
                f"{other} and {source} would both be written to {path}; "
                "name each run once, and begin each ensemble with another run"
            )
        check_writable(path.parent)
    if config.report != "none":
        check_writable(config.report_folder)


def compare(
    config: EvaluateConfig, runs: dict[str, Evaluator], processes: distributed.Processes
) -> None:
    """Evaluate run by run, write the results of each, and report."""
    rows, scores, texts = {}, {}, {}
    for name, run in runs.items():
        run.model.to(processes.device)
        row, scores[name] = run.scores()
        rows[name] = row
        path = result_file(run.source, config)
        if processes.is_main and config.report != "none":
            for title, reading in run.documents().items():
                texts.setdefault(title, {})[name] = reading
        if processes.is_main and config.evaluation.continuations:
            row["continuations"], records = run.continuations()
            write_lines(path.with_name(f"continuations_{path.name[5:]}l"), records)
        written = dict(row)
        if config.evaluation.std_tolerance and run.model.bayes_layers():
            factor = run.widen()
            wide = f"{name} (std x {factor:.2f})"
            rows[wide], scores[wide] = run.scores()
            rows[wide] |= {"std_factor": factor, "std_tolerance": config.evaluation.std_tolerance}
            written["scaled"] = rows[wide]
        run.model.to("cpu")
        if processes.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, written)
    if processes.is_main:
        report(config, runs, rows, scores, texts)


def write_lines(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    atomic_write(path, lambda temporary: temporary.write_text(lines))


def report(config: EvaluateConfig, runs: dict, rows: dict, scores: dict, texts: dict) -> None:
    """Print the comparison, and write it to a folder. rows, scores: by name of the run; texts: for
    each document its tokens as each run reads them."""
    tables = table.tables(rows, scores)
    first = next(iter(rows.values()))
    title = "{dataset}, {split} split, {n_tokens:,} tokens, {n_units:,} bootstrap units ({unit})"
    title = title.format(**first)
    parts = [f"{t.title}\n{table.as_text(t.header, t.lines)}" for t in tables]
    print("\n\n".join([title, *parts]))
    if config.report == "none":
        return
    folder = config.report_folder
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"{t.title}\n\n{table.as_markdown(t.header, t.lines)}" for t in tables]
    markdown = "\n\n".join([title, *parts]) + "\n"
    for name, text in (("tables.md", markdown), ("tables.csv", table.as_csv(rows, scores))):
        (folder / name).write_text(text, encoding="utf-8")
    curves = {
        name: read_records(folder_of(run.source) / "metrics.jsonl")
        for name, run in runs.items()
        if len(run.members) == 1
    }
    if not table.comparable(rows):  # plots would compare what the tables do not
        rows, curves = {}, {}
    blocks = dict.fromkeys(f"{run.block_size} tokens, {run.stride} apart" for run in runs.values())
    settings = f"n_samples = {config.evaluation.n_samples}, windows of {' or '.join(blocks)}"
    write_report(folder, title, settings, tables, rows, curves, texts)
    print(f"report: {os.path.relpath(folder / 'report.html')}")


def result_file(source: str, config: EvaluateConfig) -> Path:
    """Where the numbers of a run go: its folder, out/gpt2, or that of an ensemble's first run."""
    first, *others = members_of(source)
    folder = Path("out", first) if first in HUB else folder_of(first)
    name = f"eval_{config.evaluation.split}"
    if Path(first).is_file():
        name += f"_{Path(first).stem}"
    if others:
        name += f"_ensemble_of_{1 + len(others)}"
    return folder / f"{name}.json"


def short_names(sources: list[str]) -> dict[str, str]:
    """name -> source: the last part of each path, or all of it if two share that part."""
    names = []
    for source in sources:
        names.append("+".join(Path(member).name or member for member in members_of(source)))
    if len(set(names)) < len(names):
        names = sources
    return dict(zip(names, sources, strict=True))


if __name__ == "__main__":
    run_main(main)
