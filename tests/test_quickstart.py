"""The quick start from beginning to end, at a tiny size: `make run` itself, on the real corpus."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT

HEADS = ("softmax", "smooth", "bayes", "sigmoid", "bayes_sigmoid")
TINY = (
    "--n_layer=1 --n_head=1 --n_embd=32 --block_size=64 --max_iters={} --eval_interval=4 "
    "--eval_iters=1"
)


def output_of(*command: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "2", "FORCE_COLOR": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(
    not (ROOT / ".venv" / ".installed").exists(),
    reason="make run would first install .venv: make test",
)
def test_make_run_trains_compares_plots_and_samples_and_goes_on_with_what_is_there(tmp_path):
    output_of(sys.executable, "data/quickstart/prepare.py")
    for head in HEADS[:2]:
        script = "train.py" if head == "softmax" else f"train_{head}.py"
        output_of(
            sys.executable,
            script,
            "config/quickstart.py",
            f"--out_dir={tmp_path / head}",
            *TINY.format(4).split(),
        )
    shown = output_of("make", "run", f"OUT={tmp_path}", f"FLAGS={TINY.format(8)}")
    assert (
        "| val nll" in shown
        and shown.count("== training:") == 5
        and shown.count("resuming at step 4") == 2
    )
    table = shown[shown.index("quickstart, test split") :].splitlines()
    assert [line.split()[0] for line in table[4:10]] == ["unigram", *HEADS]
    for head in HEADS:
        result = json.loads((tmp_path / head / "eval_test.json").read_text())
        assert result["n_tokens"] == 169_343 and result["nll"] < result["unigram_nll"] + 0.5
    assert (tmp_path / "report_test" / "val_nll.png").read_bytes().startswith(b"\x89PNG")
    assert "\033[38;5;" in shown and "epistemic" in shown
