"""How good are runs on held-out text, and do they know what they do not know?

    python evaluate.py --out_dir=out/quickstart/softmax,out/quickstart/bayes --split=test
    # out-of-domain text: a data set prepared with --tokenizer=out/quickstart/bayes
    python evaluate.py --out_dir=out/quickstart/bayes --n_samples=16 --ood_dataset=speeches
    # an ensemble of three runs
    python evaluate.py --out_dir=out/a+out/b+out/c

Every score comes from log_probs, the normalised distribution over the next token. The whole split
is read in consecutive blocks of block_size, and each token is predicted once. Each run gets
eval_<split>.json; the comparison gets a folder with a plot and report.html. In the tables,
`unigram` always predicts the token frequencies of the training text. torchrun shares the work
between processes, with the same results.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.base import distributed
from engine.base.errors import UserError, run_main
from engine.base.files import check_writable, write_json
from engine.base.options import load_config
from engine.eval.ensemble import members_of
from engine.eval.evaluator import EvaluationConfig, Evaluator
from engine.eval.report import write_report
from engine.eval.table import Table, as_text, tables
from engine.runs.checkpoint import results_folder
from engine.runs.percentiles import PERCENTILES


@dataclass(frozen=True)
class EvaluateConfig:
    # runs (their newest checkpoint) or checkpoint files, separated by commas; A+B is an ensemble;
    # gpt2* needs --dataset
    out_dir: str = "out"
    evaluation: EvaluationConfig = EvaluationConfig()
    # folder for the runs' scores and the report, if the runs are read-only; default: theirs
    results: str = ""
    # folder for the plot and report.html, or none; default: report_<split> next to the first run
    report: str = ""
    device: str = "auto"  # cpu | cuda | cuda:1 | mps | auto

    @property
    def sources(self) -> list[str]:
        """The runs and ensembles."""
        return [name.rstrip("/") for name in self.out_dir.split(",") if name]

    @property
    def report_folder(self) -> Path:
        """By default in the run's folder, or next to the first of several runs."""
        home = result_file(self.sources[0], self).parent
        folder = home if len(self.sources) == 1 else home.parent
        return Path(self.report or folder / f"report_{self.evaluation.split}")


def main() -> None:
    config, _ = load_config(EvaluateConfig, sys.argv[1:])
    check_outputs(config)
    with distributed.init(config.device, "auto") as processes:
        torch.backends.cuda.matmul.allow_tf32 = False  # init() allows it for training
        # find mistakes in all runs before the first evaluation, which may take hours
        runs = {}
        for name, source in short_names(config.sources).items():
            runs[name] = Evaluator(source, config.evaluation, processes)
        compare(config, runs, processes)


def check_outputs(config: EvaluateConfig) -> None:
    """Check that all results can be written, each to its own file."""
    if not config.sources:
        raise UserError("which runs? give --out_dir=RUN or --out_dir=RUN,RUN")
    files = {}
    for source in config.sources:
        path = result_file(source, config)
        other = files.setdefault(path.resolve(), source)
        if other != source:
            raise UserError(
                f"{other} and {source} would both be written to {path}; "
                "name each run once, and start each ensemble with a different run"
            )
        check_writable(path.parent, "results")
    if config.report != "none":
        check_writable(config.report_folder, "report")


def compare(
    config: EvaluateConfig, runs: dict[str, Evaluator], processes: distributed.Processes
) -> None:
    """Evaluate one run after the other, write their results, and report."""
    rows, scores, texts = {}, {}, {}
    for name, run in runs.items():
        run.model.to(processes.device)
        row, scores[name] = run.scores()
        rows[name] = row
        if processes.is_main:
            path = result_file(run.source, config)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, row)
            is_plain_run = Path(run.source).is_dir() and not run.n_samples
            if is_plain_run and not config.evaluation.dataset and run.usual:
                write_json(path.with_name(PERCENTILES), run.usual)
            if config.report != "none":
                for title, text in run.documents().items():
                    texts.setdefault(title, {})[name] = text
        run.model.to("cpu")
    if processes.is_main:
        report(config, tables(rows, scores), rows, texts)


def report(config: EvaluateConfig, found: list[Table], rows: dict, texts: dict) -> None:
    """Print the comparison and write it to a folder.

    rows: by run name. texts: for each document, its tokens with each run's scores."""
    first, *_ = rows.values()
    title = "{dataset}, {split} split, {n_tokens:,} tokens, {n_units:,} bootstrap units ({unit})"
    title = title.format(**first)
    print(title)
    for table in found:
        print(f"\n{table.title}\n{as_text(table)}")
    if config.report == "none":
        return
    folder = config.report_folder
    settings = f"n_samples = {config.evaluation.n_samples}"
    write_report(folder, title, settings, found, rows, texts)
    print(f"report: {os.path.relpath(folder / 'report.html')}")


def result_file(source: str, config: EvaluateConfig) -> Path:
    """The file for a run's scores: in its folder, in out/gpt2, or with an ensemble's first run.

    With --results, that folder's name in the folder of results."""
    first, *others = members_of(source)
    folder = results_folder(first)
    if config.results:
        folder = Path(config.results, folder.resolve().name)
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
        last_parts = [Path(member).absolute().name for member in members_of(source)]
        names.append("+".join(last_parts))
    if len(set(names)) < len(names):
        names = sources
    return dict(zip(names, sources, strict=True))


if __name__ == "__main__":
    run_main(main)
