"""Muon and AdamW as one optimizer, against torch's own two."""

import shutil

import pytest
import torch
from torch.nn import functional as F

from engine.base.files import read_json
from engine.base.optim import make_optimizer, orthogonal
from tests.helpers import assert_close_in_norm, difference, refusal, run, tiny_gpt
from train import TrainConfig


def gradients(model, seed: int) -> None:
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn_like(p)


def test_muon_moves_the_blocks_matrices_as_torchs_muon_and_the_rest_as_adamw():
    model = tiny_gpt("bayes", bayes_mlp=True)
    reference = tiny_gpt("bayes", bayes_mlp=True)
    matrices, decayed, others = [], [], []
    for name, p in reference.named_parameters():
        is_matrix = p.dim() == 2 and "log_std" not in name
        in_block = ".h." in name
        (others, decayed, matrices)[is_matrix + (is_matrix and in_block)].append(p)
    assert len(matrices) == 2 * 4
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=10, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(decayed, lr=1e-2, betas=(0.9, 0.95), weight_decay=10)
    plain = torch.optim.AdamW(others, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    optimizer = make_optimizer(model, 1e-2, (0.9, 0.95), 10, "muon")
    for step in range(30):
        gradients(model, step)
        gradients(reference, step)
        for each in (optimizer, muon, adamw, plain):
            each.step()
    # the iterations round otherwise; another momentum, 0.9, would differ by 1.4e-2
    assert difference(model, reference) < 4e-3


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("rows, columns", [(192, 48), (32, 32), (32, 128)])
def test_muons_iterations_are_newton_schulzs_if_one_direction_dominates(
    rows, columns, dtype, tolerance
):
    torch.manual_seed(0)
    one_direction = torch.rand(20, rows, 1) @ torch.rand(20, 1, columns)
    x = one_direction + 0.1 * torch.randn(20, rows, columns)
    expected = F.normalize(x.double(), dim=(1, 2))
    for _ in range(5):
        gram = expected @ expected.mT
        polynomial = -4.7750 * gram + 2.0315 * gram @ gram
        expected = 3.4445 * expected + polynomial @ expected
    found = orthogonal(x.to(dtype)).double()
    assert_close_in_norm([found], [expected], tolerance)


def test_a_step_that_is_not_finite_changes_nothing():
    """float16's scaler leaves out a step of the two optimizers together."""
    model = tiny_gpt()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    optimizer = make_optimizer(model, 1e-2, (0.9, 0.95), 0.1, "muon")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(1))
    gradients(model, 0)
    model.transformer.ln_f.weight.grad[0] = torch.inf
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert not optimizer.state


def test_a_run_keeps_its_optimizer(words_data, trained, tmp_path):
    shutil.copytree(trained(), tmp_path / "run")
    assert "optimizer" in refusal(
        run, words_data, tmp_path / "run", init_from="resume", optimizer="muon", max_iters=40
    )
    run(words_data, tmp_path / "tuned", init_from=trained(), optimizer="muon", max_iters=2)
    assert read_json(tmp_path / "tuned/config.json")["optimizer"] == "muon"


def test_shards_have_no_muon():
    assert "--sharding=none" in refusal(TrainConfig, optimizer="muon", sharding="fsdp")
