"""The study: what do smoothed, Bayesian and sigmoid heads buy, and what do they cost? (training_logs/README.md)

    # or: python -m study --wikitext=FOLDER --sotu=FILE --jobs=2
    make study WIKITEXT=FOLDER SOTU=FILE

Rows (config/rows/) on scales (config/), equal tokens, batches and seeds for all rows of a scale; study/variants.py says
which. Where rows are tuned each gets as many trials of full length, whatever its head: learning rates, then another
value of its knob at the best one; the validation split decides, and all trials are listed in
<logs>/<study>/tuning.jsonl, one that diverges as infinitely bad. The best trial is the row's run of the first seed.
Each run leaves its records in <logs>/<study>/<row>-seed<k>/; weights stay in out/study. Killed, the same command goes
on; what has its records is not run again.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from engine.base.errors import Diverged, UserError, run_main
from engine.base.files import atomic_write, check_writable, read_json
from engine.base.options import check_options, flatten, load_config
from study.logs import read_trials
from study.variants import AVERAGED, KNOBS, NEEDS, OTHER_VALUES, SEEDS, STUDIES, preparation
from train import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
ENSEMBLE = f"eval_test_ensemble_of_{len(SEEDS)}.json"
LAST = "eval_test.json"  # copied last: by it a run is done
CHANGES_NOTHING = {
    "out_dir",
    "compile",
    "eval_interval",
    "eval_iters",
    "log_interval",
}  # of a run's results


@dataclass(frozen=True)
class StudyConfig:
    studies: str = "wikitext2_8k,wikitext2_8k_tenth,sotu_8k,wikitext2"  # which, in this order
    # only these, commas between: "bayes,sigmoid_taught", or a file of your own in config/rows
    rows: str = ""
    # a folder with wiki.train.raw, wiki.valid.raw, wiki.test.raw of WikiText-2; empty: the hub
    wikitext: str = ""
    sotu: str = ""  # a file with the State of the Union addresses, a blank line between them
    logs: str = "training_logs"  # where the records go
    # to try it out, in out/tried (delete that first): "--max_iters=20 --compile=False"
    train_flags: str = ""
    # runs at a time, each with its share of the processors
    jobs: Annotated[int, ">= 1", "<= 64"] = 1

    def __post_init__(self):
        check_options(self)


class Runner:
    """Commands, one after the other in each of several threads; once one has failed, none begins."""

    def __init__(self, config: StudyConfig):
        self.config, self.lock = config, threading.Lock()
        tried = (
            config.train_flags and (ROOT / config.logs).resolve() == ROOT / StudyConfig.logs
        )  # is no result
        self.home = Path("out/tried" if config.train_flags else "out/study")
        self.logs = ROOT / (self.home / "logs" if tried else config.logs)
        self.failed: BaseException | None = None
        self.children: set[subprocess.Popen] = set()
        threads = max(1, (os.cpu_count() or 1) // config.jobs)
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TERM": "dumb"}

    def python(self, *arguments: str, log: Path) -> None:
        """Run a script of ours, unless one has failed; what it says goes to a file."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a+") as out, self.lock:
            if self.failed:
                raise self.failed
            print("python", *arguments, flush=True)
            begin, streams = out.seek(0, os.SEEK_END), {"stdout": out, "stderr": subprocess.STDOUT}
            child = subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, env=self.environment, **streams
            )
            self.children.add(child)
        code = child.wait()
        with self.lock:
            self.children.discard(child)
            if code and not self.failed:
                last = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()[-1:]
                said = f"python {' '.join(arguments)}: exit code {code} {' '.join(last)}"
                if code == Diverged.exit_code:
                    raise Diverged(said)  # a trial may
                self.failed = UserError(said)
        if code:
            raise self.failed

    def together(self, jobs: list[Callable[[], None]]) -> None:
        """Several at a time. Interrupted, it ends what runs, which saves a checkpoint, and begins nothing more."""
        with ThreadPoolExecutor(self.config.jobs) as pool:
            try:
                for future in [pool.submit(job) for job in jobs]:
                    future.result()
            except BaseException as error:
                with self.lock:
                    self.failed = self.failed or error
                    for child in self.children if not isinstance(error, UserError) else ():
                        child.terminate()
                raise

    def prepare(self, names: Iterable[str]) -> None:
        """The data sets of these names that are not there."""
        missing = [name for name in names if not (ROOT / "data" / name / "meta.json").is_file()]
        if (
            any(name.startswith("sotu") for name in missing)
            and not (ROOT / self.config.sotu).is_file()
        ):
            said = f"--sotu={self.config.sotu or 'FILE'}: give the file of the State of the Union addresses"
            raise UserError(f"{said}; training_logs/README.md says where from")
        for name in missing:
            self.python(
                *preparation(name, self.config.wikitext, self.config.sotu),
                log=ROOT / self.home / "prepare.log",
            )

    def train(self, study: str, row: str, seed: int, flags: list[str]) -> Path:
        """Returns the run's folder, at once where it has been trained."""
        folder = (
            self.home
            / study
            / f"{'_'.join([row, *(flag.lstrip('-') for flag in flags)])}-seed{seed}"
        )
        if other := self.changed(ROOT / folder, study, row, flags):
            raise UserError(
                f"{folder} was trained with another {', '.join(other)}; delete it, or take back the change"
            )
        flags = [*flags, *self.config.train_flags.split()]
        command = [
            "train.py",
            f"config/{STUDIES[study].scale}.py",
            f"config/rows/{row}.py",
            f"--seed={seed}",
        ]
        self.python(
            *command,
            *flags,
            f"--out_dir={folder}",
            "--init_from=auto",
            log=ROOT / folder / "train.log",
        )
        return folder

    def evaluate(self, folder: Path, split: str, *flags: str, keep_as: str = "") -> dict:
        """The numbers of a split; keep_as: under another name, so that those without flags keep theirs. What is there
        is taken if it is younger than the weights."""
        path, written = (ROOT / folder / f"eval_{split}{end}.json" for end in (keep_as, ""))
        weights = max((file.stat().st_mtime for file in (ROOT / folder).glob("*.pt")), default=0.0)
        if not path.is_file() or path.stat().st_mtime < weights:
            command = [
                "evaluate.py",
                f"--out_dir={folder}",
                f"--split={split}",
                "--report=none",
                *flags,
            ]
            self.python(*command, log=ROOT / folder / "evaluate.log")
            written.rename(path)
        return read_json(path)

    def keep(self, folder: Path, study: str, name: str) -> None:
        """Copy a finished run's records to the logs."""
        home, folder = self.logs / study / name, ROOT / folder
        home.mkdir(parents=True, exist_ok=True)
        numbers = [path for path in folder.glob("eval_*.json") if path.name != ENSEMBLE]
        numbers.sort(key=lambda path: path.name == LAST)
        for path in [folder / "metrics.jsonl", folder / "config.json", *numbers]:
            atomic_write(
                home / path.name, lambda temporary, path=path: shutil.copyfile(path, temporary)
            )

    def finish(self, study: str, row: str, name: str, folder: Path) -> None:
        """All numbers of a trained run, and its records into the logs."""
        foreign = f"--ood_dataset={STUDIES[study].foreign}"
        if averaged := AVERAGED.get(row.removesuffix("_taught")):
            self.evaluate(folder, "test", foreign, *averaged, keep_as="_averaged")
        self.evaluate(folder, "val")
        texts = ["--continuations=100"] if name.endswith(f"seed{SEEDS[0]}") else []
        self.evaluate(folder, "test", foreign, *texts)
        self.keep(folder, study, name)

    def done(self, study: str, row: str, seed: int) -> bool:
        """Whether a run has all its records, with the options that its files now say and the trials have chosen."""
        owed = ["config.json", "eval_val.json", LAST]
        owed += ["eval_test_averaged.json"] * (row.removesuffix("_taught") in AVERAGED)
        home = self.logs / study / f"{row}-seed{seed}"
        if not all((home / name).is_file() for name in owed):
            return False
        return not self.changed(home, study, row, self.flags(study, row))

    def changed(self, home: Path, study: str, row: str, flags: list[str]) -> list[str]:
        """The options that a run in this folder, if one is there, has otherwise."""
        if not (path := home / "config.json").is_file():
            return []
        kept = read_json(path)
        return [
            name
            for name, value in self.options(study, row, flags).items()
            if kept.get(name) != value
        ]

    def options(self, study: str, row: str, flags: list[str]) -> dict:
        """What the files and flags set for a run, and what rows are tuned by."""
        files = (
            ROOT / f"config/{name}.py"
            for name in (STUDIES[study].scale, f"rows/{row.removesuffix('_taught')}")
        )
        config, given = load_config(
            TrainConfig, [*map(str, files), *flags, *self.config.train_flags.split()]
        )
        names = {"learning_rate", *OTHER_VALUES, *given} - CHANGES_NOTHING
        return {name: value for name, value in flatten(config).items() if name in names}

    def row(self, study: str, row: str) -> None:
        """Tune a row, and train it with its seeds."""
        for seed in STUDIES[study].seeds(row):
            if not self.done(study, row, seed):
                folder = self.run(study, row, seed)
                if (
                    row == "softmax"
                ):  # an ensemble with the run that was there before is none of these
                    self.ensemble_of(study).unlink(missing_ok=True)
                self.finish(study, row, f"{row}-seed{seed}", folder)

    def run(self, study: str, row: str, seed: int) -> Path:
        """A tuned row trained with a seed: its folder. The best trial is the first seed's run."""
        return self.train(study, row.removesuffix("_taught"), seed, self.flags(study, row))

    def flags(self, study: str, row: str) -> list[str]:
        """Of a tuned row; a taught one has a teacher's labels too, half and half with the true token."""
        plain = row.removesuffix("_taught")
        return [*self.tune(study, plain), *["--labels=study"] * (row != plain)]

    def tune(self, study: str, row: str) -> list[str]:
        """The flags that the validation split prefers."""
        about = STUDIES[study]
        if not about.rates:
            return self.tune(about.tuned_as, row) if about.tuned_as else []
        trials = [self.trial(study, row, [f"--learning_rate={rate}"]) for rate in about.rates]
        knob = KNOBS.get(row, "weight_decay")
        best = min(trials, key=lambda trial: trial["val_nll"])
        trials += [self.trial(study, row, [*best["flags"], f"--{knob}={about.knobs[knob]}"])]
        return min(trials, key=lambda trial: trial["val_nll"])["flags"]

    def trial(self, study: str, row: str, flags: list[str]) -> dict:
        """Its val_nll, of the whole split at the end, infinite where training diverges; from tuning.jsonl if it is
        there with these options."""
        path, options = self.logs / study / "tuning.jsonl", self.options(study, row, flags)
        for trial in read_trials(path):
            if (trial["row"], trial["flags"], trial.get("options")) == (row, flags, options):
                return trial
        try:
            nll = self.evaluate(self.train(study, row, SEEDS[0], flags), "val")["nll"]
        except Diverged:
            nll = math.inf
        found = {"row": row, "flags": flags, "val_nll": nll, "options": options}
        with self.lock:
            others = [
                trial
                for trial in read_trials(path)
                if (trial["row"], trial["flags"]) != (row, flags)
            ]
            lines = [*others, found]
            path.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(line) + "\n" for line in lines)
            atomic_write(path, lambda temporary: temporary.write_text(text))
        return found

    def label(self, study: str) -> None:
        """The teacher's labels: its 16 likeliest tokens at each position of the train split."""
        teacher = self.run(study, "softmax", SEEDS[0])
        command = [
            f"--teacher={teacher}",
            f"--dataset={STUDIES[study].dataset(ROOT)}",
            "--name=study",
            "--k=16",
        ]
        self.python("augmentation/teacher_labels.py", *command, log=ROOT / teacher / "labels.log")

    def ensemble_of(self, study: str) -> Path:
        return self.logs / study / f"softmax-seed{SEEDS[0]}" / ENSEMBLE

    def ensemble(self, study: str) -> None:
        """The softmax runs together, beside the first one's records."""
        kept = self.ensemble_of(study)
        if not kept.is_file():
            folders = [self.run(study, "softmax", seed) for seed in SEEDS]
            command = [
                "evaluate.py",
                "--out_dir=" + "+".join(map(str, folders)),
                "--split=test",
                "--report=none",
            ]
            self.python(
                *command,
                f"--ood_dataset={STUDIES[study].foreign}",
                log=ROOT / folders[0] / "evaluate.log",
            )
            atomic_write(
                kept, lambda temporary: shutil.copyfile(ROOT / folders[0] / ENSEMBLE, temporary)
            )


