"""What a user gets wrong ends in one line that says what to do, exit code 2, and nothing
written.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.base.distributed import autocast
from engine.base.errors import UserError
from engine.base.errors import run_main as run_script
from engine.data.tokenizer import ByteTokenizer
from tests.helpers import (
    ROOT,
    TINY,
    contents,
    flags,
    refused,
    run,
    words,
    write_dataset,
    write_nanogpt,
    write_words,
)

CONFIGS = {
    "unknown.py": b"n_layers = 3\n",
    "mistyped.py": b"n_layer = 'three'\n",
    "broken.py": b"n_layer = 3\nn_head = (\n",
    "binary.py": bytes(range(256)),
    "latin.py": b"out_dir = 'caf\xe9'\n",
    "exits.py": b"import sys\n\nsys.exit(0)\n",
    "lines.py": b"raise ValueError('one\\ntwo\\nthree')\n",
    "endless.py": b"def f():\n    f()\nf()\n",
    "array.py": b"import numpy\nweights = numpy.ones(3)\n",
    "huge.py": b"learning_rate = 10**400\n",
    "nan.py": b"weight_decay = float('nan')\n",
    "list.py": b"n_layer = [1]\n",
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Iterator[Path]:
    """A folder with data sets, a run, and config files."""
    root = tmp_path_factory.mktemp("prepared")
    write_words(root / "words")
    run(root / "words", root / "run", max_iters=2)
    write_nanogpt(root / "ids", {"train": [70] * 100, "val": [0] * 100})
    write_nanogpt(root / "odd", {"train": [1] * 100, "val": [1] * 100})
    (root / "odd" / "val.bin").write_bytes(b"123")
    write_nanogpt(root / "train_only", {"train": [1] * 100})
    write_dataset(root / "byte_words", {"train": [words(9)], "val": [words(9)]}, ByteTokenizer())
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "empty").mkdir()
    (root / "empty" / "note.txt").write_text("no run here")
    (root / "damaged").mkdir()
    (root / "damaged" / "ckpt_00000001.pt").write_bytes(b"rubbish")
    shutil.copytree(root / "damaged", root / "two_damaged")
    (root / "two_damaged" / "ckpt_00000002.pt").mkdir()
    (root / "folder.py").mkdir()
    (root / "loop.py").symlink_to("loop.py")
    (root / "text.txt").write_text(words(400))
    for name, text in CONFIGS.items():
        (root / name).write_bytes(text)
    yield root


TRAIN = flags(**TINY | {"dataset": "words", "out_dir": "new", "max_iters": 2})
SAMPLE = ["--out_dir=run", "--device=cpu", "--max_new_tokens=2", "--start=the"]
EVALUATE = ["--out_dir=run", "--device=cpu"]
EXPORT = ["--out_dir=run", "--device=cpu", "--to=exported"]

HUGE = "1" + 30 * "0"
NUMBERS = [
    ("learning_rate", "nan", "--learning_rate wants float, got 'nan'"),
    ("weight_decay", "1e300", "weight_decay = 1e+300 must"),
    ("max_iters", "1.5", "--max_iters wants int, got '1.5'"),
    ("max_iters", HUGE, "max_iters = 1"),
    ("batch_size", "1000000000000", "batch_size = 1000000000000 must"),
    ("n_embd", "1000000", "n_embd = 1000000 must"),
    ("n_layer", "", "--n_layer wants int, got ''"),
    ("out_dir", "", "out_dir is empty"),
    ("dataset", "", r"train\.bin is missing"),
    ("dataset", "\N{UNICORN FACE}", r"train\.bin is missing"),
    ("dataset", "words/train.bin", r"train\.bin is missing"),
    ("out_dir", "/proc/self/nowhere", "/proc/self/nowhere"),
    ("out_dir", "/dev/full", "/dev/full cannot be written to"),
    ("out_dir", "x" * 300, "File name too long"),
    ("init_from", "", "there is no checkpoint in "),
    ("device", "", "device = '' is not there"),
    ("backend", "mpi", "backend = 'mpi' is not one of: auto, nccl, gloo"),
    ("compile", "maybe", "--compile wants bool, got 'maybe'"),
    ("", "3", "-- is not an option"),
]
SAMPLE_NUMBERS = [
    ("num_samples", "1000000000000", "num_samples = 1000000000000 must"),
    ("temperature", "nan", "--temperature wants float, got 'nan'"),
    ("n_samples", "-2", "n_samples = -2 must"),
    ("start", "FILE:empty", "cannot read the prompt empty: "),
    ("start", "\N{UNICORN FACE}", "is not in this data set's"),
    ("init_from", "loop.py", "loop.py does not exist"),
]
CONFIG_MISTAKES = [
    ("folder.py", "config file folder.py does not exist"),
    ("loop.py", "config file loop.py does not exist"),
    ("binary.py", "config file binary.py: "),
    ("latin.py", "config file latin.py: SyntaxError"),
    ("exits.py", "config file exits.py: SystemExit"),
    ("lines.py", "config file lines.py: ValueError: one two three"),
    ("endless.py", "config file endless.py: RecursionError"),
    ("huge.py", "huge.py: learning_rate wants float"),
    ("nan.py", "nan.py: weight_decay wants float, got nan"),
    ("list.py", "list.py: n_layer wants int, got [1]"),
]
TEACHER_MISTAKES = [
    ("share=nan", "--share wants float"),
    ("k=0", "k = 0 must"),
    ("stride=1000", "stride = 1000 is above 16"),
    ("name=a/b", "'a/b' cannot name labels"),
    ("teacher=words", "there is no checkpoint in words"),
]
TEXT_MISTAKES = [
    ("val_fraction=nan", "--val_fraction"),
    ("test_fraction=1e400", "test_fraction = inf"),
    ("val_fraction=-1", "val_fraction = -1"),
    ("source=latin.txt", "latin.txt: UnicodeDecodeError"),
    ("source=empty/none*", "does not exist"),
    ("tokenizer=word", "unknown tokenizer 'word'"),
    ("name=..", "plain name"),
    ("folder=text.txt", "File exists"),
]
TEACHER = ["--teacher=run", "--dataset=words", "--name=top", "--device=cpu"]
TEXT = ["--source=text.txt", "--folder=new_data", "--tokenizer=char"]
CASES = [
    # options
    ("train.py", [*TRAIN, "--n_layers=3"], "--n_layers is not an option; did you mean 'n_layer'?"),
    (
        "train.py",
        ["unknown.py", *TRAIN],
        "unknown.py: n_layers is not an option; did you mean 'n_layer'?",
    ),
    ("train.py", [*TRAIN, "--n_layer=three"], "--n_layer wants int, got 'three'"),
    ("train.py", ["mistyped.py", *TRAIN], "mistyped.py: n_layer wants int, got 'three'"),
    ("train.py", ["broken.py", *TRAIN], "broken.py: SyntaxError: .*line 2"),
    ("train.py", ["missing.py", *TRAIN], "config file missing.py does not exist"),
    ("train.py", [*TRAIN, "--n_layer"], "--n_layer needs a value: --n_layer=VALUE"),
    ("train_bayes.py", [*TRAIN, "--likelihood=sigmoid"], "use train.py --likelihood=sigmoid"),
    ("sample.py", [*SAMPLE, "--temprature=1"], "did you mean 'temperature'?"),
    ("evaluate.py", [*EVALUATE, "--splt=val"], "did you mean 'split'?"),
    # values
    (
        "train.py",
        [*TRAIN, "--n_embd=30", "--n_head=4"],
        "n_embd = 30 must be a multiple of n_head = 4",
    ),
    ("train.py", [*TRAIN, "--batch_size=0"], "batch_size = 0 must"),
    ("train.py", [*TRAIN, "--dropout=1"], "dropout = 1.0 must"),
    ("train.py", [*TRAIN, "--weights=bayesian"], "is not one of: point, bayes"),
    ("train.py", [*TRAIN, "--label_smoothing=1"], "label_smoothing = 1.0 must"),
    ("train.py", [*TRAIN, "--prior_std=0"], "prior_std = 0.0 must"),
    ("train.py", [*TRAIN, "--logit_bias=zero"], "is not one of: auto, unigram, uniform, none"),
    (
        "train.py",
        [*TRAIN, "--dtype=int8"],
        "dtype = 'int8' is not one of: auto, float32, bfloat16, float16",
    ),
    ("sample.py", [*SAMPLE, "--top_p=0"], "top_p = 0.0 must"),
    ("sample.py", [*SAMPLE, "--num_samples=0"], "num_samples = 0 must"),
    ("sample.py", [*SAMPLE, "--dtype=half"], "is not one of"),
    ("evaluate.py", [*EVALUATE, "--batch_size=0"], "batch_size = 0 must"),
    *(("train.py", [*TRAIN, f"--{name}={value}"], message) for name, value, message in NUMBERS),
    *(
        ("sample.py", [*SAMPLE, f"--{name}={value}"], message)
        for name, value, message in SAMPLE_NUMBERS
    ),
    (
        "evaluate.py",
        [*EVALUATE, "--n_samples=1000000000000"],
        "n_samples = 1000000000000 must",
    ),
    ("evaluate.py", [*EVALUATE, "--temperature=1e400"], "temperature = inf must"),
    # devices
    (
        "train.py",
        [*TRAIN, "--device=cuda:99"],
        "device = 'cuda:99' is not there: this machine has .*--device=auto",
    ),
    ("train.py", [*TRAIN, "--device=tpu"], "device = 'tpu' is not there"),
    (
        "train.py",
        [*TRAIN, "--device=meta"],
        "device = 'meta' is not there.*--device=auto",
    ),
    ("sample.py", [*SAMPLE, "--device=cuda:99"], "--device=auto"),
    ("evaluate.py", [*EVALUATE, "--device=cuda:99"], "--device=auto"),
    # config files
    *(("train.py", [*TRAIN, name], message) for name, message in CONFIG_MISTAKES),
    ("train_bayes.py", [*TRAIN, "array.py"], "array.py: weights wants"),
    # other scripts
    *(
        ("augmentation/teacher_labels.py", [*TEACHER, f"--{flag}"], message)
        for flag, message in TEACHER_MISTAKES
    ),
    *(("data/text/prepare.py", [*TEXT, f"--{flag}"], message) for flag, message in TEXT_MISTAKES),
    (
        "evaluate.py",
        [*EVALUATE, "--report=latin.txt"],
        "latin.txt cannot be written to",
    ),
    ("evaluate.py", [*EVALUATE, "--stride=17"], "stride"),
    ("evaluate.py", [*EVALUATE, "--ood_dataset=nowhere"], r"test\.bin is missing"),
    (
        "evaluate.py",
        ["--device=cpu", "--out_dir=run,nowhere"],
        "nowhere does not exist; give a run",
    ),
    # data
    (
        "train.py",
        [*TRAIN, "--dataset=nowhere"],
        r"train\.bin is missing; run .*python data/text/prepare\.py",
    ),
    ("train.py", [*TRAIN, "--dataset=train_only"], r"val\.bin is missing; this data set has train"),
    (
        "train.py",
        [*TRAIN, "--dataset=ids", "--vocab_size=67"],
        r"train\.bin holds token id 70, outside the vocabulary of 67",
    ),
    ("train.py", [*TRAIN, "--dataset=odd"], r"val\.bin has 3 bytes"),
    ("train.py", [*TRAIN, "--vocab_size=5"], "outside the vocabulary of 5, .*--vocab_size"),
    (
        "train.py",
        [*TRAIN, "--block_size=5000"],
        r"val\.bin has .* too few for one block of 5000 .*--block_size=",
    ),
    (
        "evaluate.py",
        [*EVALUATE, "--split=nonsense"],
        r"nonsense\.bin is missing; this data set has test, train, val",
    ),
    (
        "evaluate.py",
        [*EVALUATE, "--dataset=ids", "--split=train"],
        r"holds token id 70, outside the vocabulary",
    ),
    # checkpoints and folders
    (
        "train.py",
        [*TRAIN, "--init_from=resume"],
        "there is no checkpoint in new; train first, or give another --out_dir",
    ),
    ("train.py", [*TRAIN, "--out_dir=run"], "already holds a run.*--init_from=resume"),
    (
        "train.py",
        [*TRAIN, "--out_dir=run", "--init_from=resume", "--n_layer=2"],
        r"n_layer = 2 \(was 1\) cannot change",
    ),
    (
        "train.py",
        [*TRAIN, "--init_from=nowhere"],
        "nowhere does not exist; give a run folder.*gpt2",
    ),
    (
        "train.py",
        [*TRAIN, "--init_from=run", "--n_embd=64"],
        "n_embd = 64, but the weights to start from have 32",
    ),
    ("train.py", [*TRAIN, "--out_dir=latin.txt"], "latin.txt cannot be written to"),
    (
        "sample.py",
        [*SAMPLE, "--out_dir=empty"],
        "there is no checkpoint in empty; train first, or give another --out_dir",
    ),
    ("sample.py", [*SAMPLE, "--out_dir=nowhere"], "nowhere does not exist; give a run folder"),
    ("sample.py", [*SAMPLE, "--init_from=damaged/ckpt_00000001.pt"], "is not a good checkpoint"),
    ("evaluate.py", [*EVALUATE, "--out_dir=empty"], "there is no checkpoint in empty"),
    (
        "evaluate.py",
        [*EVALUATE, "--out_dir=damaged"],
        "is not a good checkpoint",
    ),
    (
        "evaluate.py",
        [*EVALUATE, "--continuations=2", "--prompt_tokens=0"],
        "prompt_tokens = 0 must",
    ),
    ("evaluate.py", [*EVALUATE, "--out_dir=,"], "which runs"),
    # exports
    ("export.py", ["--out_dir=run", "--device=cpu"], "--to=FOLDER"),
    (
        "export.py",
        [*EXPORT, "--to=run"],
        "run exists and is never overwritten; give another --to",
    ),
    ("export.py", [*EXPORT, "--to=text.txt"], "text.txt exists"),
    (
        "export.py",
        [*EXPORT, "--to=text.txt/new"],
        "text.txt/new cannot be written to|text.txt cannot be written to",
    ),
    ("export.py", [*EXPORT, "--out_dir=nowhere"], "nowhere does not exist; give a run folder"),
    ("export.py", [*EXPORT, "--out_dir=damaged"], "is not a good checkpoint"),
    ("export.py", [*EXPORT, "--dataset=nowhere"], r"val\.bin is missing"),
    ("export.py", [*EXPORT, "--dataset=byte_words"], "run was trained with another tokenizer"),
    ("export.py", [*EXPORT, "--aproximate"], "did you mean 'approximate'?"),
    ("export.py", [*EXPORT, "--device=cuda:99"], "--device=auto"),
    # prompts
    ("sample.py", [*SAMPLE, "--start=FILE:missing.txt"], "cannot read the prompt missing.txt: "),
    ("sample.py", [*SAMPLE, "--start=FILE:latin.txt"], "cannot read the prompt latin.txt: "),
    ("sample.py", [*SAMPLE, "--start=THE"], "the character 'T' is not in this data set's"),
    (
        "sample.py",
        [*SAMPLE, "--start="],
        "no end-of-text token.*give some text",
    ),
]


@pytest.mark.parametrize(
    ("script", "argv", "message"),
    CASES,
    ids=[f"{c[0]}-{c[1][-1]}-{i}" for i, c in enumerate(CASES)],
)
def test_a_mistake_is_one_line_with_a_way_out(prepared, monkeypatch, capsys, script, argv, message):
    error = refused(script, argv, prepared, monkeypatch, capsys)
    assert error.startswith("error: ")
    assert message in error or re.search(message, error)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_the_device_cuda_is_refused(prepared, monkeypatch, capsys):
    argv = [*TRAIN, "--device=cuda"]
    message = "device = 'cuda' is not there: this machine has 0 CUDA devices; use --device=auto"
    test_a_mistake_is_one_line_with_a_way_out(
        prepared, monkeypatch, capsys, "train.py", argv, message
    )


def test_a_run_of_nothing_but_damaged_checkpoints_names_each_and_then_what_to_do(
    prepared, monkeypatch, capsys
):
    monkeypatch.chdir(prepared)
    monkeypatch.setattr(sys, "argv", ["sample.py", *SAMPLE, "--out_dir=two_damaged"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    warning, error = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and "ckpt_00000002.pt is not a good checkpoint" in warning
    assert error.startswith("error: two_damaged/ckpt_00000001.pt is not a good checkpoint")
    assert "use another one" in error


def test_auto_picks_a_dtype_that_exists():
    assert autocast(torch.device("cpu"), "auto")[1] in ("float32", "bfloat16")


def test_as_processes_of_their_own_the_scripts_leave_no_traceback(prepared):
    commands = {
        "train.py": ([*TRAIN, "--n_embd=30", "--n_head=4"], "must be a multiple of n_head"),
        "sample.py": ([*SAMPLE, "--out_dir=empty"], "there is no checkpoint in empty"),
    }
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    before, started = contents(prepared), []
    for script, (argv, message) in commands.items():
        command = [sys.executable, str(ROOT / script), *argv]
        started.append((subprocess.Popen(command, cwd=prepared, env=environment, **pipes), message))
    for process, message in started:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 2 and out == ""
        assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert contents(prepared) == before


def test_under_torchrun_an_error_names_its_rank(prepared, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "argv", ["train.py", *TRAIN, "--n_layers=3"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert capsys.readouterr().err.startswith("[rank 1] error: --n_layers is not an option")


TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "start with torchrun"),
        (TORCHRUN | {"MASTER_PORT": "port"}, "start with torchrun"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "start with torchrun"),
    ],
)
def test_processes_that_torchrun_did_not_start_are_told_what_is_missing(
    prepared, monkeypatch, capsys, environment, message
):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    argv = [*TRAIN, "--backend=gloo"]
    assert message in refused("train.py", argv, prepared, monkeypatch, capsys)


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="root may read and write everything"
)
def test_files_and_folders_without_permission_are_named(prepared, tmp_path, monkeypatch, capsys):
    data = shutil.copytree(prepared / "words", tmp_path / "words")
    (tmp_path / "closed").mkdir(mode=0o500)
    argv = [*TRAIN, "--out_dir=closed/run"]
    assert "cannot make the folder closed/run" in refused(
        "train.py", argv, tmp_path, monkeypatch, capsys
    )
    (data / "train.bin").chmod(0)
    assert "words/train.bin" in refused("train.py", TRAIN, tmp_path, monkeypatch, capsys)


def test_when_memory_runs_out_the_line_says_what_to_lower(capsys):
    for error in (
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ):

        def main(error=error):
            raise error

        with pytest.raises(SystemExit) as exit_:
            run_script(main)
        line = capsys.readouterr().err
        assert (
            exit_.value.code == 2
            and line.startswith("error: out of memory (")
            and "lower --batch_size" in line
        )


def test_an_error_of_ours_keeps_its_traceback():
    def main():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_script(main)


def test_a_nanogpt_checkpoint_cannot_be_resumed_but_started_from(prepared, tmp_path):
    torch.save({"model": {}, "model_args": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="start from the weights: --init_from="):
        run(prepared / "words", tmp_path, init_from="resume")
    shutil.rmtree(tmp_path)
