"""mean_loss, the evaluation during training, against all predictions at once."""

import contextlib
import dataclasses
import math

import numpy as np
import pytest
import torch

from engine.base.distributed import Processes
from engine.data.tokens import TokenFile, gather
from engine.data.windows import eval_batches
from engine.eval.generation import generate
from engine.eval.validation import mean_loss
from heads import head as head_module
from model import GPT
from tests.helpers import HEADS, tiny_gpt, write_nanogpt

T = 16


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> TokenFile:
    """Text that tiny_gpt generated, half of it replaced: its accuracy is neither 0 nor 1."""
    torch.manual_seed(0)
    text = generate(tiny_gpt(std=0.3), torch.tensor([[5]]), 40 * T)[0]
    noise = torch.randint(67, text.shape)
    text = torch.where(torch.rand(len(text)) < 0.5, text, noise)
    folder = tmp_path_factory.mktemp("data") / "d"
    return TokenFile(write_nanogpt(folder, {"val": text.numpy()}), "val")


def measure(model: GPT, file: TokenFile) -> dict[str, float]:
    batches = eval_batches(file, T, batch_size=3, n_batches=100)
    cpu = Processes(torch.device("cpu"))
    return mean_loss(model, batches, file, cpu, contextlib.nullcontext())


@pytest.mark.parametrize("weights, likelihood", HEADS)
def test_nll_calibration_error_and_loss_are_those_of_all_predictions_at_once(
    file, weights, likelihood
):
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    model = tiny_gpt(weights, likelihood, std=0.3)
    found = measure(model, file)
    assert model.training
    x, y = gather(file, np.arange(40) * T, T)
    log_probs = model.eval().log_probs(x).double().flatten(0, 1)
    nll = -log_probs.gather(-1, y.view(-1, 1)).mean().item()
    ece = torchmetrics.multiclass_calibration_error(
        log_probs.exp(), y.flatten(), num_classes=67, n_bins=15, norm="l1"
    )
    assert found["val_nll"] == pytest.approx(nll, abs=1e-6)
    assert found["val_perplexity"] == pytest.approx(math.exp(nll), rel=1e-6)
    assert found["val_ece"] == pytest.approx(ece.item(), abs=1e-6)
    assert ece > 1e-3
    assert found["val_loss"] == pytest.approx(model(x, y).item(), rel=1e-5)


def test_certain_predictions_fall_into_the_last_bin_and_nan_stops_nothing(file):
    model = tiny_gpt()
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(1e6)
    assert 0.9 < measure(model, file)["val_ece"] <= 1
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.nan)
    assert all(math.isnan(value) for value in measure(model, file).values())


@pytest.mark.parametrize("estimator", ["local", "sample"])
def test_a_loss_with_noise_is_the_same_in_every_evaluation(file, estimator):
    model = tiny_gpt("bayes")
    weights = model.lm_head.weights
    weights.config = dataclasses.replace(weights.config, estimator=estimator)
    first = measure(model, file)
    assert first == measure(model, file)
    assert first["val_loss"] > first["val_nll"]


def test_scores_do_not_depend_on_the_number_of_positions_at_a_time(monkeypatch):
    head = tiny_gpt("bayes", "sigmoid", std=0.3).lm_head
    x = torch.randn(3, 7, 32)
    targets = torch.randint(67, (3, 7))
    found = head.scores(x, targets)
    monkeypatch.setattr(head_module, "LOGITS_BYTES_PRODUCT", {"cpu": 8 * 67 * 4})
    monkeypatch.setattr(head_module, "LOG_PROBS_BYTES", {"cpu": 2 * 67 * 4})
    torch.testing.assert_close(head.scores(x, targets), found)
