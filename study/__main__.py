"""The study: what do smoothed, Bayesian and sigmoid heads buy, and what do they cost?

    # or: python -m study --wikitext=FOLDER --sotu=FILE --jobs=2
    make study WIKITEXT=FOLDER SOTU=FILE

Variants (config/rows/) at scales (config/), with equal tokens, batches and seeds for all variants
of a scale; study/variants.py lists them, training_logs/README.md has method and results. Where
variants are tuned, each gets the same number of trials of full length: learning rates, then
another value of its knob at the best one. The validation split decides; all trials are listed in
<logs>/<study>/tuning.jsonl, one that diverges with an infinite nll. The best trial is the run of
the first seed. Each run leaves its records in <logs>/<study>/<variant>-seed<k>/; weights stay in
out/study. After a kill, the same command resumes; a run that has its records is not run again.
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
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from engine.base.errors import Diverged, UserError, run_main
from engine.base.files import atomic_write, check_writable, read_json
from engine.base.options import check_options, flatten, load_config
from study.logs import DISTILLED, read_trials
from study.variants import AVERAGED, KNOBS, OTHER_VALUES, PREPARE, SEEDS, STUDIES
from train import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
ENSEMBLE = f"eval_test_ensemble_of_{len(SEEDS)}.json"
LAST = "eval_test.json"  # copied last: a run that has it is done
# options that do not change a run's results
WITHOUT_EFFECT = {"out_dir", "compile", "eval_interval", "eval_iters", "log_interval"}


@dataclass(frozen=True)
class StudyConfig:
    studies: str = "wikitext2_8k,wikitext2_8k_tenth,sotu_8k,wikitext2"  # which, in this order
    # only these variants, with commas: "bayes,sigmoid_taught", or files of your own in config/rows
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
    """Runs scripts in several threads; after an error or an interrupt none begins."""

    def __init__(self, config: StudyConfig):
        self.config = config
        self.lock = threading.Lock()
        self.home = Path("out/tried" if config.train_flags else "out/study")
        self.logs = ROOT / config.logs
        if config.train_flags and config.logs == StudyConfig.logs:  # no results
            self.logs = ROOT / self.home / "logs"
        self.error: BaseException | None = None
        self.children: set[subprocess.Popen] = set()
        threads = max(1, (os.cpu_count() or 1) // config.jobs)
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TERM": "dumb"}

    def python(self, *arguments: str, log: Path) -> None:
        """Run a script with its output in a file."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out, self.lock:
            if self.error:
                raise self.error
            print("python", *arguments, flush=True)
            child = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=self.environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
            self.children.add(child)
        code = child.wait()
        with self.lock:
            self.children.remove(child)
        if code:
            error = Diverged if code == Diverged.exit_code else UserError
            raise error(f"python {' '.join(arguments)}: exit code {code}; its output is in {log}")

    def together(self, jobs: list[Callable[[], None]]) -> None:
        """Run jobs, config.jobs at a time. After an error or an interrupt it ends the scripts that
        run, which save a checkpoint, and begins no more."""
        with ThreadPoolExecutor(self.config.jobs) as pool:
            try:
                for future in as_completed([pool.submit(job) for job in jobs]):
                    future.result()
            except BaseException as error:
                with self.lock:
                    self.error = error
                    for child in self.children:
                        child.terminate()
                raise

    def study(self, study: str, variants: list[str]) -> None:
        distilled = [variant for variant in variants if variant.endswith(DISTILLED)]
        plain = [variant for variant in variants if variant not in distilled]
        self.together([partial(self.finish, study, variant) for variant in plain])
        if STUDIES[study].ensemble and "softmax" in variants:
            self.together([partial(self.evaluate_ensemble, study)])
        missing = [variant for variant in distilled if not self.is_done(study, variant)]
        if missing:
            self.together([partial(self.make_labels, study)])
            self.together([partial(self.finish, study, variant) for variant in missing])

    def finish(self, study: str, variant: str) -> None:
        """Tune a variant, train and evaluate it with each seed, and keep the records."""
        for seed in STUDIES[study].seeds(variant):
            if self.has_records(study, variant, seed):
                continue
            folder = self.train(study, variant, seed)
            if variant == "softmax":  # the ensemble had another member
                self.ensemble_of(study).unlink(missing_ok=True)
            foreign = f"--ood_dataset={STUDIES[study].foreign}"
            if averaged := AVERAGED.get(variant.removesuffix(DISTILLED)):
                self.evaluate(folder, "test", foreign, *averaged, keep_as="_averaged")
            self.evaluate(folder, "val")
            texts = ["--continuations=100"] if seed == SEEDS[0] else []
            self.evaluate(folder, "test", foreign, *texts)
            self.keep(folder, study, f"{variant}-seed{seed}")

    def is_done(self, study: str, variant: str) -> bool:
        seeds = STUDIES[study].seeds(variant)
        return all(self.has_records(study, variant, seed) for seed in seeds)

    def has_records(self, study: str, variant: str, seed: int) -> bool:
        """Whether a run is in the logs, with the options that the config files have now and that
        the trials have chosen."""
        home = self.logs / study / f"{variant}-seed{seed}"
        if not (home / LAST).is_file():
            return False
        return not self.changed(home, study, variant, self.flags(study, variant))

    def train(
        self,
        study: str,
        variant: str,
        seed: int,
        flags: list[str] | None = None,
    ) -> Path:
        """Returns the run's folder, at once if it has been trained. flags: of a trial; None: what
        the trials have chosen."""
        flags = self.flags(study, variant) if flags is None else flags
        plain = variant.removesuffix(DISTILLED)
        name = "_".join([plain, *(flag.lstrip("-") for flag in flags)])
        folder = self.home / study / f"{name}-seed{seed}"
        if changed := self.changed(ROOT / folder, study, variant, flags):
            options = ", ".join(changed)
            raise UserError(
                f"{folder} was trained with another {options}; delete it, or take back the change"
            )
        self.python(
            "train.py",
            f"config/{STUDIES[study].scale}.py",
            f"config/rows/{plain}.py",
            f"--seed={seed}",
            *flags,
            *self.config.train_flags.split(),
            f"--out_dir={folder}",
            "--init_from=auto",
            log=ROOT / folder / "train.log",
        )
        return folder

    def evaluate(
        self,
        folder: Path,
        split: str,
        *flags: str,
        keep_as: str = "",
    ) -> dict:
        """The numbers of a split, evaluated if need be. keep_as: ends the name of the file."""
        path = ROOT / folder / f"eval_{split}{keep_as}.json"
        if not path.is_file():
            where = [f"--out_dir={folder}", f"--split={split}", "--report=none"]
            self.python("evaluate.py", *where, *flags, log=ROOT / folder / "evaluate.log")
            path.with_name(f"eval_{split}.json").rename(path)
        return read_json(path)

    def keep(self, folder: Path, study: str, name: str) -> None:
        """Copy a finished run's records to the logs."""
        home = self.logs / study / name
        folder = ROOT / folder
        home.mkdir(parents=True, exist_ok=True)
        numbers = [path for path in folder.glob("eval_*.json") if path.name != ENSEMBLE]
        numbers.sort(key=lambda path: path.name == LAST)
        for path in [folder / "metrics.jsonl", folder / "config.json", *numbers]:
            atomic_write(home / path.name, partial(shutil.copyfile, path))

    def changed(self, home: Path, study: str, variant: str, flags: list[str]) -> list[str]:
        """The options in which a run in this folder, if there is one, differs."""
        if not (path := home / "config.json").is_file():
            return []
        kept = read_json(path)
        options = self.options(study, variant, flags)
        return [name for name, value in options.items() if kept.get(name) != value]

    def options(self, study: str, variant: str, flags: list[str]) -> dict:
        """The options that config files and flags give a run, and those that are tuned."""
        files = [STUDIES[study].scale, f"rows/{variant.removesuffix(DISTILLED)}"]
        argv = [str(ROOT / f"config/{name}.py") for name in files]
        config, given = load_config(TrainConfig, [*argv, *flags, *self.config.train_flags.split()])
        names = {"learning_rate", *OTHER_VALUES, *given} - WITHOUT_EFFECT
        return {name: value for name, value in flatten(config).items() if name in names}

    def flags(self, study: str, variant: str) -> list[str]:
        """What the trials have chosen; a distilled variant also has the teacher's labels."""
        plain = variant.removesuffix(DISTILLED)
        labels = [] if variant == plain else ["--labels=study"]
        return self.tune(study, plain) + labels

    def tune(self, study: str, variant: str) -> list[str]:
        """The flags that the validation split prefers."""
        about = STUDIES[study]
        if not about.rates:
            return self.tune(about.tuned_as, variant) if about.tuned_as else []
        trials = [self.trial(study, variant, [f"--learning_rate={rate}"]) for rate in about.rates]
        best = min(trials, key=lambda trial: trial["val_nll"])
        knob = KNOBS.get(variant, "weight_decay")
        last = self.trial(study, variant, [*best["flags"], f"--{knob}={about.knobs[knob]}"])
        return min(best, last, key=lambda trial: trial["val_nll"])["flags"]

    def trial(self, study: str, variant: str, flags: list[str]) -> dict:
        """A trial with its nll on the whole validation split, infinite if training diverges; from
        tuning.jsonl if it is there with these options."""
        path = self.logs / study / "tuning.jsonl"
        options = self.options(study, variant, flags)
        for trial in read_trials(path):
            if (trial["row"], trial["flags"], trial.get("options")) == (variant, flags, options):
                return trial
        try:
            nll = self.evaluate(self.train(study, variant, SEEDS[0], flags), "val")["nll"]
        except Diverged:
            nll = math.inf
        found = {"row": variant, "flags": flags, "val_nll": nll, "options": options}
        with self.lock:
            lines = [json.dumps(trial) + "\n" for trial in [*read_trials(path), found]]
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, lambda temporary: temporary.write_text("".join(lines)))
        return found

    def make_labels(self, study: str) -> None:
        """The teacher's labels: its 16 likeliest tokens at each position of the train split."""
        teacher = self.train(study, "softmax", SEEDS[0])
        flags = [f"--teacher={teacher}", f"--dataset={STUDIES[study].dataset(ROOT)}"]
        flags += ["--name=study", "--k=16"]
        self.python("augmentation/teacher_labels.py", *flags, log=ROOT / teacher / "labels.log")

    def ensemble_of(self, study: str) -> Path:
        """Its numbers lie beside the first seed's."""
        return self.logs / study / f"softmax-seed{SEEDS[0]}" / ENSEMBLE

    def evaluate_ensemble(self, study: str) -> None:
        """Evaluate softmax's runs as an ensemble."""
        if self.ensemble_of(study).is_file():
            return
        folders = [self.train(study, "softmax", seed) for seed in SEEDS]
        flags = [f"--out_dir={'+'.join(map(str, folders))}", "--split=test", "--report=none"]
        flags.append(f"--ood_dataset={STUDIES[study].foreign}")
        self.python("evaluate.py", *flags, log=ROOT / folders[0] / "evaluate.log")
        atomic_write(
            self.ensemble_of(study), partial(shutil.copyfile, ROOT / folders[0] / ENSEMBLE)
        )

    def prepare(self, names: Iterable[str]) -> None:
        """Prepare the data sets that are missing, each after the one whose tokenizer it has."""
        missing = [name for name in names if not (ROOT / "data" / name / "meta.json").is_file()]
        needs_sotu = any("--source={sotu}" in PREPARE[name] for name in missing)
        if needs_sotu and not (ROOT / self.config.sotu).is_file():
            what = "give the file of the State of the Union addresses"
            where = "training_logs/README.md says where from"
            raise UserError(f"--sotu={self.config.sotu or 'FILE'}: {what}; {where}")
        sources = {"wikitext": self.config.wikitext, "sotu": self.config.sotu}
        for name in missing:
            command = [part.format(**sources) for part in PREPARE[name]]
            self.python(*command, log=ROOT / self.home / "prepare.log")


