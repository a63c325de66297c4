"""With every socket closed, training, resuming, evaluating and sampling work from local files."""

import json
import sys

import pytest

from tests.helpers import ROOT, TINY, flags, output_of, values

# an audit hook sees every way to the network that Python has; unix sockets are local
CLOSED = """
import json, runpy, sys

def closed(event, arguments):
    to_network = event == "socket.connect" and isinstance(arguments[1], tuple)
    if to_network or event in ("socket.getaddrinfo", "socket.gethostbyname"):
        open("network.txt", "a").write(f"{event} {arguments}\\n")
        raise OSError("the network is closed")

sys.addaudithook(closed)
for sys.argv in json.loads(sys.argv[1]):
    script = sys.argv[0]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as exit_:
        sys.exit(f"{script}: {exit_.code}")
"""


@pytest.mark.parametrize("wandb_log", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_resuming_evaluating_and_sampling_need_no_network(words_data, tmp_path, wandb_log):
    options = TINY | {"dataset": words_data, "out_dir": "run", "warmup_iters": 0, "max_iters": 2}
    train = ["train.py", *flags(**options, wandb_log=wandb_log)]
    commands = [
        train,
        [*train, "--init_from=resume", "--max_iters=4"],
        ["evaluate.py", "--out_dir=run", "--device=cpu", "--limit=4"],
        ["sample.py", "--out_dir=run", "--device=cpu", "--start=the", "--num_samples=1"],
    ]
    for command in commands:
        command[0] = str(ROOT / command[0])
    environment = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    output_of(sys.executable, "-c", CLOSED, json.dumps(commands), cwd=tmp_path, **environment)
    assert values(tmp_path / "run", "step", "val_nll")[-1] == 4
    assert (tmp_path / "run" / "eval_test.json").is_file()
    assert wandb_log or not (tmp_path / "network.txt").exists()
