"""The study: what do smoothed, Bayesian and sigmoid heads buy, and what do they cost? (training_logs/README.md)

    make study WIKITEXT=FOLDER SOTU=FILE      # or: python study.py --wikitext=FOLDER --sotu=FILE --jobs=2

Rows (config/rows) on scales (config/), equal tokens, batches and seeds for all rows of a scale. Where rows are tuned
each gets three trials of full length, whatever its head: two learning rates, then another value of its knob at the
better one; the validation split decides, and all trials are listed in <logs>/<study>/tuning.jsonl. The best trial is
the row's run of the first seed. Each run leaves its records in <logs>/<study>/<row>-seed<k>/; weights stay in
out/study. Killed, the same command goes on; what has its records is not run again.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from engine.config import load_config
from engine.errors import UserError, check_ranges, run
from engine.files import replace

ROOT = Path(__file__).resolve().parent
MAIN = ("softmax", "smooth", "bayes", "sigmoid", "bayes_sigmoid_weighted")
PAPER = ("softmax", "smooth_05", "smooth", "bayes", "sigmoid", "sigmoid_regularised", "sigmoid_weighted", MAIN[-1])
SIGMOIDS = ("sigmoid", "sigmoid_regularised", "sigmoid_weighted", "bayes_sigmoid_weighted")
SEEDS = (1337, 1338, 1339)
TEACHER = "softmax-seed1337"
KNOBS = {  # what the third trial changes
    "bayes": "kl_weight",
    "bayes_sigmoid_weighted": "kl_weight",
    "sigmoid_regularised": "sum_penalty",
    "sigmoid_weighted": "pos_weight",
    "dropout": "dropout",
}
AVERAGED = dict.fromkeys(("bayes", "bayes_sigmoid_weighted"), ["--n_samples=-1"])  # all of the posterior, not its mean
AVERAGED["dropout"] = ["--mc_dropout=True", "--n_samples=8"]
MEMBERS = (*SEEDS, 1340)  # of the ensemble


@dataclass(frozen=True)
class StudyConfig:
    studies: str = "wikitext2_8k,wikitext2_8k_tenth,sotu_8k,wikitext2"  # which, in this order
    rows: str = ""  # only these, commas between, e.g. "bayes,sigmoid_taught"; empty: all
    wikitext: str = ""  # a folder with wiki.train.raw, wiki.valid.raw, wiki.test.raw of WikiText-2; empty: the hub
    sotu: str = ""  # a file with the State of the Union addresses, a blank line between them
    logs: str = "training_logs"  # where the records go
    train_flags: str = ""  # to try it out, in out/tried: for train.py, spaces between: "--max_iters=20 --compile=False"
    jobs: int = 1  # runs at a time, each with its share of the processors


@dataclass(frozen=True)
class Study:
    """A scale, its rows, and how they are tuned."""

    scale: str  # config/<scale>.py
    foreign: str  # data set of the other kind in the scale's tokens
    rows: tuple[str, ...] = PAPER
    more_seeds: tuple[str, ...] = PAPER  # rows that have SEEDS; the others have the first alone
    rates: tuple[float, ...] = ()  # learning rates to try; none: see tuned_as
    knobs: dict[str, float] = field(default_factory=dict)  # the third trial's value, by knob
    tuned_as: str = ""  # the study whose choice is taken; empty with no rates: what the config files say
    taught: tuple[str, ...] = ()  # rows trained on a teacher's labels too; the teacher is the softmax of this study
    extra: bool = False  # dropout, and a fourth seed of softmax, for an ensemble of four

    @property
    def dataset(self) -> str:
        """What the scale's file names."""
        return runpy.run_path(str(ROOT / "config" / f"{self.scale}.py"))["dataset"]

    @property
    def all_rows(self) -> list[str]:
        return [*self.rows, *["dropout"] * self.extra, *(f"{row}_taught" for row in self.taught)]


KNOB_VALUES = {"kl_weight": 0.03, "sum_penalty": 0.1, "pos_weight": 4.0, "dropout": 0.05, "weight_decay": 0.3}
STUDIES = {
    "wikitext2_8k": Study(
        "train_wikitext2_8k", "sotu_by_wikitext2_8k", PAPER, PAPER, (4e-3, 2e-3), KNOB_VALUES, "", SIGMOIDS, True
    ),
    "wikitext2_8k_tenth": Study(
        "train_wikitext2_8k_tenth",
        "sotu_by_wikitext2_8k",
        rates=(2e-3, 1e-3),
        knobs=KNOB_VALUES | {"kl_weight": 0.3, "dropout": 0.2},
        taught=("sigmoid", "bayes_sigmoid_weighted"),
        extra=True,
    ),
    "sotu_8k": Study("train_sotu_8k", "wikitext2_by_sotu_8k", MAIN, MAIN, tuned_as="wikitext2_8k"),
    "wikitext2": Study("train_gpt2_wikitext2_cpu", "sotu", PAPER, MAIN),
    "wikitext_100m": Study("train_gpt2_wikitext_100m", "sotu", PAPER, MAIN),  # for a GPU
}


