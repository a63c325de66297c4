"""The benchmarks run at tiny shapes and append records with the keys that their readers need."""

import importlib
import math
import sys

import pytest
import torch

from bench.measure import peak_memory
from engine.base.files import read_json_lines

KEYS = {"bench", "case", "baseline", "time_ratio", "memory_ratio", "shapes", "machine", "date"}


@pytest.fixture
def records_of(tmp_path, monkeypatch):
    """Runs a benchmark with --quick and returns its records by case."""
    monkeypatch.setenv("BENCH_RESULTS", str(tmp_path / "results.jsonl"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("bench.measure.keep_memory", lambda: None)

    def run(bench: str, *flags: str) -> dict[str, dict]:
        module = importlib.import_module(f"bench.{bench}")
        monkeypatch.setattr(sys, "argv", [f"{bench}.py", "--quick", *flags])
        with torch._dynamo.config.patch(disable=True):
            module.main()
        records = read_json_lines(tmp_path / "results.jsonl")
        for record in records:
            assert record.keys() >= KEYS
            assert 0 < record["time_ratio"] < math.inf
        return {record["case"]: record for record in records}

    return run


@pytest.mark.parametrize(
    ("bench", "baseline", "cases"),
    [
        ("heads", "plain", ["bayes_bf16", "dense_bce", "torchbnn"]),
        ("step", "softmax", ["dropout", "dense_bce", "torchbnn", "transformers"]),
    ],
)
def test_our_cases_are_compared_with_what_users_write(records_of, bench, baseline, cases):
    records = records_of(bench, "--cases", *cases)
    assert list(records) == cases
    assert {record["baseline"] for record in records.values()} == {baseline}


def test_generate_compares_heads_draws_and_transformers(records_of):
    cases = {"softmax", "bayes", "softmax_float32", "transformers", "bayes, draws: 16"}
    assert records_of("generate").keys() == cases


def test_peak_memory_is_what_a_call_needs_the_second_time_too():
    def case():
        a = torch.ones(16 << 20)  # 64 MiB
        a = a + 1
        return a.sum()

    for _ in range(2):
        assert peak_memory(case) == pytest.approx(128 << 20, rel=1e-4)
