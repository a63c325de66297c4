"""What a run prints first, and what config.json records of its starts."""

import subprocess

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engine.base.files import read_json
from engine.runs import banner
from tests.helpers import run, tiny_gpt


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


def test_config_json_has_all_options_and_the_starts_of_a_run(words_data, tmp_path, monkeypatch):
    def start(**options) -> dict:
        run(words_data, tmp_path, lr_decay_iters=8, **options)
        return read_json(tmp_path / "config.json")

    monkeypatch.setenv("PATH", str(tmp_path))  # without git
    written = start(max_iters=2, dropout=0.1)
    (first,) = written["starts"]
    assert written["dropout"] == 0.1 and first["command"]
    assert first["commit"] == "unknown"
    assert banner.environment().items() <= first.items()
    monkeypatch.setattr(banner, "_git", lambda *_: "other")
    first, second = start(max_iters=4, init_from="resume")["starts"]
    assert (first["step"], second["step"], second["diff"]) == (0, 2, "other")


def test_the_diff_holds_uncommitted_changes_of_this_repository_alone(tmp_path, monkeypatch):
    def git(*words: str) -> None:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "code.py").touch()
    git("add", "code.py")
    git("commit", "-q", "-m", "ours")
    monkeypatch.setattr(banner, "ROOT", tmp_path)
    (tmp_path / "code.py").write_text("changed = True\n")
    assert banner.environment()["commit"].endswith("-dirty")
    assert "+changed = True" in banner._git("diff", "HEAD", "--", "*.py")
