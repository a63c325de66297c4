"""What a user gets wrong ends in one line that says what to do, exit code 2, and nothing written."""

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

import engine.scan
from engine.distributed import Processes, autocast, check_accumulation
from engine.errors import UserError
from engine.tokenizer import ByteTokenizer
from engine.tokens import write_dataset
from tests.helpers import ROOT, TINY, flags, run, words, write_nanogpt, write_words


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Iterator[Path]:
    """A folder with data sets, a run, and config files."""
    root, patch = tmp_path_factory.mktemp("prepared"), pytest.MonkeyPatch()
    patch.setattr(engine.scan, "SETTLED", 0)  # a scan of data that was just made is remembered too
    write_words(root / "words")
    run(root / "words", root / "run", max_iters=2)
    write_nanogpt(root / "ids", {"train": [70] * 100, "val": [0] * 100})
    write_nanogpt(root / "odd", {"train": [1] * 100, "val": [1] * 100})
    (root / "odd" / "val.bin").write_bytes(b"123")
    write_nanogpt(root / "train_only", {"train": [1] * 100})
    write_dataset(root / "byte_words", {"train": [words(9)], "val": [words(9)]}, ByteTokenizer())
    (root / "unknown.py").write_text("n_layers = 3\n")
    (root / "mistyped.py").write_text("n_layer = 'three'\n")
    (root / "broken.py").write_text("n_layer = 3\nn_head = (\n")
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "empty").mkdir()
    (root / "empty" / "note.txt").write_text("no run here")
    (root / "damaged").mkdir()
    (root / "damaged" / "ckpt_00000001.pt").write_bytes(b"rubbish")
    yield root
    patch.undo()


TRAIN = flags(**TINY | {"dataset": "words", "out_dir": "new", "max_iters": 2})
SAMPLE = ["--out_dir=run", "--device=cpu", "--max_new_tokens=2", "--start=the"]
EVALUATE = ["--out_dir=run", "--device=cpu"]

