"""What a run says it will cost, against what it costs."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engine.runs import budget
from tests.helpers import HEADS, ROOT, records, run, tiny_gpt, write_words

SHAPES = {
    "quickstart": {"n_layer": 3, "n_head": 3, "n_embd": 192, "block_size": 256, "vocab_size": 2048},
    "many ids": {"n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 128, "vocab_size": 50257},
    "deep": {
        "n_layer": 8,
        "n_head": 4,
        "n_embd": 256,
        "block_size": 128,
        "vocab_size": 307,
        "batch_size": 16,
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    "options", [{}, {"tie_head": False}, {"bias": True}, {"bayes_mlp": True, "posterior": "full"}]
)
@pytest.mark.parametrize(("weights", "likelihood"), HEADS)
def test_backbone_head_and_posterior_add_up_to_all_parameters(weights, likelihood, options):
    model = tiny_gpt(weights, likelihood, **options)
    counts = budget.parameters(model)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert (counts["posterior"] > 0) == (weights == "bayes" or "bayes_mlp" in options)
    assert counts["head"] == 67 * 32 + (67 if model.lm_head.bias is not None else 0)


@pytest.mark.parametrize("tie_head", [True, False])
def test_flops_are_those_that_torch_counts(tie_head):
    model = tiny_gpt(n_embd=64, tie_head=tie_head).train()
    idx = torch.randint(67, (3, 16))
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):  # flash computes scores twice
        model(idx, idx).backward()
    gains = sum(p.numel() for p in model.parameters() if p.dim() == 1)  # not in matrix products
    in_place = (
        2 * model.lm_head.weights.weight.numel()
    )  # addmm_, of the output weights' gradient: torch passes it over
    assert counter.get_total_flops() == idx.numel() * (
        model.flops_per_token() - 6 * gains - in_place
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ("quickstart", {}),
        ("quickstart", {"gradient_checkpointing": True, "dtype": "float32"}),
        ("many ids", {"dtype": "float32", "n_micro": 2}),
        ("many ids", {"weights": "bayes", "dtype": "float32"}),
        ("deep", {"dtype": "float32"}),
        ("deep", {"gradient_checkpointing": True, "dtype": "float32"}),
        ("deep", {"dropout": 0.1, "dtype": "float32", "n_head": 8, "block_size": 256}),
    ],
)
def test_the_estimate_is_within_a_factor_of_two_of_a_steps_peak(shape, options):
    command = [sys.executable, "-m", "tests.budget_worker", json.dumps(SHAPES[shape] | options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0.5 < found["total"] / found["measured"] < 2, found


def test_checkpointing_accumulating_and_sharding_move_the_estimate_as_they_move_memory():
    plain, less = (tiny_gpt(n_layer=8, gradient_checkpointing=on) for on in (False, True))
    of = lambda model, n_micro=1, shards=1: budget.memory(model, 64, n_micro, "float32", shards)  # noqa: E731
    assert of(less).activations < of(plain).activations / 2
    assert of(plain, n_micro=2).state == of(plain).state * 16 / 12
    assert of(plain, shards=4).state == of(plain).state // 4


def test_what_does_not_fit_is_said_before_training_and_trains_all_the_same(
    data, tmp_path, monkeypatch, capsys
):
    run(data, tmp_path / "fits", max_iters=1)
    assert "GB are free" not in capsys.readouterr().err
    monkeypatch.setattr(budget, "available", lambda device: 1000)
    run(data, tmp_path / "out", max_iters=1)
    warned = capsys.readouterr().err
    assert warned.count("\n") == 1 and records(tmp_path / "out", "loss")
    for option in (
        "--batch_size",
        "--gradient_accumulation_steps",
        "--block_size",
        "--gradient_checkpointing",
    ):
        assert option in warned
    assert "--sharding=fsdp" in warned


def group(folder, limit, used, cache):
    """A control group of version 2, or of version 1 below memory/."""
    folder.mkdir(parents=True, exist_ok=True)
    first = "memory" in folder.parts
    (folder / ("memory.limit_in_bytes" if first else "memory.max")).write_text(f"{limit}\n")
    (folder / ("memory.usage_in_bytes" if first else "memory.current")).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"cache 9\n{'total_' if first else ''}inactive_file {cache}\n"
    )


@pytest.mark.parametrize(
    ("mount", "line"), [("", "0::/slurm/job_1\n"), ("memory", "4:cpu,memory:/slurm/job_1\n0::/\n")]
)
def test_the_least_that_a_control_group_or_one_above_leaves_counts_without_the_page_cache(
    tmp_path, monkeypatch, mount, line
):
    (tmp_path / "cgroup").write_text(line)
    monkeypatch.setattr(budget, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(budget, "MOUNTED", tmp_path)
    slurm, free = tmp_path / mount / "slurm", lambda: budget.available(torch.device("cpu"))
    group(slurm / "job_1", 9000, 4000, 1000)
    assert free() == 6000
    group(slurm, 5000, 2500, 500)
    assert free() == 3000
    group(tmp_path / mount, "max", 1, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert free() == 1000
    group(slurm / "job_1", 9000, 9500, 0)
    assert free() == 0
    group(slurm / "job_1", "max", 9500, 0)
    group(slurm, "max", 9500, 0)
    assert free() > 10**6


def test_no_free_memory_is_warned_of_and_unknown_memory_is_not(monkeypatch, tmp_path, capsys):
    needed = budget.Memory(10, 10, 10, 10, 10)
    budget.warn_if_too_much(needed, 0, 20)
    assert "lower --batch_size" in capsys.readouterr().err
    monkeypatch.setattr(budget, "CGROUPS", tmp_path / "none")
    monkeypatch.setattr(budget, "_free", lambda: None)
    assert budget.available(torch.device("cpu")) is None
    budget.warn_if_too_much(needed, None, 20)
    assert not capsys.readouterr().err and " of " not in budget.memory_lines(needed, None, 20)[0]


def test_the_parts_of_the_memory_add_up_to_what_the_banner_says():
    line = budget.memory_lines(
        budget.memory(tiny_gpt(n_layer=8, n_embd=256), 64, 2, "float32"), None, 0
    )[0]
    total, *parts = map(float, re.findall(r"\d+\.\d\d", line))
    assert total == pytest.approx(sum(parts), abs=0.03) and len(parts) == 5 and parts[-1] > 0.03


def test_half_precision_adds_the_casts_of_all_but_the_output_weights():
    model = tiny_gpt()
    n_bytes = 2 * (
        sum(p.numel() for p in model.parameters()) - model.lm_head.weights.weight.numel()
    )
    activations = budget._activations(model, 64, "cpu", 2)
    assert budget.memory(model, 64, 1, "bfloat16").activations == activations + n_bytes


def test_dropout_adds_scores_of_all_pairs_on_a_cpu_and_masks_elsewhere():
    plain, dropped = (tiny_gpt(dropout=rate) for rate in (0.0, 0.1))

    def more(device):
        return budget._activations(dropped, 64, device, 4) - budget._activations(
            plain, 64, device, 4
        )

    shape, n_tokens = dropped.config, 64 * dropped.config.block_size
    masks = 2 * n_tokens * shape.n_layer * shape.n_embd
    assert more("cuda") == masks
    assert more("cpu") == 4 * masks + n_tokens * shape.n_layer * shape.n_head * shape.block_size * (
        4 * 4 + 8
    )


def test_on_cuda_the_devices_own_memory_counts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 9))
    assert budget.available(SimpleNamespace(type="cuda")) == 7


def test_the_banner_tells_size_step_run_memory_and_code_in_short_lines(data, tmp_path, capsys):
    model = run(data, tmp_path, weights="bayes", max_iters=4, gradient_accumulation_steps=2)
    lines = capsys.readouterr().out.splitlines()[:7]
    assert lines[0] == f"{tmp_path}: bayes x categorical head, float32, eager, on 1 x cpu"
    assert [line.split()[0] for line in lines[1:]] == [
        "parameters",
        "a",
        "the",
        "memory",
        "(Python",
        "code",
    ]
    assert f": backbone {budget.parameters(model)['backbone']:,}, head" in lines[1]
    assert "256 tokens (2 micro-batches of 8 blocks of 16)" in lines[2]
    assert (
        f"{4 * 256 * model.flops_per_token():.1e} FLOPs" in lines[3]
        and "4 steps, 1,024 tokens" in lines[3]
    )
    assert f"torch {torch.__version__}" in lines[6] and max(map(len, lines[1:])) < 180


def test_one_step_is_no_plural(data, tmp_path, capsys):
    run(data, tmp_path, max_iters=1)
    assert " 1 step, " in capsys.readouterr().out


def test_eval_only_tells_of_no_training(data, tmp_path, capsys):
    run(data, tmp_path, eval_only=True)
    assert "parameters" in (printed := capsys.readouterr().out) and "a step" not in printed
