"""The study: what do smoothed, Bayesian and sigmoid heads gain, and what do they cost?

    make study WIKITEXT=FOLDER SOTU=FILE JOBS=2       # prepares the data, then: python -m study

It trains variants (config/rows/) at scales (config/). All variants of a scale have equal tokens,
batches and seeds. study/variants.py lists them; training_logs/README.md has the method and the
results. A tuned variant gets the same number of full-length trials as all others: learning rates,
then, in most studies, another value of one option at the best rate. The validation split decides.
training_logs/<study>/tuning.jsonl lists all trials; one that diverges has an infinite nll. The best
trial is the run of the first seed. Each run leaves its records in
training_logs/<study>/<variant>-seed<k>/; weights stay in out/study.

After a kill, the same command resumes. It does not repeat a run in training_logs/ or a trial in
tuning.jsonl: after a change of config files delete these, and the weights in out/study.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engine.base.errors import Diverged, UserError, run_main
from engine.base.files import new_folder, read_json, read_json_lines, write_text
from engine.base.options import PositiveInt, load_config
from study.logs import DISTILLED
from study.variants import AVERAGED, KNOBS, SEEDS, STUDIES

ROOT = Path(__file__).resolve().parents[1]
ENSEMBLE = f"eval_test_ensemble_of_{len(SEEDS)}.json"
AVERAGE = "eval_test_averaged.json"
# the files of a run in training_logs/
RECORDS = ("metrics.jsonl", "config.json", "eval_val.json", "eval_test.json", AVERAGE)


@dataclass(frozen=True)
class StudyConfig:
    # in this order
    studies: str = (
        "wikitext2_8k,wikitext2_8k_tenth,sotu_8k,wikitext2,wikitext2_8k_muon,foreign_8k,"
        "foreign_8k_tenth"
    )
    # runs at the same time, each with its share of the processors
    jobs: PositiveInt = 1


class Scripts:
    """Runs scripts in several threads.

    After an error or an interrupt it ends the running scripts, which save a checkpoint, and starts
    no more.
    """

    def __init__(self, n_threads: int):
        self.n_threads = n_threads
        self.lock = threading.Lock()
        self.stopped = False
        self.started: list[subprocess.Popen] = []
        n_processors = max(1, (os.cpu_count() or 1) // n_threads)
        self.environment = os.environ | {"OMP_NUM_THREADS": str(n_processors)}

    def run(self, log: Path, *arguments: str) -> None:
        """Run a script and append its output to a file."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out, self.lock:
            if self.stopped:
                raise UserError("another script failed")
            print("python", *arguments, flush=True)
            command = [sys.executable, *arguments]
            script = subprocess.Popen(
                command, env=self.environment, stdout=out, stderr=subprocess.STDOUT
            )
            self.started.append(script)
        code = script.wait()
        if code:
            error = Diverged if code == Diverged.exit_code else UserError
            last_line = log.read_text(errors="replace").strip().rpartition("\n")[2]
            raise error(f"{arguments[0]} ended with exit code {code}, see {log}: {last_line}")

    def together(self, jobs: Iterable[Callable[[], None]]) -> None:
        """Call the jobs, which run scripts, in several threads."""
        with ThreadPoolExecutor(self.n_threads) as pool:
            try:
                for future in as_completed([pool.submit(job) for job in jobs]):
                    future.result()
            except BaseException:
                with self.lock:
                    self.stopped = True
                for script in self.started:
                    script.terminate()
                raise