class Runner:
    """Commands, one after the other in each of several threads; the first that fails ends them all."""

    def __init__(self, config: StudyConfig):
        self.config, self.lock = config, threading.Lock()
        tried = config.train_flags and config.logs == StudyConfig.logs  # what is tried must not look like a result
        self.home = Path("out/tried" if config.train_flags else "out/study")
        self.logs = ROOT / (self.home / "logs" if tried else config.logs)
        self.failed: UserError | None = None
        threads = max(1, (os.cpu_count() or 1) // config.jobs)
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TERM": "dumb"}

    def python(self, *arguments: str, log: Path) -> None:
        """Run a script of ours, unless one has failed; what it says goes to a file."""
        if self.failed:
            raise self.failed
        print("python", *arguments, flush=True)
        with log.open("a") as out:
            streams = {"stdout": out, "stderr": subprocess.STDOUT}
            code = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=self.environment, **streams).returncode
        if code:
            last = log.read_text().strip().splitlines()[-1:]
            self.failed = UserError(f"python {' '.join(arguments)}: exit code {code} {' '.join(last)}")
            raise self.failed

    def prepare(self, names: Iterable[str]) -> None:
        """The data sets of these names that are not there."""
        missing = [name for name in names if not (ROOT / "data" / name / "meta.json").is_file()]
        if any("sotu" in name.split("_by_")[0] for name in missing) and not (ROOT / self.config.sotu).is_file():
            said = f"--sotu={self.config.sotu or 'FILE'}: give the file of the State of the Union addresses"
            raise UserError(f"{said}; training_logs/README.md says where from")
        for name in missing:
            (log := ROOT / self.home / "prepare.log").parent.mkdir(parents=True, exist_ok=True)
            self.python(*self.preparation(name), log=log)

    def preparation(self, name: str) -> list[str]:
        wikitext = ["data/wikitext/prepare.py", "--version=2", f"--folder=data/{name}"]
        wikitext += [f"--source={self.config.wikitext}"] if self.config.wikitext else []
        sotu = ["data/text/prepare.py", f"--source={self.config.sotu}", r"--separator=\n\n", f"--name={name}"]
        learnt = ["--tokenizer=bpe", "--vocab_size=8192"]
        return {
            "wikitext": ["data/wikitext/prepare.py"],  # WikiText-103, of the hub
            "wikitext2": wikitext,
            "wikitext2_8k": wikitext + learnt,
            "wikitext2_8k_tenth": [*wikitext, "--tokenizer=data/wikitext2_8k", "--train_articles=60"],
            "wikitext2_by_sotu_8k": [*wikitext, "--tokenizer=data/sotu_8k"],
            "sotu": [*sotu, "--tokenizer=gpt2"],
            "sotu_8k": sotu + learnt,
            "sotu_by_wikitext2_8k": [*sotu, "--tokenizer=data/wikitext2_8k"],
        }[name]

    def train(self, study: str, row: str, name: str, seed: int, flags: list[str]) -> Path:
        """Returns the run's folder."""
        folder = self.home / study / name
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        command = ["train.py", f"config/{STUDIES[study].scale}.py", f"config/rows/{row}.py", f"--seed={seed}"]
        flags = [*flags, *self.config.train_flags.split()]
        self.python(*command, *flags, f"--out_dir={folder}", "--init_from=auto", log=ROOT / folder / "train.log")
        return folder

    def evaluate(self, folder: Path, split: str, *flags: str, keep_as: str = "") -> dict:
        """The numbers of a split; keep_as: under another name, so that those without flags keep theirs."""
        path = ROOT / folder / f"eval_{split}{keep_as}.json"
        if not path.is_file():
            command = ["evaluate.py", f"--out_dir={folder}", f"--split={split}", "--report=none", *flags]
            self.python(*command, log=ROOT / folder / "evaluate.log")
            (ROOT / folder / f"eval_{split}.json").rename(path)
        return json.loads(path.read_text())

    def keep(self, folder: Path, study: str, name: str) -> None:
        """Copy a finished run's records to the logs."""
        home, folder = self.logs / study / name, ROOT / folder
        home.mkdir(parents=True, exist_ok=True)
        numbers = sorted(folder.glob("eval_*.json"), reverse=True)  # eval_test.json last: by it a run is done
        for path in [folder / "metrics.jsonl", folder / "config.json", *numbers]:
            replace(home / path.name, lambda temporary, path=path: shutil.copyfile(path, temporary))

    def finish(self, study: str, row: str, name: str, folder: Path) -> None:
        """All numbers of a trained run, and its records into the logs."""
        foreign = f"--ood_dataset={STUDIES[study].foreign}"
        if averaged := AVERAGED.get(row.removesuffix("_taught")):
            self.evaluate(folder, "test", foreign, *averaged, keep_as="_averaged")
        self.evaluate(folder, "val")
        texts = ["--continuations=100"] if name.endswith(f"seed{SEEDS[0]}") else []
        self.evaluate(folder, "test", foreign, *texts)
        self.keep(folder, study, name)

    def done(self, study: str, name: str) -> bool:
        return (self.logs / study / name / "eval_test.json").is_file()

    def row(self, study: str, row: str) -> None:
        """Tune a row and train it with its seeds."""
        about = STUDIES[study]
        seeds = SEEDS if row in (*about.more_seeds, "dropout") else SEEDS[:1]
        seeds = MEMBERS if about.extra and row == "softmax" else seeds
        for seed in seeds:
            if not self.done(study, f"{row}-seed{seed}"):
                self.finish(study, row, f"{row}-seed{seed}", self.run(study, row, seed))
        if seeds == MEMBERS and not (self.logs / study / TEACHER / "eval_test_ensemble_of_4.json").is_file():
            folders = [self.run(study, row, seed) for seed in seeds]
            command = ["evaluate.py", "--out_dir=" + "+".join(map(str, folders)), "--split=test", "--report=none"]
            self.python(*command, f"--ood_dataset={about.foreign}", log=ROOT / folders[0] / "evaluate.log")
            self.keep(folders[0], study, TEACHER)

    def run(self, study: str, row: str, seed: int) -> Path:
        """A tuned row trained with a seed: the folder, at once if it has been. The best trial is the first seed's."""
        flags = self.tune(study, row)
        is_trial = STUDIES[study].rates and seed == SEEDS[0]
        return self.train(study, row, trial_name(row, flags) if is_trial else f"{row}-seed{seed}", seed, flags)

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
        """Its val_nll, of the whole split at the end; from tuning.jsonl if it is there."""
        path = self.logs / study / "tuning.jsonl"
        with self.lock:
            known = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        for trial in known:
            if (trial["row"], trial["flags"]) == (row, flags):
                return trial
        folder = self.train(study, row, trial_name(row, flags), SEEDS[0], flags)
        found = {"row": row, "flags": flags, "val_nll": self.evaluate(folder, "val")["nll"]}
        with self.lock:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as out:
                out.write(json.dumps(found) + "\n")
        return found

    def teach(self, study: str, row: str) -> None:
        """A row on a teacher's labels, half and half with the true token, all else as without them."""
        flags = self.tune(study, row)
        for seed in self.untaught(study, row):
            name = f"{row}_taught-seed{seed}"
            folder = self.train(study, row, name, seed, [*flags, "--labels=study"])
            self.finish(study, row, name, folder)

    def untaught(self, study: str, row: str) -> list[int]:
        """The seeds without records of the row on labels."""
        seeds = SEEDS if row in MAIN else SEEDS[:1]
        return [seed for seed in seeds if not self.done(study, f"{row}_taught-seed{seed}")]

    def label(self, study: str) -> None:
        """The teacher's labels: its four likeliest tokens at each position of the train split."""
        teacher = self.run(study, "softmax", SEEDS[0])
        command = [f"--teacher={teacher}", f"--dataset={STUDIES[study].dataset}", "--name=study", "--k=4"]
        self.python("augmentation/teacher_labels.py", *command, log=ROOT / teacher / "labels.log")

    def together(self, jobs: list[Callable[[], None]]) -> None:
        with ThreadPoolExecutor(self.config.jobs) as pool:
            for future in [pool.submit(job) for job in jobs]:
                future.result()


