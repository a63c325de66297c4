"""A user's mistake ends in one line that names it, with exit code 2 and nothing written."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.base.errors import run_main
from engine.data.tokenizer import ByteTokenizer
from tests.helpers import (
    ROOT,
    TINY,
    flags,
    refusal,
    refused,
    run,
    run_script,
    words,
    write_dataset,
    write_nanogpt,
    write_words,
)

CONFIGS = {
    "broken.py": b"n_layer = 3\nn_head = (\n",
    "exits.py": b"import sys\n\nsys.exit(0)\n",
    "lines.py": b"raise ValueError('one\\ntwo\\nthree')\n",
    "endless.py": b"def f():\n    f()\nf()\n",
    "array.py": b"import numpy\nweights = numpy.ones(3)\n",
    "huge.py": b"learning_rate = 10**400\n",
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with data sets, a run, and config files."""
    root = tmp_path_factory.mktemp("prepared")
    write_words(root / "words")
    run(root / "words", root / "run", max_iters=2)
    write_nanogpt(root / "ids", {"train": [70] * 100, "val": [0] * 100})
    write_nanogpt(root / "odd", {"train": [1] * 100, "val": [1] * 100})
    (root / "odd" / "val.bin").write_bytes(b"123")
    write_nanogpt(root / "train_only", {"train": [1] * 100})
    write_dataset(root / "bytes", {"train": [words(9)], "val": [words(9)]}, ByteTokenizer())
    for name in ("empty", "damaged"):
        (root / name).mkdir()
    (root / "empty" / "note.txt").write_text("no run here")
    (root / "damaged" / "ckpt_00000001.pt").write_bytes(b"rubbish")
    (root / "damaged" / "ckpt_00000002.pt").mkdir()
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "text.txt").write_text(words(400))
    for name, text in CONFIGS.items():
        (root / name).write_bytes(text)
    return root


TRAIN = flags(**TINY | {"dataset": "words", "out_dir": "new", "max_iters": 2})
COMMON = {
    "train.py": TRAIN,
    "train_bayes.py": TRAIN,
    "sample.py": ["--out_dir=run", "--device=cpu", "--max_new_tokens=2", "--start=the"],
    "evaluate.py": ["--out_dir=run", "--device=cpu"],
    "export.py": ["--out_dir=run", "--device=cpu"],
    "augmentation/teacher_labels.py": [
        "--teacher=run",
        "--dataset=words",
        "--name=top",
        "--device=cpu",
    ],
    "data/text/prepare.py": ["--source=text.txt", "--folder=new_data", "--tokenizer=char"],
}
# script, what the user adds to COMMON, and what the message must name
CASES = [
    # config files
    ("train.py", "broken.py", "line 2"),
    ("train.py", "exits.py", "SystemExit"),
    ("train.py", "lines.py", "one two three"),
    ("train.py", "endless.py", "RecursionError"),
    ("train.py", "huge.py", "learning_rate"),
    ("train_bayes.py", "array.py", "weights"),
    # options
    ("train.py", "--n_layers=3", "'n_layer'"),
    ("train_bayes.py", "--likelihood=sigmoid", "--likelihood=sigmoid"),
    ("train.py", "--n_embd=30 --n_head=4", "n_head = 4"),
    ("train.py", f"--max_iters=1{30 * '0'}", "max_iters"),
    ("train.py", "--label_smoothing=1", "label_smoothing"),
    ("train.py", "--weights=bayesian", "point, bayes"),
    ("train.py", "--label_mode=set", "--labels"),
    ("train.py", "--dtype=int8", "dtype"),
    ("train.py", "--device=cuda:99", "--device=auto"),
    ("train.py", "--device=meta", "--device=auto"),
    ("train.py", "--out_dir=", "out_dir"),
    ("train.py", "--out_dir=latin.txt", "latin.txt"),
    ("train.py", f"--out_dir={300 * 'x'}", "xxx"),
    ("sample.py", "--temprature=1", "'temperature'"),
    ("sample.py", "--top_p=0", "top_p"),
    ("evaluate.py", "--stride=17", "stride"),
    ("augmentation/teacher_labels.py", "--name=a/b", "a/b"),
    # data
    ("train.py", "--dataset=nowhere", "data/text/prepare.py"),
    ("train.py", "--dataset=train_only", "val.bin"),
    ("train.py", "--dataset=ids --vocab_size=67", "token id 70"),
    ("train.py", "--dataset=odd", "3 bytes"),
    ("train.py", "--vocab_size=5", "--vocab_size"),
    ("train.py", "--block_size=5000", "--block_size"),
    ("evaluate.py", "--ood_dataset=nowhere", "test.bin"),
    ("data/text/prepare.py", "--source=latin.txt", "latin.txt"),
    ("data/text/prepare.py", "--source=empty/none*", "empty/none*"),
    ("data/text/prepare.py", "--tokenizer=word", "'word'"),
    ("data/text/prepare.py", "--name=..", "name"),
    ("data/text/prepare.py", "--folder=text.txt", "text.txt"),
    # runs
    ("train.py", "--init_from=resume", "--out_dir"),
    ("train.py", "--out_dir=run", "--init_from=resume"),
    ("train.py", "--out_dir=run --init_from=resume --n_layer=2", "n_layer"),
    ("train.py", "--init_from=nowhere", "gpt2"),
    ("train.py", "--init_from=run --n_embd=64", "n_embd"),
    ("sample.py", "--out_dir=empty", "empty"),
    ("sample.py", "--init_from=damaged/ckpt_00000001.pt", "damaged/ckpt_00000001.pt"),
    ("evaluate.py", "--out_dir=run,nowhere", "nowhere"),
    # prompts, reports and exports
    ("sample.py", "--start=FILE:latin.txt", "latin.txt"),
    ("sample.py", "--start=THE", "'T'"),
    ("sample.py", "--start=", "text"),
    ("evaluate.py", "--report=latin.txt", "latin.txt"),
    ("export.py", "", "--to"),
    ("export.py", "--to=run", "--to"),
    ("export.py", "--to=new --dataset=bytes", "tokenizer"),
]


