"""The quick start from beginning to end, at a tiny size: `make run` itself, on the real corpus."""

import sys

import pytest

from engine.base.files import read_json
from tests.helpers import ROOT, flags, output_of

HEADS = ("softmax", "smooth", "bayes", "sigmoid", "bayes_sigmoid")
TINY = flags(n_layer=1, n_head=1, n_embd=32, block_size=64, eval_interval=4, eval_iters=1)


@pytest.mark.slow
@pytest.mark.skipif(
    not (ROOT / ".venv" / ".installed").exists(),
    reason="make run would first install .venv: make test",
)
def test_make_run_resumes_trains_compares_and_samples(tmp_path):
    output_of(sys.executable, "data/quickstart/prepare.py")
    started = ["train.py", "config/quickstart.py", f"--out_dir={tmp_path}/softmax", *TINY]
    output_of(sys.executable, *started, "--max_iters=4")
    options = " ".join([*TINY, "--max_iters=8"])
    shown = output_of("make", "run", f"OUT={tmp_path}", f"FLAGS={options}", FORCE_COLOR="1")
    assert shown.count("resuming at step 4") == 1
    table = shown[shown.index("quickstart, test split") :].splitlines()
    assert [line.split()[0] for line in table[4:10]] == ["unigram", *HEADS]
    for head in HEADS:
        result = read_json(tmp_path / head / "eval_test.json")
        assert result["n_tokens"] == 169_343
        assert result["nll"] < result["unigram_nll"] + 0.5
    assert (tmp_path / "report_test" / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert "\033[38;5;" in shown and "epistemic" in shown
