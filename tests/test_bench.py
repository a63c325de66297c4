"""The benchmarks run at tiny shapes and append records with the keys that their readers need."""

import importlib
import json
import math
import sys

import pytest
import torch

from bench import measure
from bench.heads import OURS
from bench.measure import peak_memory
from bench.step import prepare, shapes_of

KEYS = {"bench", "case", "baseline", "time_ratio", "seconds", "shapes", "machine", "torch", "date"}


@pytest.fixture
def records_of(tmp_path, monkeypatch, capsys):
    """Runs a benchmark with --quick in this process and returns its records."""
    monkeypatch.setenv("BENCH_RESULTS", str(tmp_path / "results.jsonl"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # for the processes that it starts
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(bench: str, *flags: str, keys: frozenset[str] = frozenset()) -> list[dict]:
        module = importlib.import_module(f"bench.{bench}")
        monkeypatch.setattr(module, "keep_memory", lambda: None, raising=False)
        monkeypatch.setattr(sys, "argv", [f"{bench}.py", "--quick", *flags])
        with torch._dynamo.config.patch(disable=True):
            module.main()
        printed = capsys.readouterr().out
        records = list(map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines()))
        for record in records:
            assert record.keys() >= KEYS | keys
            for name in ("time_ratio", *keys & {"memory_ratio"}):
                assert math.isfinite(record[name]) and record[name] > 0
            assert f"  {record['case']} " in printed
        return records

    return run


IN_PROCESSES = frozenset({"memory_ratio", "peak_mib", "allocator"})


@pytest.mark.parametrize("malloc", ["default", "tuned"])
def test_heads_compares_heads_and_what_users_write_with_the_plain_one(records_of, malloc):
    cases = ["bayes_bf16", "torchbnn"]
    records = records_of("heads", f"--malloc={malloc}", "--cases", *cases, keys=IN_PROCESSES)
    found = [(record["allocator"], record["case"]) for record in records]
    assert found == [(malloc, case) for case in cases]
    assert {(record["bench"], record["baseline"]) for record in records} == {("heads", "plain")}


def test_step_compares_heads_and_what_users_write_with_our_softmax(records_of):
    expected = {"dropout": "tuned", "transformers": "default", "dense_bce": "default"}
    records = records_of("step", "--cases", *expected, keys=IN_PROCESSES)
    assert {record["case"]: record["allocator"] for record in records} == expected
    assert {(record["bench"], record["baseline"]) for record in records} == {("step", "softmax")}


def test_the_dropout_case_trains_with_dropout_and_the_others_without():
    for case, rate in {"dropout": 0.1, "softmax": 0.0}.items():
        assert prepare(case, **shapes_of("quick")).model.config.dropout == rate


def test_tokenise_prints_speed_and_memory(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tokenise.py", "--quick"])
    importlib.import_module("bench.tokenise").main()
    assert "549 tokens" in (printed := capsys.readouterr().out)
    assert "tokens/s" in printed and "MiB" in printed


def test_generate_compares_heads_draws_and_transformers_at_two_batch_sizes(records_of):
    records = records_of("generate")
    cases = {"softmax", "bayes", "softmax_float32", "transformers", "bayes, draws: 16"}
    assert {record["case"] for record in records} == cases and len(records) == 10


def test_on_a_gpu_all_cases_share_one_process(records_of, monkeypatch):
    monkeypatch.setattr(measure, "InProcess", measure.prepared)
    monkeypatch.setattr(measure, "keep_memory", lambda: None)
    records = records_of("step", "--cases", *OURS, keys=IN_PROCESSES)
    assert {record["case"] for record in records} == OURS.keys() - {"softmax"}


def test_an_unknown_case_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["heads.py", "--cases", "torchbn"])
    with pytest.raises(SystemExit):
        measure.arguments("A benchmark.", ["torchbnn"])
    assert "torchbn" in capsys.readouterr().err


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="peak memory is read from Linux's /proc"
)
def test_peak_memory_is_what_a_call_needs_the_second_time_too():
    def case():
        a = torch.ones(16 << 20)  # 64 MiB
        a = a + 1
        return a.sum()

    for _ in range(2):
        assert 127 < peak_memory(case) / 2**20 < 136