CASES = [
    # options
    ("train.py", [*TRAIN, "--n_layers=3"], "unknown option '--n_layers'; did you mean 'n_layer'?"),
    ("train.py", ["unknown.py", *TRAIN], "unknown.py: unknown option 'n_layers'; did you mean 'n_layer'?"),
    ("train.py", [*TRAIN, "--n_layer=three"], "--n_layer wants int, got 'three'"),
    ("train.py", ["mistyped.py", *TRAIN], "mistyped.py: n_layer wants int, got 'three', a str"),
    ("train.py", ["broken.py", *TRAIN], "broken.py, line 2: SyntaxError"),
    ("train.py", ["missing.py", *TRAIN], "config file missing.py does not exist"),
    ("train.py", [*TRAIN, "--n_layer"], "--n_layer needs a value: --n_layer=VALUE"),
    ("train_bayes.py", [*TRAIN, "--likelihood=sigmoid"], "use train.py --likelihood=sigmoid"),
    ("sample.py", [*SAMPLE, "--temprature=1"], "did you mean 'temperature'?"),
    ("evaluate.py", [*EVALUATE, "--splt=val"], "did you mean 'split'?"),
    # values
    (
        "train.py",
        [*TRAIN, "--n_embd=30", "--n_head=4"],
        "n_embd = 30 is not divisible by n_head = 4; n_head could be 3 or 5",
    ),
    ("train.py", [*TRAIN, "--n_layer=0"], "n_layer = 0 must be at least 1"),
    ("train.py", [*TRAIN, "--batch_size=0"], "batch_size = 0 must be at least 1"),
    ("train.py", [*TRAIN, "--max_iters=-1"], "max_iters = -1 must not be negative"),
    ("train.py", [*TRAIN, "--weight_decay=-1"], "weight_decay = -1.0 must not be negative"),
    ("train.py", [*TRAIN, "--seed=-1"], "seed = -1 must not be negative"),
    ("train.py", [*TRAIN, "--beta2=1"], "must lie in [0, 1)"),
    ("train.py", [*TRAIN, "--dropout=1"], "dropout = 1.0 must lie in [0, 1)"),
    ("train.py", [*TRAIN, "--weights=bayesian"], "is not one of: point, bayes"),
    ("train.py", [*TRAIN, "--likelihood=softmax"], "is not one of: categorical, smooth, sigmoid"),
    ("train.py", [*TRAIN, "--label_smoothing=1"], "label_smoothing = 1.0 must lie in [0, 1)"),
    ("train.py", [*TRAIN, "--prior_std=0"], "prior_std = 0.0 must be a number above 0"),
    ("train.py", [*TRAIN, "--kl_weight=-1"], "kl_weight = -1.0 must not be negative"),
    ("train.py", [*TRAIN, "--logit_bias=zero"], "is not one of: auto, unigram, uniform, none"),
    ("train.py", [*TRAIN, "--dtype=int8"], "dtype = 'int8' is not one of: auto, float32, bfloat16, float16"),
    ("train.py", [*TRAIN, "--gradient_accumulation_steps=0"], "the nearest valid values are 1"),
    ("sample.py", [*SAMPLE, "--top_p=0"], "top_p = 0.0 must lie in (0, 1]"),
    ("sample.py", [*SAMPLE, "--num_samples=0"], "num_samples = 0 must be at least 1"),
    ("sample.py", [*SAMPLE, "--dtype=half"], "is not one of"),
    ("evaluate.py", [*EVALUATE, "--batch_size=0"], "batch_size = 0 must be at least 1"),
    # devices
    ("train.py", [*TRAIN, "--device=cuda:99"], "device = 'cuda:99' is not there: this machine has .*--device=auto"),
    ("train.py", [*TRAIN, "--device=tpu"], "device = 'tpu' is not a device; use auto, cpu, cuda"),
    ("train.py", [*TRAIN, "--device=meta"], "device = 'meta' is not supported; use auto, cpu, cuda"),
    ("sample.py", [*SAMPLE, "--device=cuda:99"], "--device=auto"),
    ("evaluate.py", [*EVALUATE, "--device=cuda:99"], "--device=auto"),
    # data
    ("train.py", [*TRAIN, "--dataset=nowhere"], r"train\.bin is missing; run one of: .*python data/text/prepare\.py"),
    ("train.py", [*TRAIN, "--dataset=train_only"], r"val\.bin is missing; this data set has train"),
    (
        "train.py",
        [*TRAIN, "--dataset=ids", "--vocab_size=67"],
        r"train\.bin holds token id 70, outside the vocabulary of 67",
    ),
    ("train.py", [*TRAIN, "--dataset=odd"], r"val\.bin has 3 bytes.*prepare it again"),
    ("train.py", [*TRAIN, "--vocab_size=5"], "outside the vocabulary of 5; .*--vocab_size"),
    ("train.py", [*TRAIN, "--block_size=5000"], r"val\.bin has .* too few for one block of 5000 .*--block_size="),
    ("evaluate.py", [*EVALUATE, "--split=nonsense"], r"nonsense\.bin is missing; this data set has test, train, val"),
    ("evaluate.py", [*EVALUATE, "--dataset=ids", "--split=train"], r"holds token id 70, outside the vocabulary"),
    # checkpoints and folders
    (
        "train.py",
        [*TRAIN, "--init_from=resume"],
        "there is no checkpoint in new; train first, or give another --out_dir",
    ),
    ("train.py", [*TRAIN, "--out_dir=run"], "already holds a run; go on with --init_from=resume"),
    (
        "train.py",
        [*TRAIN, "--out_dir=run", "--init_from=resume", "--n_layer=2"],
        "n_layer = 2, but the run to resume has 1",
    ),
    ("train.py", [*TRAIN, "--init_from=nowhere"], "nowhere does not exist; give a run folder.*gpt2"),
    ("train.py", [*TRAIN, "--init_from=run", "--n_embd=64"], "n_embd = 64, but the weights to start from have 32"),
    ("train.py", [*TRAIN, "--out_dir=latin.txt"], "cannot make the folder latin.txt: .*--out_dir"),
    (
        "sample.py",
        [*SAMPLE, "--out_dir=empty"],
        "there is no checkpoint in empty; train first, or give another --out_dir",
    ),
    ("sample.py", [*SAMPLE, "--out_dir=nowhere"], "nowhere does not exist; give a run folder"),
    ("sample.py", [*SAMPLE, "--init_from=damaged/ckpt_00000001.pt"], "is not a good checkpoint"),
    ("evaluate.py", [*EVALUATE, "--out_dir=empty"], "there is no checkpoint in empty"),
    ("evaluate.py", [*EVALUATE, "--out_dir=,"], "which runs"),
    ("evaluate.py", [*EVALUATE, "--out_dir=run/ckpt_00000002.pt"], "add --dataset=NAME"),
    # prompts
    ("sample.py", [*SAMPLE, "--start=FILE:missing.txt"], "cannot read the prompt missing.txt: "),
    ("sample.py", [*SAMPLE, "--start=FILE:latin.txt"], "cannot read the prompt latin.txt: "),
    ("sample.py", [*SAMPLE, "--start=THE"], "the character 'T' is not in this data set's"),
    ("sample.py", [*SAMPLE, "--start="], "no end-of-text token to start from; give some text with --start"),
]


