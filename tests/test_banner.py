"""What a run prints first, and what config.json records of its starts."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engine.runs import banner
from tests.helpers import HEADS, ROOT, run, tiny_gpt, write_words


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    "options", [{}, {"tie_head": False}, {"bias": True}, {"bayes_mlp": True, "posterior": "full"}]
)
@pytest.mark.parametrize(("weights", "likelihood"), HEADS)
def test_backbone_head_and_posterior_add_up_to_all_parameters(weights, likelihood, options):
    model = tiny_gpt(weights, likelihood, **options)
    counts = banner.count_parameters(model)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert (counts["posterior"] > 0) == (weights == "bayes" or "bayes_mlp" in options)
    assert counts["head"] == 67 * 32 + (67 if model.lm_head.bias is not None else 0)


@pytest.mark.parametrize("tie_head", [True, False])
def test_flops_are_those_that_torch_counts(tie_head):
    model = tiny_gpt(n_embd=64, tie_head=tie_head).train()
    idx = torch.randint(67, (3, 16))
    # flash attention computes scores twice
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(idx, idx).backward()
    gains = sum(p.numel() for p in model.parameters() if p.dim() == 1)  # not in matrix products
    # torch does not count addmm_, which adds up the output weights' gradient
    in_place = 2 * model.lm_head.weights.weight.numel()
    per_token = model.flops_per_token() - 6 * gains - in_place
    assert counter.get_total_flops() == idx.numel() * per_token


def test_the_banner_shows_size_step_run_and_code_in_short_lines(data, tmp_path, capsys):
    model = run(data, tmp_path, weights="bayes", max_iters=4, gradient_accumulation_steps=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}: bayes x categorical head, float32, eager, adamw, on 1 x cpu"
    assert [line.split()[0] for line in lines[1:5]] == ["parameters", "a", "the", "code"]
    assert f": backbone {banner.count_parameters(model)['backbone']:,}, head" in lines[1]
    assert "256 tokens (2 x 8 blocks of 16)" in lines[2]
    assert f"{4 * 256 * model.flops_per_token():.1e} FLOPs" in lines[3]
    assert "4 steps, 1,024 tokens" in lines[3]
    assert f"torch {torch.__version__}" in lines[4] and max(map(len, lines[1:])) < 180


def test_eval_only_prints_nothing_of_training(data, tmp_path, capsys):
    run(data, tmp_path, eval_only=True)
    printed = capsys.readouterr().out
    assert "parameters" in printed and "a step" not in printed


def test_config_json_lists_the_starts_of_a_run_with_their_code(data, tmp_path, monkeypatch):
    def written():
        return json.loads((tmp_path / "config.json").read_text())

    run(data, tmp_path, max_iters=2, lr_decay_iters=8)
    (first,) = written()["starts"]
    assert first["step"] == 0 and first["commit"] and first["command"]
    assert written()["environment"].items() <= first.items()
    run(data, tmp_path, max_iters=4, lr_decay_iters=8, init_from="resume")
    assert [start["step"] for start in written()["starts"]] == [0, 2]
    monkeypatch.setattr(banner, "_git", lambda *_: "other")
    run(data, tmp_path, max_iters=6, lr_decay_iters=8, init_from="resume")
    assert written()["starts"][-1]["diff"] == "other"
    # as older versions wrote it
    (tmp_path / "config.json").write_text(json.dumps({"environment": first}))
    run(data, tmp_path, max_iters=8, init_from="resume")
    assert [start["step"] for start in written()["starts"]] == [6]


def test_the_diff_holds_uncommitted_changes_of_this_repository_alone(tmp_path):
    def git(*words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    def code():
        ask = "from engine.runs.banner import _git, environment; "
        ask += "print(environment()['commit'], _git('diff', 'HEAD', '--', '*.py'))"
        command = [sys.executable, "-c", ask]
        done = subprocess.run(command, cwd=copy, check=True, capture_output=True, text=True)
        return done.stdout

    copy = tmp_path / "copy"
    hidden = shutil.ignore_patterns("__pycache__")
    for folder in ("engine", "heads"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=hidden)
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "someone else's")
    assert code().split() == ["unknown"]
    shutil.move(tmp_path / ".git", copy)
    tmp_path = copy
    git("add", "engine")
    git("commit", "-q", "-m", "ours")
    with open(copy / "engine" / "base" / "optim.py", "a") as file:
        file.write("changed = True\n")
    found = code()
    assert "-dirty" in found.split()[0] and "+changed = True" in found