def trial_name(row: str, flags: list[str]) -> str:
    return "_".join([row, *(flag.lstrip("-") for flag in flags)])


def main() -> None:
    config, _ = load_config(StudyConfig, sys.argv[1:])
    check_ranges(config, {"jobs": (1, 64)})
    runner, studies = Runner(config), config.studies.split(",")
    check_names("studies", studies, STUDIES)
    known = dict.fromkeys(row for study in studies for row in STUDIES[study].all_rows)
    wanted = config.rows.split(",") if config.rows else known
    check_names("rows", wanted, known)
    data = [name for study in studies for name in (STUDIES[study].dataset, STUDIES[study].foreign)]
    runner.prepare(dict.fromkeys(part for name in data for part in (*name.split("_by_")[1:], name)))
    for study in studies:
        rows = [row for row in STUDIES[study].all_rows if row in wanted]
        runner.together([partial(runner.row, study, row) for row in rows if not row.endswith("_taught")])
        taught = [row for row in STUDIES[study].taught if f"{row}_taught" in rows and runner.untaught(study, row)]
        if taught:
            runner.label(study)
            runner.together([partial(runner.teach, study, row) for row in taught])


def check_names(option: str, given: Iterable[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise UserError(f"{option} = {name!r} is not one of: {', '.join(known)}")


if __name__ == "__main__":
    run(main)