def contents(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.parametrize(
    ("script", "argv", "message"), CASES, ids=[f"{c[0]}-{c[1][-1]}-{i}" for i, c in enumerate(CASES)]
)
def test_a_mistake_is_one_line_with_a_way_out(prepared, monkeypatch, capsys, script, argv, message):
    monkeypatch.chdir(prepared)
    monkeypatch.setattr(sys, "argv", [script, *argv])
    before = contents(prepared)
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    output = capsys.readouterr()
    assert exit_.value.code == 2
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    assert message in output.err or re.search(message, output.err)
    assert output.out == "" and contents(prepared) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_the_device_cuda_is_refused(prepared, monkeypatch, capsys):
    argv = [*TRAIN, "--device=cuda"]
    message = "device = 'cuda' is not there: this machine has 0 CUDA devices; try --device=auto"
    test_a_mistake_is_one_line_with_a_way_out(prepared, monkeypatch, capsys, "train.py", argv, message)


def test_a_run_of_nothing_but_damaged_checkpoints_names_each_and_then_what_to_do(prepared, monkeypatch, capsys):
    monkeypatch.chdir(prepared)
    monkeypatch.setattr(sys, "argv", ["sample.py", *SAMPLE, "--out_dir=damaged"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    warning, error = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and "ckpt_00000001.pt is not a good checkpoint" in warning
    assert error.startswith("error: there is no good checkpoint in damaged")


@pytest.mark.parametrize(
    ("steps", "world_size", "near"),
    [(40, 3, "39 and 42"), (5, 8, "8"), (0, 1, "1"), (0, 4, "4"), (-3, 2, "2"), (7, 2, "6 and 8")],
)
def test_an_accumulation_that_processes_cannot_share_names_the_nearest_that_they_can(steps, world_size, near):
    with pytest.raises(UserError, match=rf"= {steps} .* {world_size}; the nearest valid values are {near}$"):
        check_accumulation(steps, world_size)


@pytest.mark.parametrize(("steps", "world_size"), [(1, 1), (40, 8), (8, 8)])
def test_an_accumulation_that_processes_share_evenly_passes_and_every_micro_batch_has_one_owner(steps, world_size):
    check_accumulation(steps, world_size)
    shares = [Processes(torch.device("cpu"), rank, world_size).share(steps) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(micro for share in shares for micro in share) == list(range(steps))


def test_auto_picks_a_dtype_that_exists():
    assert autocast(torch.device("cpu"), "auto")[1] in ("float32", "bfloat16")


def test_as_processes_of_their_own_the_scripts_leave_no_traceback(prepared):
    commands = {
        "train.py": ([*TRAIN, "--n_embd=30", "--n_head=4"], "n_head could be 3 or 5"),
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
    assert capsys.readouterr().err.startswith("[rank 1] error: unknown option")


def test_a_nanogpt_checkpoint_cannot_be_resumed_but_started_from(prepared, tmp_path):
    torch.save({"model": {}, "model_args": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="nanoGPT checkpoint; start from its weights: --init_from="):
        run(prepared / "words", tmp_path, init_from="resume")
    shutil.rmtree(tmp_path)