def data_sets(studies: list[str]) -> list[str]:
    """All data sets that these studies need, each after the one whose tokenizer it has."""
    names = []
    for study in studies:
        for about in filter(None, (STUDIES[study], STUDIES.get(STUDIES[study].tuned_as))):
            for name in (about.dataset(ROOT), about.foreign):
                flags = [flag.partition("--tokenizer=data/")[2] for flag in PREPARE.get(name, [])]
                names += [*filter(None, flags), name]
    return list(dict.fromkeys(names))


def check_names(option: str, given: Iterable[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise UserError(f"{option} = {name!r} is not one of: {', '.join(known)}")


def main() -> None:
    config, _ = load_config(StudyConfig, sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the scripts that run, too
    studies = config.studies.split(",")
    check_names("studies", studies, STUDIES)
    of_studies = [variant for study in studies for variant in STUDIES[study].all_variants()]
    own = sorted(path.stem for path in (ROOT / "config/rows").glob("*.py"))
    known = list(dict.fromkeys([*of_studies, *own]))
    chosen = config.rows.split(",") if config.rows else []
    check_names("rows", chosen, known)
    runner = Runner(config)
    check_writable(runner.logs)
    runner.together([partial(runner.prepare, data_sets(studies))])
    for study in studies:
        variants = STUDIES[study].all_variants()
        if chosen:
            variants = [name for name in dict.fromkeys([*variants, *own]) if name in chosen]
        runner.study(study, variants)
    print(f"all records are in {runner.logs}; tables and plots of training_logs/: make results")


if __name__ == "__main__":
    run_main(main)
