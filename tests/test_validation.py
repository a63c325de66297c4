"""What training measures on the validation text at each evaluation."""

import contextlib
import math

import numpy as np
import pytest
import torch

from engine.base.distributed import Processes
from engine.data.tokens import TokenFile, gather
from engine.data.windows import eval_batches
from engine.eval.generation import generate
from engine.eval.validation import mean_loss
from heads import head as heads
from heads import token_scores
from tests.helpers import HEADS, tiny_gpt, write_nanogpt

CPU = Processes(torch.device("cpu"))
T = 16


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> TokenFile:
    """What a tiny_gpt itself would say, half of it overwritten: its accuracy is then neither 0 nor
    1.
    """
    torch.manual_seed(0)
    text = generate(tiny_gpt(std=0.3), torch.tensor([[5]]), 40 * T)[0]
    text = torch.where(torch.rand(len(text)) < 0.5, text, torch.randint(67, text.shape)).numpy()
    return TokenFile(write_nanogpt(tmp_path_factory.mktemp("data") / "d", {"val": text}), "val")


def whole(model, file, batches) -> tuple[torch.Tensor, torch.Tensor]:
    """All predictions (N, V), float64, and targets (N,) of the batches at once."""
    x, y = gather(file, np.concatenate(batches), T)
    with torch.no_grad():
        return model.log_probs(x).double().flatten(0, 1), y.flatten()


@pytest.mark.parametrize(("weights", "likelihood"), HEADS)
def test_an_evaluation_has_the_nll_and_calibration_error_of_all_predictions_at_once(
    file, weights, likelihood
):
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    model, batches = (
        tiny_gpt(weights, likelihood, std=0.3),
        eval_batches(file, T, batch_size=3, n_batches=100),
    )
    found = mean_loss(model, batches, file, CPU, contextlib.nullcontext())
    log_probs, targets = whole(model, file, batches)
    nll = -log_probs.gather(-1, targets.unsqueeze(-1)).mean().item()
    assert found["val_nll"] == pytest.approx(nll, abs=1e-6)
    assert found["val_perplexity"] == pytest.approx(math.exp(nll), rel=1e-6)
    ece = torchmetrics.multiclass_calibration_error(
        log_probs.exp(), targets, log_probs.size(-1), n_bins=15, norm="l1"
    )
    assert found["val_ece"] == pytest.approx(ece.item(), abs=1e-6) and ece > 1e-3


def test_a_token_of_highest_confidence_falls_into_the_last_bin_and_a_nan_stops_nothing(
    file,
):
    model = tiny_gpt()
    batches = eval_batches(file, T, 3, 2)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(1e6)
    sure = mean_loss(model, batches, file, CPU, contextlib.nullcontext())
    assert 0.9 < sure["val_ece"] <= 1 and sure["val_perplexity"] == math.exp(700)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.nan)
    nothing = mean_loss(model, batches, file, CPU, contextlib.nullcontext())
    assert next(iter(nothing)) == "val_nll" and all(math.isnan(value) for value in nothing.values())


def test_scores_do_not_depend_on_how_many_positions_are_worked_on_at_a_time(monkeypatch):
    head = tiny_gpt("bayes", "sigmoid", std=0.3).lm_head
    x, targets = torch.randn(3, 7, head.weights.weight.size(1)), torch.randint(67, (3, 7))
    found = head.scores(x, targets)
    rows = []
    monkeypatch.setattr(
        head.likelihood,
        "log_probs",
        lambda z, whole=head.likelihood.log_probs: rows.append(len(z)) or whole(z),
    )
    monkeypatch.setattr(heads, "LOGITS_BYTES_PRODUCT", {"cpu": 8 * 67 * 4})
    monkeypatch.setattr(heads, "LOG_PROBS_BYTES", {"cpu": 2 * 67 * 4})
    torch.testing.assert_close(head.scores(x, targets), found)
    assert rows == [2] * 10 + [1]


def test_equal_predictions_count_as_the_first_of_them():
    found = token_scores(torch.full((3, 4), 0.25).log(), torch.tensor([0, 1, 3]))
    torch.testing.assert_close(
        torch.stack(found), torch.tensor([[math.log(4)] * 3, [0.25] * 3, [1.0, 0.0, 0.0]])
    )
