"""With every socket closed, training, resuming, sampling and evaluating work from local files."""

import json
import os
import subprocess
import sys

import pytest

from engine.base.errors import UserError
from engine.data.tokenizer import GPT2Tokenizer
from tests.helpers import ROOT, TINY, flags, records, write_words

# an audit hook sees every way to the network that Python has, whoever imported what before; unix
# sockets are local
CLOSED = """
import json, runpy, sys

def closed(event, arguments):
    to_network = event == "socket.connect" and isinstance(arguments[1], tuple)
    if to_network or event in ("socket.getaddrinfo", "socket.gethostbyname"):
        open("network.txt", "a").write(f"{event} {arguments}\\n")
        raise OSError("the network is closed")

sys.addaudithook(closed)
for script, *argv in json.loads(sys.argv[1]):
    sys.argv = [script, *argv]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as exit_:
        sys.exit(f"{script}: {exit_.code}")
"""


def run_closed(folder, *commands: list[str]) -> str:
    """Run our scripts in turn in one process that reaches no network; returns what they print."""
    commands = [[str(ROOT / script), *argv] for script, *argv in commands]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("WANDB")
    }
    environment |= {"OMP_NUM_THREADS": "1", "HOME": str(folder), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CLOSED, json.dumps(commands)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ["char", "gpt2"])
def test_train_resume_sample_and_evaluate_ask_for_no_network(tmp_path, kind):
    try:
        write_words(tmp_path / "words", GPT2Tokenizer() if kind == "gpt2" else None)
    except UserError as error:
        pytest.skip(str(error))
    train = [
        "train.py",
        *flags(**TINY | {"dataset": "words", "out_dir": "run", "warmup_iters": 0, "max_iters": 2}),
    ]
    printed = run_closed(
        tmp_path,
        train,
        [*train, "--init_from=resume", "--max_iters=4"],
        [
            "sample.py",
            "--out_dir=run",
            "--device=cpu",
            "--start=the",
            "--num_samples=1",
            "--max_new_tokens=3",
        ],
        ["evaluate.py", "--out_dir=run", "--device=cpu", "--limit=4"],
    )
    assert "resuming at step 2" in printed and "\nthe" in printed and "words, test split" in printed
    assert [record["step"] for record in records(tmp_path / "run", "val_nll")][-1] == 4
    assert (tmp_path / "run" / "eval_test.json").is_file()
    assert not (tmp_path / "network.txt").exists()


def test_wandb_without_a_network_costs_no_run(tmp_path):
    pytest.importorskip("wandb")
    write_words(tmp_path / "words")
    options = TINY | {"dataset": "words", "out_dir": "run", "max_iters": 2, "wandb_log": True}
    run_closed(tmp_path, ["train.py", *flags(**options)])
    assert records(tmp_path / "run", "val_nll")[-1]["step"] == 2
    assert len(list((tmp_path / "run").glob("ckpt_*.pt"))) == 1
