"""Tune teacher labels on the validation nll: how many positions, how many ids, how much weight, and the threshold.

python augmentation/sweep.py config/quickstart.py --script=train_sigmoid.py --teacher=out/quickstart/softmax \
    --trials=30 --max_iters=300 --out_dir=out/sweep

Every trial makes a label set and trains on it; train.py's options are passed on to that training. One run without a
teacher gives the nll to beat. The study lies in out_dir, and the same command goes on with it.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from engine.base.errors import UserError, run_main
from engine.base.options import flatten, load_config
from engine.data.labels import paths_of
from engine.data.tokens import TokenFile
from engine.runs.checkpoint import read_weights
from engine.runs.logger import read_records
from train import TrainConfig


@dataclass(frozen=True)
class Options:
    teacher: str = ""  # a run folder or checkpoint file, or gpt2, gpt2-medium ...
    script: str = "train_sigmoid.py"  # what trains on the labels
    trials: int = 20  # in all, those of an interrupted study counted in
    # values of max_perplexity to choose from, separated by commas; 0 keeps all labels
    thresholds: str = "0"
    train: TrainConfig = TrainConfig(out_dir="out/sweep")

    def __post_init__(self):
        if not self.teacher:
            raise UserError("which teacher? --teacher=RUN, or gpt2")
        if self.trials < 1:
            raise UserError(f"trials = {self.trials} must be at least 1")
        if not (ROOT / self.script).is_file():
            raise UserError(
                f"script = {self.script!r} is none of ours; use train.py, train_sigmoid.py ..."
            )
        if self.train.labels:
            raise UserError("the sweep makes its own labels; leave --labels out")


def main() -> None:
    options, given = load_config(Options, sys.argv[1:])
    try:
        import optuna
    except ImportError:
        raise UserError("the sweep needs optuna: pip install optuna") from None
    out_dir, file = Path(options.train.out_dir), TokenFile(options.train.dataset, "train")
    read_weights(
        options.teacher
    )  # what is wrong with the teacher is said before anything is trained
    out_dir.mkdir(parents=True, exist_ok=True)
    passed_on = [
        f"--{n}={v}" for n, v in flatten(options.train).items() if n in given and n != "out_dir"
    ]
    training = [
        options.script,
        *passed_on,
        f"--dataset={options.train.dataset}",
        "--always_save_checkpoint=False",
    ]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=f"sqlite:///{out_dir}/study.db", study_name="labels", load_if_exists=True
    )
    about = {"teacher": options.teacher, "thresholds": options.thresholds, "training": training}
    if study.user_attrs.get("about", about) != about:
        raise UserError(f"{out_dir} holds a sweep with other options; give another --out_dir")
    study.set_user_attr("about", about)
    study.sampler = optuna.samplers.TPESampler(seed=options.train.seed + len(study.trials))
    print(
        f"without a teacher: val nll {final_nll(training, out_dir / 'no_teacher'):.4f}", flush=True
    )

    def forget_labels() -> None:
        for path in paths_of(file, "sweep"):
            path.unlink(missing_ok=True)

    def objective(trial) -> float:
        settings = {
            "mode": trial.suggest_categorical("mode", ["topk", "sample"]),
            "k": trial.suggest_categorical("k", [1, 2, 4, 8, 16]),
            "share": trial.suggest_float("share", 0.1, 1.0),
            "max_perplexity": trial.suggest_categorical(
                "max_perplexity", options.thresholds.split(",")
            ),
        }
        weight = trial.suggest_float("label_weight", 0.05, 0.95)
        settings |= {"teacher": options.teacher, "dataset": options.train.dataset, "name": "sweep"}
        forget_labels()  # of a trial that was killed
        try:
            call(
                "augmentation/teacher_labels.py",
                *(f"--{n}={v}" for n, v in settings.items()),
                f"--device={device}",
            )
            flags = [*training, "--labels=sweep", f"--label_weight={weight}"]
            return final_nll(flags, out_dir / f"trial_{trial.number}")
        finally:
            forget_labels()

    device, complete = options.train.device, [optuna.trial.TrialState.COMPLETE]
    while (n_done := len(study.get_trials(states=complete))) < options.trials:
        study.optimize(objective, n_trials=1)
        print(
            f"trial {n_done}: val nll {study.trials[-1].value:.4f} | {study.trials[-1].params}",
            flush=True,
        )
    print(f"best: val nll {study.best_value:.4f} | {study.best_params} | study: {out_dir}/study.db")


def final_nll(training: list[str], out_dir: Path) -> float:
    """The validation nll at the end of a training, which is run unless its folder has that already."""
    records = read_records(out_dir / "metrics.jsonl")
    if not (records and "val_nll" in records[-1] and records[-1]["step"]):
        call(*training, f"--out_dir={out_dir}", "--init_from=auto")
        records = read_records(out_dir / "metrics.jsonl")
        for path in out_dir.glob("*.pt"):  # the records are all that a study needs
            path.unlink()
    return records[-1]["val_nll"]


def call(script: str, *flags: str) -> None:
    """Run a script of ours in a process of its own; its error is ours."""
    done = subprocess.run(
        [sys.executable, ROOT / script, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise UserError(f"{script} failed: {lines[-1].removeprefix('error: ')}")


if __name__ == "__main__":
    run_main(main)