def main() -> None:
    config, _ = load_config(StudyConfig, sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that whatever runs is ended, too
    runner, studies = Runner(config), config.studies.split(",")
    check_names("studies", studies, STUDIES)
    own = {path.stem: path for path in sorted((ROOT / "config/rows").glob("*.py"))}
    known = dict.fromkeys([*(row for study in studies for row in STUDIES[study].all_rows()), *own])
    wanted = config.rows.split(",") if config.rows else []
    check_names("rows", wanted, known)
    check_writable(runner.logs)
    about = [
        STUDIES[name] for study in studies for name in (study, STUDIES[study].tuned_as) if name
    ]
    data = [name for study in about for name in (study.dataset(ROOT), study.foreign)]
    data = dict.fromkeys(part for name in data for part in (NEEDS.get(name, name), name))
    runner.together([partial(runner.prepare, data)])
    for study in studies:
        rows = STUDIES[study].all_rows()
        rows = [row for row in dict.fromkeys([*rows, *own]) if row in wanted] if wanted else rows
        runner.together(
            [partial(runner.row, study, row) for row in rows if not row.endswith("_taught")]
        )
        if STUDIES[study].ensemble and "softmax" in rows:
            runner.together([partial(runner.ensemble, study)])
        taught = [row for row in rows if row.endswith("_taught")]
        runner.together(
            [partial(runner.tune, study, row.removesuffix("_taught")) for row in taught]
        )
        if any(
            not runner.done(study, row, seed)
            for row in taught
            for seed in STUDIES[study].seeds(row)
        ):
            runner.together([partial(runner.label, study)])
            runner.together([partial(runner.row, study, row) for row in taught])
    print(f"all records are in {runner.logs}; tables and pictures of training_logs/: make results")


def check_names(option: str, given: Iterable[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise UserError(f"{option} = {name!r} is not one of: {', '.join(known)}")


if __name__ == "__main__":
    run_main(main)
