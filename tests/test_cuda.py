"""What needs a GPU: the checks of tests/cuda_checks.py, as bench/gpu.py runs them."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench.gpu import SECONDS
from tests.helpers import ROOT

CHECKS = [part for part in SECONDS if part != "speed"]


def gpu(folder, *flags, **environment) -> dict:
    """The results of bench/gpu.py by part, all of which must have passed."""
    subprocess.run(
        [sys.executable, "bench/gpu.py", f"--out={folder}", *flags],
        cwd=ROOT,
        env=os.environ | environment,
        check=True,
    )
    results = json.loads((folder / "results.json").read_text())
    del results["environment"]
    for part, found in results.items():
        assert found["exit_code"] == 0, (part, found)
        assert [case for case in found["cases"] if not case["ok"]] == []
    return results


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("part", CHECKS)
def test_a_gpu_computes_what_a_cpu_does(part, tmp_path):
    gpu(tmp_path, f"--only={part}")


@pytest.mark.slow
def test_the_gpu_script_and_its_checks_pass_on_a_cpu(tmp_path):
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    results = gpu(tmp_path, "--quick", **environment)
    assert list(results) == list(SECONDS) and all(found["cases"] for found in results.values())
