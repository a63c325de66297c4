"""The benchmarks run at tiny shapes and append records with the keys that their readers need."""

import importlib
import math
import sys

import pytest
import torch

from bench import measure
from bench.measure import peak_memory
from engine.base.files import read_json_lines

KEYS = {"bench", "case", "baseline", "time_ratio", "seconds", "shapes", "machine", "torch", "date"}
MEMORY_KEYS = {"memory_ratio", "peak_mib"}


@pytest.fixture
def records_of(tmp_path, monkeypatch):
    """Runs a benchmark with --quick in this process and returns its records by case."""
    monkeypatch.setenv("BENCH_RESULTS", str(tmp_path / "results.jsonl"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # for the processes that it starts
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(bench: str, *flags: str, keys=KEYS | MEMORY_KEYS) -> dict[str, dict]:
        module = importlib.import_module(f"bench.{bench}")
        monkeypatch.setattr(module, "keep_memory", lambda: None, raising=False)
        monkeypatch.setattr(sys, "argv", [f"{bench}.py", "--quick", *flags])
        with torch._dynamo.config.patch(disable=True):
            module.main()
        records = read_json_lines(tmp_path / "results.jsonl")
        for record in records:
            assert record.keys() >= keys
            assert 0 < record["time_ratio"] < math.inf
        return {record["case"]: record for record in records}

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "bench, baseline, cases",
    [
        ("heads", "plain", ["bayes_bf16", "torchbnn"]),
        ("step", "softmax", ["dropout", "dense_bce"]),
    ],
)
def test_our_cases_and_what_users_write_have_processes_of_their_own(
    records_of, bench, baseline, cases
):
    records = records_of(bench, "--cases", *cases)
    assert list(records) == cases
    assert {record["baseline"] for record in records.values()} == {baseline}


def test_on_a_gpu_all_cases_share_one_process(records_of, monkeypatch):
    monkeypatch.setattr(measure, "InProcess", measure.prepared)
    cases = ["bayes", "plain"]
    assert list(records_of("step", "--cases", *cases)) == cases


def test_generate_compares_heads_draws_and_transformers(records_of):
    cases = {"softmax", "bayes", "softmax_float32", "transformers", "bayes, draws: 16"}
    assert records_of("generate", keys=KEYS).keys() == cases


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="memory is read from Linux's /proc"
)
def test_peak_memory_is_what_a_call_needs_the_second_time_too():
    def case():
        a = torch.ones(16 << 20)  # 64 MiB
        a = a + 1
        return a.sum()

    for _ in range(2):
        assert 127 < peak_memory(case) / 2**20 < 136
