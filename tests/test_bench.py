"""The benchmarks run at tiny shapes and append records with the keys that their readers rely on."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Set
from pathlib import Path

import pytest
import torch

from bench.heads import OURS
from bench.measure import peak_memory
from bench.step import QUICK, prepare
from tests.helpers import ROOT

KEYS = {
    "bench",
    "case",
    "baseline",
    "time_ratio",
    "memory_ratio",
    "shapes",
    "allocator",
    "machine",
    "date",
}
WITHOUT_MEMORY = KEYS - {"memory_ratio", "allocator"}


def run_bench(script: str, folder: Path, *flags: str) -> subprocess.CompletedProcess:
    environment = {"BENCH_RESULTS": str(folder / "results.jsonl"), "CUDA_VISIBLE_DEVICES": ""}
    environment = os.environ | environment | {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "bench" / script), *flags]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def records_of(script: str, tmp_path: Path, *flags: str, keys: Set[str] = KEYS) -> list[dict]:
    done = run_bench(script, tmp_path, "--quick", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    for record in records:
        in_tuned_heads = (
            record["bench"] == "heads" and record["allocator"] == "tuned"
        )  # where a peak says little
        assert record.keys() >= (keys - {"memory_ratio"} if in_tuned_heads else keys)
        assert all(
            math.isfinite(record[name]) and record[name] > 0
            for name in record
            if name.endswith("ratio")
        )
        assert f"  {record['case']} " in done.stdout
    return records


def test_heads_compares_heads_and_what_users_write_with_the_plain_one_under_both_allocators(
    tmp_path,
):
    records = records_of("heads.py", tmp_path, "--cases=softmax,bayes_bf16,torchbnn_dense_bce")
    cases = ["softmax", "bayes_bf16", "torchbnn_dense_bce"]
    assert [(r["allocator"], r["case"]) for r in records] == [
        (a, c) for a in ("default", "tuned") for c in cases
    ]
    assert {(r["bench"], r["baseline"]) for r in records} == {("heads", "plain")}


def test_step_compares_heads_and_what_users_write_with_our_softmax(tmp_path):
    records = records_of(
        "step.py",
        tmp_path,
        "--cases=bayes,dropout,plain_tuned,plain,transformers,torchbnn_dense_bce",
    )
    expected = {"bayes": "tuned", "dropout": "tuned", "plain_tuned": "tuned"}
    expected |= dict.fromkeys(("plain", "transformers", "torchbnn_dense_bce"), "default")
    assert {record["case"]: record["allocator"] for record in records} == expected
    assert {(record["bench"], record["baseline"]) for record in records} == {("step", "softmax")}


def test_the_dropout_case_trains_with_dropout_and_the_others_without():
    for case, rate in {"dropout": 0.1, "softmax": 0.0}.items():
        assert prepare(case, **QUICK).model.config.dropout == rate


def test_evaluate_compares_draws_with_one_of_them_for_both_bayesian_heads(tmp_path):
    records = records_of("evaluate.py", tmp_path, keys=WITHOUT_MEMORY)
    expected = [
        (f"{head}, draws: {n}", f"{head}, draws: 1")
        for head in ("bayes", "bayes_sigmoid")
        for n in (0, 16, -1)
    ]
    assert [(record["case"], record["baseline"]) for record in records] == expected


def test_tokenise_compares_ours_with_datasets_map_which_finds_as_many_tokens(tmp_path):
    records = records_of("tokenise.py", tmp_path, keys=WITHOUT_MEMORY)
    assert records[-1]["case"] == "ours_1" and records[0]["baseline"].startswith("datasets_map")
    assert {record["shapes"]["tokens"] for record in records} == {649}


def test_generate_compares_heads_draws_and_transformers_at_two_batch_sizes(tmp_path):
    records = records_of("generate.py", tmp_path, keys=WITHOUT_MEMORY)
    cases = {"softmax", "sigmoid", "bayes", "transformers", "bayes, draws: 16"}
    assert {record["case"] for record in records} == cases and len(records) == 12


def test_hellaswag_compares_contexts_read_once_with_endings_apart_and_with_four_rows(tmp_path):
    item = {
        "ctx": "Two women sit in a canoe.",
        "endings": ["They row.", "They fly away.", "It barks.", "No."],
    }
    (tmp_path / "items.jsonl").write_text(f"{json.dumps(item)}\n" * 3)
    records = records_of(
        "hellaswag.py", tmp_path, "--source=items.jsonl", "--items=2", keys=WITHOUT_MEMORY
    )
    assert [(r["case"], r["baseline"]) for r in records] == [
        ("shared", "separate"),
        ("shared", "four_rows"),
    ]


def test_gpu_runs_its_five_parts_at_tiny_shapes_and_without_them_asks_for_a_gpu(tmp_path):
    cases = {}
    for record in records_of("gpu.py", tmp_path, keys=WITHOUT_MEMORY | {"seconds"}):
        cases.setdefault(record["bench"], []).append(record["case"])
    assert {"gpu_attention", "gpu_products", "gpu_steps", "gpu_heads", "gpu_decode"} == cases.keys()
    assert cases["gpu_steps"] == list(OURS) and len(cases["gpu_decode"]) == 2 * 2 * (3 - 1)
    done = run_bench("gpu.py", tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "CUDA" in done.stderr


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