class Runner:
    """Tunes, trains and evaluates the variants of a study."""

    def __init__(self, name: str, scripts: Scripts):
        self.study = STUDIES[name]
        self.scripts = scripts
        self.out = Path("out/study", name)
        self.logs = Path("training_logs", name)

    def run(self, variants: list[str]) -> None:
        distilled = [variant for variant in variants if variant.endswith(DISTILLED)]
        plain = [variant for variant in variants if variant not in distilled]
        self.scripts.together([partial(self.finish, variant) for variant in plain])
        ensemble = self.kept("softmax", SEEDS[0]) / ENSEMBLE
        if self.study.ensemble and "softmax" in plain and not ensemble.is_file():
            self.scripts.together([partial(self.evaluate_ensemble, ensemble)])
        if not all(self.is_kept(variant) for variant in distilled):
            self.scripts.together([self.make_labels])
            self.scripts.together([partial(self.finish, variant) for variant in distilled])

    def kept(self, variant: str, seed: int) -> Path:
        """The folder with the records of a run."""
        return self.logs / f"{variant}-seed{seed}"

    def is_kept(self, variant: str) -> bool:
        seeds = self.study.seeds(variant)
        return all(self.kept(variant, seed).is_dir() for seed in seeds)

    def finish(self, variant: str) -> None:
        """Tune a variant, train and evaluate it with each seed, and keep the records."""
        plain = variant.removesuffix(DISTILLED)
        flags = [f"--ood_dataset={self.study.ood}", f"--limit={self.study.limit}"]
        if self.study.fitted:
            better, of_better = self.study.better
            folder = Runner(better, self.scripts).train("softmax", SEEDS[0], of_better)
            flags.append(f"--better={folder}")
        for seed in self.study.seeds(variant):
            if self.kept(variant, seed).is_dir():
                continue
            labels = [] if variant == plain else ["--labels=study"]
            folder = self.train(plain, seed, [*self.tune(plain), *labels])
            folders = {variant: folder}
            if variant in self.study.fitted:
                folders = {f"{variant}_kron": self.fit(variant, seed, folder)} | folders
            elif plain in AVERAGED and not (folder / AVERAGE).is_file():
                self.evaluate(folder, "test", *flags, *AVERAGED[plain])
                (folder / "eval_test.json").rename(folder / AVERAGE)
            for name, folder in folders.items():
                if not self.study.fitted:
                    self.evaluate(folder, "val")
                self.evaluate(folder, "test", *flags)
                with new_folder(self.kept(name, seed)) as new:
                    for path in folder.iterdir():
                        if path.name in RECORDS:
                            shutil.copy(path, new)

    def fit(self, variant: str, seed: int, trained: Path) -> Path:
        """Fit a kron posterior to a run; returns the folder of the Bayesian run."""
        folder = self.out / f"{variant}_kron-seed{seed}"
        script = "train_bayes_sigmoid.py" if "sigmoid" in variant else "train_bayes.py"
        options = ["--max_iters=0", "--posterior=kron", "--kl_weight=0.03"]
        where = [f"--out_dir={folder}", f"--init_from={trained}"]
        if not (folder / "percentiles.json").is_file():
            self.scripts.run(folder / "train.log", script, *options, *where)
        return folder

    def train(self, variant: str, seed: int, flags: list[str]) -> Path:
        """Train or resume a run unless it is complete; returns its folder."""
        changes = [flag.lstrip("-") for flag in flags]
        name = "_".join([variant, *changes])
        folder = self.out / f"{name}-seed{seed}"
        files = [f"config/{self.study.scale}.py", f"config/rows/{variant}.py"]
        options = [f"--seed={seed}", *self.study.options, *flags]
        where = [f"--out_dir={folder}", "--init_from=auto"]
        self.scripts.run(folder / "train.log", "train.py", *files, *options, *where)
        return folder

    def evaluate(self, folder: Path, split: str, *flags: str) -> dict:
        """The numbers of a split; evaluates it if they are missing."""
        path = folder / f"eval_{split}.json"
        if not path.is_file():
            where = [f"--out_dir={folder}", f"--split={split}", "--report=none"]
            self.scripts.run(folder / "evaluate.log", "evaluate.py", *where, *flags)
        return read_json(path)

    def tune(self, variant: str) -> list[str]:
        """The flags with the lowest nll on the validation split."""
        study = self.study
        if study.tuned_as:
            return Runner(study.tuned_as, self.scripts).tune(variant)
        if not study.rates:
            return []
        trials = [self.trial(variant, [f"--learning_rate={rate}"]) for rate in study.rates]
        if study.knobs:
            flags = best_of(trials)
            knob = KNOBS.get(variant, "weight_decay")
            trials.append(self.trial(variant, [*flags, f"--{knob}={study.knobs[knob]}"]))
        return best_of(trials)

    def trial(self, variant: str, flags: list[str]) -> dict:
        """A trial and its nll on the whole validation split; inf if training diverges."""
        path = self.logs / "tuning.jsonl"
        for trial in read_json_lines(path):
            if (trial["row"], trial["flags"]) == (variant, flags):
                return trial
        try:
            folder = self.train(variant, SEEDS[0], flags)
            nll = self.evaluate(folder, "val")["nll"]
        except Diverged:
            nll = math.inf
        trial = {"row": variant, "flags": flags, "val_nll": nll}
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(trial) + "\n")
        return trial

    def make_labels(self) -> None:
        """Store the teacher's 16 likeliest tokens at each position of the train split."""
        teacher = self.train("softmax", SEEDS[0], self.tune("softmax"))
        flags = [f"--teacher={teacher}", f"--dataset={self.study.dataset}"]
        flags += ["--name=study", "--k=16"]
        self.scripts.run(teacher / "labels.log", "augmentation/teacher_labels.py", *flags)

    def evaluate_ensemble(self, kept: Path) -> None:
        """Evaluate the runs of softmax as an ensemble; kept: the file for its numbers."""
        best = self.tune("softmax")
        folders = [self.train("softmax", seed, best) for seed in SEEDS]
        members = "+".join(map(str, folders))
        flags = [f"--out_dir={members}", "--split=test", "--report=none"]
        flags.append(f"--ood_dataset={self.study.ood}")
        self.scripts.run(folders[0] / "evaluate.log", "evaluate.py", *flags)
        write_text(kept, (folders[0] / ENSEMBLE).read_text())


def best_of(trials: list[dict]) -> list[str]:
    """The flags of the trial with the lowest nll."""
    return min(trials, key=lambda trial: trial["val_nll"])["flags"]


def main() -> None:
    config, _ = load_config(StudyConfig, sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also ends the running scripts
    os.chdir(ROOT)
    studies = config.studies.split(",")
    for study in studies:
        if study not in STUDIES:
            raise UserError(f"studies = {study!r} is not one of: {', '.join(STUDIES)}")
    scripts = Scripts(config.jobs)
    for study in studies:
        Runner(study, scripts).run(STUDIES[study].all_variants())
    print("tables and plots of training_logs/: make results")


if __name__ == "__main__":
    run_main(main)
