"""Tune teacher labels on the validation nll: positions, ids, weight and threshold.

python augmentation/sweep.py config/quickstart.py --script=train_sigmoid.py \
    --teacher=out/quickstart/softmax --trials=30 --max_iters=300 --out_dir=out/sweep

Every trial makes a label set and trains on it, with the training options given here. One run
without labels gives the nll to beat. The study is kept in out_dir; run the same command again to
continue it.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from engine.base.errors import UserError, run_main
from engine.base.options import check_options, flatten, load_config
from engine.data.labels import paths_of
from engine.data.tokens import TokenFile
from engine.runs.checkpoint import read_checkpoint
from engine.runs.logger import read_records
from train import TrainConfig


@dataclass(frozen=True)
class Options:
    teacher: str = ""  # a run folder or checkpoint file, or gpt2, gpt2-medium ...
    script: str = "train_sigmoid.py"  # what trains on the labels
    trials: Annotated[int, ">= 1"] = 20  # in all, including those of an interrupted study
    # values of max_perplexity to choose from, separated by commas; 0 keeps all labels
    thresholds: str = "0"
    train: TrainConfig = TrainConfig(out_dir="out/sweep")

    def __post_init__(self):
        check_options(self)
        if not self.teacher:
            raise UserError("which teacher? --teacher=RUN, or gpt2")
        if not (ROOT / self.script).is_file():
            raise UserError(f"{self.script} does not exist; use train.py, train_sigmoid.py ...")
        if self.train.labels:
            raise UserError("the sweep makes its own labels; leave --labels out")


def main() -> None:
    options, given = load_config(Options, sys.argv[1:])
    try:
        import optuna
    except ImportError:
        raise UserError("the sweep needs optuna: pip install optuna") from None
    read_checkpoint(options.teacher)  # a bad teacher is refused before anything is trained
    dataset, out_dir = options.train.dataset, Path(options.train.out_dir)
    label_files = paths_of(TokenFile(dataset, "train"), "sweep")
    out_dir.mkdir(parents=True, exist_ok=True)
    training = [options.script, f"--dataset={dataset}", "--always_save_checkpoint=False"]
    for name, value in flatten(options.train).items():
        if name in given - {"dataset", "out_dir"}:
            training.append(f"--{name}={value}")

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=f"sqlite:///{out_dir}/study.db", study_name="labels", load_if_exists=True
    )
    about = {"teacher": options.teacher, "thresholds": options.thresholds, "training": training}
    if study.user_attrs.get("about", about) != about:
        raise UserError(f"{out_dir} holds a sweep with other options; give another --out_dir")
    study.set_user_attr("about", about)
    study.sampler = optuna.samplers.TPESampler(seed=options.train.seed + len(study.trials))
    baseline = final_nll(training, out_dir / "no_teacher")
    print(f"without a teacher: val nll {baseline:.4f}", flush=True)

    def objective(trial) -> float:
        thresholds = options.thresholds.split(",")
        flags = [
            f"--mode={trial.suggest_categorical('mode', ['topk', 'sample'])}",
            f"--k={trial.suggest_categorical('k', [1, 2, 4, 8, 16])}",
            f"--share={trial.suggest_float('share', 0.1, 1.0)}",
            f"--max_perplexity={trial.suggest_categorical('max_perplexity', thresholds)}",
            f"--teacher={options.teacher}",
            f"--dataset={dataset}",
            f"--device={options.train.device}",
        ]
        weight = trial.suggest_float("label_weight", 0.05, 0.95)
        for path in label_files:  # of a trial that was killed
            path.unlink(missing_ok=True)
        call("augmentation/teacher_labels.py", "--name=sweep", *flags)
        labelled = [*training, "--labels=sweep", f"--label_weight={weight}"]
        return final_nll(labelled, out_dir / f"trial_{trial.number}")

    try:
        done = optuna.trial.TrialState.COMPLETE
        while (n_done := len(study.get_trials(states=[done]))) < options.trials:
            study.optimize(objective, n_trials=1)
            last = study.trials[-1]
            print(f"trial {n_done}: val nll {last.value:.4f} | {last.params}", flush=True)
    finally:
        for path in label_files:
            path.unlink(missing_ok=True)
    print(f"best: val nll {study.best_value:.4f} | {study.best_params} | study: {out_dir}/study.db")


def final_nll(training: list[str], out_dir: Path) -> float:
    """The validation nll at the end of a training. It is run unless its folder already has that."""
    records = read_records(out_dir / "metrics.jsonl")
    if not (records and "val_nll" in records[-1] and records[-1]["step"]):
        call(*training, f"--out_dir={out_dir}", "--init_from=auto")
        records = read_records(out_dir / "metrics.jsonl")
        for path in out_dir.glob("*.pt"):  # a study needs the records only
            path.unlink()
    return records[-1]["val_nll"]


def call(script: str, *flags: str) -> None:
    """Run one of our scripts in its own process; if it fails, raise its error."""
    command = [sys.executable, str(ROOT / script), *flags]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise UserError(f"{script} failed: {lines[-1].removeprefix('error: ')}")


if __name__ == "__main__":
    run_main(main)
