"""The quick start from beginning to end, at a tiny size: `make run` itself, on the real corpus."""

import json
import os
import subprocess

import pytest

from tests.helpers import ROOT

HEADS = ("softmax", "smooth", "bayes", "sigmoid", "bayes_sigmoid")
TINY = "--n_layer=1 --n_head=1 --n_embd=32 --block_size=64 --max_iters={} --eval_interval=4 --eval_iters=1"


def make_run(out, max_iters: int) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "2", "FORCE_COLOR": "1"}
    command = ["make", "run", f"OUT={out}", f"FLAGS={TINY.format(max_iters)}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(
    not (ROOT / ".venv" / ".installed").exists(), reason="make run would first install .venv: make test"
)
def test_make_run_trains_compares_plots_and_samples_and_a_second_run_goes_on(tmp_path):
    first = make_run(tmp_path, max_iters=4)
    assert "| val nll" in first and first.count("== training:") == 5
    second = make_run(tmp_path, max_iters=8)
    assert second.count("going on at step 4") == 5
    table = second[second.index("quickstart, test split") :].splitlines()
    assert [line.split()[0] for line in table[4:10]] == ["unigram", *HEADS]
    for head in HEADS:
        result = json.loads((tmp_path / head / "eval_test.json").read_text())
        assert result["n_tokens"] == 169_343 and result["nll"] < result["unigram_nll"] + 0.5
    assert (tmp_path / "report_test" / "val_nll.png").read_bytes().startswith(b"\x89PNG")
    assert "\033[38;5;" in second and "epistemic" in second