@pytest.mark.parametrize("script, added, named", CASES)
def test_a_mistake_is_one_line_that_names_it(prepared, script, added, named):
    argv = COMMON[script] + added.split()
    assert named in refused(script, argv, prepared)


def test_a_run_of_nothing_but_damaged_checkpoints_names_each(prepared, monkeypatch, capsys):
    monkeypatch.chdir(prepared)
    with pytest.raises(SystemExit) as exit_:
        run_script("sample.py", *COMMON["sample.py"], "--out_dir=damaged")
    warning, error = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2
    assert "ckpt_00000002.pt" in warning and "ckpt_00000001.pt" in error


def test_as_a_process_of_its_own_a_script_leaves_no_traceback(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--n_layers=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_under_torchrun_an_error_names_its_rank(prepared, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    error = refused("train.py", ["--n_layers=3"], prepared)
    assert error.startswith("[rank 1] error: ")


def test_without_its_package_the_harness_says_how_to_install_it(prepared, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install" in refused("harness.py", [], prepared)


@pytest.mark.parametrize("port", ["", "port"])
def test_processes_that_torchrun_did_not_start_are_refused(prepared, monkeypatch, port):
    monkeypatch.setenv("WORLD_SIZE", "2")
    if port:
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", port)
    argv = [*TRAIN, "--backend=gloo"]
    assert "torchrun" in refused("train.py", argv, prepared)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: ...")])
def test_when_memory_runs_out_the_line_says_what_to_lower(capsys, error):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit_:
        run_main(main)
    assert exit_.value.code == 2 and "--batch_size" in capsys.readouterr().err


def test_an_error_of_the_program_keeps_its_traceback():
    def main():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_main(main)


def test_a_nanogpt_checkpoint_cannot_be_resumed_but_started_from(prepared, tmp_path):
    torch.save({"model": {}, "model_args": {}}, tmp_path / "ckpt.pt")
    assert "--init_from=" in refusal(run, prepared / "words", tmp_path, init_from="resume")
