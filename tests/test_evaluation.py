"""engine/eval/evaluation.py against the definitions of the scores, and the windows it reads."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical
from torch.nn import functional as F

from engine.data.tokens import TokenFile
from engine.data.windows import eval_batches, windows
from engine.eval.evaluation import NOISE_GROUP, _score_windows
from engine.eval.table import flat
from engine.eval.validation import N_BINS
from model import GPT
from tests.helpers import HEADS, refusal, scores, scores_of, tiny_gpt, write_nanogpt

V, T = 67, 16  # of tiny_gpt


def uncertain_gpt(likelihood: str = "categorical", **options) -> GPT:
    """A model whose posterior is so wide that its draws differ."""
    model = tiny_gpt("bayes", likelihood, std=0.3, **options)
    for layer in model.bayes_layers():
        torch.nn.init.constant_(layer.log_std, -1.5)
    return model


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> TokenFile:
    """16 blocks and 6 tokens."""
    ids = np.random.default_rng(0).integers(0, V, 16 * T + 6)
    folder = tmp_path_factory.mktemp("data") / "d"
    return TokenFile(write_nanogpt(folder, {"val": ids}), "val")


def counting(folder, n: int) -> TokenFile:
    """The split 0, 1, ..., n - 1: a token is its own position."""
    return TokenFile(write_nanogpt(folder / "counting", {"val": np.arange(n)}), "val")


@pytest.mark.parametrize("weights, likelihood", HEADS)
def test_scores_are_their_definitions(weights, likelihood):
    model = tiny_gpt(weights, likelihood, std=0.3)
    x = torch.randint(V, (16, T))
    p = model.log_probs(x).double().exp()
    y = Categorical(p).sample()
    confidence, likeliest = p.max(-1)
    correct = (likeliest == y).double()
    bins = (confidence * N_BINS).long().flatten()
    gaps = torch.bincount(bins, (confidence - correct).flatten())
    nll = -p.gather(-1, y.unsqueeze(-1)).log().mean()
    expected = {
        "nll": nll,
        "perplexity": nll.exp(),
        "brier": (p - F.one_hot(y, V)).square().sum(-1).mean(),
        "entropy": Categorical(p).entropy().mean(),
        "confidence": confidence.mean(),
        "accuracy": correct.mean(),
        "ece": gaps.abs().sum() / y.numel(),
    }
    if likelihood == "smooth":
        desmoothed = model.lm_head.likelihood.desmoothed(p.log())
        expected["nll_desmoothed"] = -desmoothed.gather(-1, y.unsqueeze(-1)).mean()
    if weights == "bayes":
        prediction = model.lm_head.predict(model.hidden(x))
        expected["aleatoric"] = prediction.aleatoric.mean()
        expected["mutual_information"] = prediction.epistemic.mean()
    found = scores(model, *zip(x.split(3), y.split(3), strict=True))
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-5), name
    assert found["n_tokens"] == 256
    assert 0.01 < found["accuracy"] < 0.9


def test_the_brier_score_is_exact_at_gpt2s_vocabulary():
    """A float32 norm of 50,304 probabilities by Zipf's law has a square that is 3e-5 too small."""
    n = 50304
    model = tiny_gpt(vocab_size=n, n_layer=1, n_embd=4, logit_bias="uniform")
    with torch.no_grad():
        model.lm_head.weights.weight.zero_()
        model.lm_head.bias.copy_(-torch.arange(1, n + 1.0).log())
    p = 1 / torch.arange(1, n + 1.0).double()
    p /= p.sum()
    x = torch.full((1, T), 40000)
    expected = (p.square().sum() - 2 * p[40000]).item()
    assert scores(model, (x, x))["brier"] - 1 == pytest.approx(expected, rel=1e-5)


def test_a_model_whose_predictions_are_not_finite_is_refused():
    model = tiny_gpt()
    torch.nn.init.constant_(model.transformer.ln_f.weight, math.nan)
    x = torch.randint(V, (2, T))
    assert "finite" in refusal(scores, model, (x, x))


@pytest.mark.parametrize("stride", [1, 5, 16])
@pytest.mark.parametrize("n", [2, 17, 18, 100])
def test_windows_count_every_target_once_with_at_least_the_rest_of_a_window_before_it(
    tmp_path, n, stride
):
    file = counting(tmp_path, n)
    for batch_size in (1, 3):
        counted = []
        for batch in windows(file, T, batch_size, stride=stride):
            assert torch.equal(batch.at, batch.y[:, batch.first :])
            assert torch.equal(batch.y, batch.x + 1)
            for x, targets in zip(batch.x, batch.at, strict=True):
                for y in targets.tolist():
                    n_before = y - x[0]
                    assert n_before >= min(y, T - stride + 1)
                    counted.append(y)
        assert counted == list(range(1, n))


def test_a_stride_of_1_gives_each_token_a_whole_window_of_context(file):
    model = tiny_gpt(std=0.3)
    ids = torch.from_numpy(file[:].astype(np.int64))
    expected = []
    for end in range(1, len(ids)):
        log_probs = model.log_probs(ids[max(0, end - T) : end][None])[0, -1]
        expected.append(-log_probs[ids[end]].item())
    found = scores_of(model, file, stride=1)["nll"]
    assert found == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("stride", [T, 5])
@pytest.mark.parametrize("limit", [1, 3, 7])
def test_a_limit_takes_whole_windows_evenly_spaced(tmp_path, stride, limit):
    file = counting(tmp_path, 16 * T + 6)
    starts = []
    for batch in windows(file, T, 4, limit, stride):
        starts += batch.x[:, 0].tolist()
    n_full = (len(file) - 1 - T) // stride + 1  # without the shorter window at the end
    assert starts == [k * n_full // limit * stride for k in range(limit)]


def test_evaluation_batches_are_blocks_evenly_spaced_over_the_split(tmp_path):
    batches = eval_batches(counting(tmp_path, 1000), T, batch_size=4, n_batches=3)
    assert np.concatenate(batches).tolist() == [k * 62 // 12 * T for k in range(12)]


@pytest.mark.parametrize(
    "options", [{"posterior": "row"}, {"posterior": "full", "bayes_mlp": True}]
)
@pytest.mark.parametrize("stride", [0, 5])
def test_the_draws_of_a_token_do_not_depend_on_its_batch(file, options, stride):
    model = uncertain_gpt(**options)
    found = [flat(scores_of(model, file, n, n_samples=3, stride=stride)) for n in (1, 4)]
    assert found[0]["mutual_information"] > 1e-3
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_neighbouring_tokens_share_their_draws_and_others_do_not(tmp_path):
    same = write_nanogpt(tmp_path / "d", {"val": np.full(16 * T + 1, 7)})
    (batch,) = windows(TokenFile(same, "val"), T, 16)  # equal windows: only their draws differ
    with torch.no_grad():
        nll = _score_windows(uncertain_gpt(), batch, torch.device("cpu"), 2)["nll"]
    groups = nll.view(4, NOISE_GROUP)[:, ::T]  # the first token of each window
    assert groups.std(1).max() < 1e-5
    assert groups.mean(1).std() > 1e-3
