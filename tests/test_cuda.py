"""What needs a GPU: the checks of tests/cuda_checks.py, as bench/gpu.py runs them."""

import subprocess
import sys

import pytest
import torch

from engine.base.files import read_json
from tests.cuda_checks import CHECKS
from tests.helpers import ROOT


def passes(folder, *flags) -> dict:
    """The results of bench/gpu.py by part, in which every case has passed."""
    command = [sys.executable, "bench/gpu.py", f"--out={folder}", *flags]
    subprocess.run(command, cwd=ROOT, check=True)
    results = read_json(folder / "results.json")
    del results["environment"]
    for part, found in results.items():
        assert found["exit_code"] == 0 and found["cases"], (part, found)
        assert [case for case in found["cases"] if not case["ok"]] == []
    return results


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("part", CHECKS)
def test_a_gpu_computes_what_a_cpu_does(part, tmp_path):
    passes(tmp_path, f"--only={part}")


@pytest.mark.slow
def test_the_gpu_script_and_its_checks_pass_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert list(passes(tmp_path, "--quick")) == [*CHECKS, "speed"]
