"""Fine-tuning: any head on the weights of any other, what step 0 then predicts, early stopping."""

import shlex
from dataclasses import replace

import pytest
import torch

import train
from engine.base.options import load_config
from engine.data.tokens import TokenFile, gather
from engine.runs import checkpoint
from engine.runs.checkpoint import read_checkpoint
from engine.runs.finetune import from_weights
from tests.helpers import (
    TINY,
    assert_near,
    flags,
    records,
    refusal,
    run,
    tiny_gpt,
    values,
    write_bytes,
)
from tests.test_model import tiny_gpt2
from tests.test_pretrained import write_nanogpt
from tests.test_train import scripted

STALE = {  # nothing ever improves
    "learning_rate": 0,
    "min_lr": 0,
    "eval_interval": 2,
    "max_iters": 40,
}
# every pair of likelihoods, and every pair of weights several times
PAIRS = [
    ("point-categorical", "point-smooth"),
    ("point-categorical", "bayes-categorical"),
    ("point-categorical", "bayes-sigmoid"),
    ("point-smooth", "point-categorical"),
    ("point-smooth", "bayes-smooth"),
    ("point-smooth", "point-sigmoid"),
    ("point-sigmoid", "bayes-categorical"),
    ("point-sigmoid", "point-smooth"),
    ("point-sigmoid", "bayes-sigmoid"),
    ("bayes-categorical", "point-sigmoid"),
    ("bayes-smooth", "bayes-categorical"),
    ("bayes-sigmoid", "point-categorical"),
]


@pytest.fixture
def softmax(trained):
    return trained("point", "categorical")


@pytest.fixture
def sigmoid(trained):
    return trained("point", "sigmoid")


def started(data, source, **options):
    """The model at step 0 of a run with these options on these weights."""
    argv = flags(**TINY | {"dataset": data, "out_dir": "none", "init_from": source} | options)
    config, _ = load_config(train.TrainConfig, argv)
    file = TokenFile(data, "train")
    head = replace(config.model.head, n_data=len(file))
    config = replace(config, model=replace(config.model, head=head))
    return from_weights(config, read_checkpoint(str(source)), file, options.keys()).eval()


def validation_blocks(data):
    return gather(TokenFile(data, "val"), torch.arange(0, 60 * 16, 16).numpy(), 16)


def scores(model, data) -> tuple[float, float]:
    """nll, from log_probs, and loss on validation text."""
    x, y = validation_blocks(data)
    with torch.no_grad():
        nll = -model.log_probs(x).gather(-1, y.unsqueeze(-1)).mean()
        return nll.item(), model.lm_head.data_loss(model.hidden(x), y).item()


def nll_of(source, data) -> float:
    return scores(checkpoint.load_model(source), data)[0]


@pytest.mark.parametrize("old, new", PAIRS)
def test_step_0_has_the_nll_of_the_original(words_data, trained, old, new):
    source = trained(*old.split("-"))
    nll = nll_of(source, words_data)
    weights, likelihood = new.split("-")
    model = started(words_data, source, weights=weights, likelihood=likelihood)
    found, loss = scores(model, words_data)
    # one of the 19 tokens often has nearly all probability: sigmoid and exp differ there
    converts = ("sigmoid" in old) != ("sigmoid" in new)
    assert found == pytest.approx(nll, abs=0.15 if converts else 1e-5)
    if likelihood == "sigmoid":
        # if the sigmoids sum to 1, their loss is that of softmax and somewhat below 1
        assert found < loss < found + 1.1


@pytest.mark.parametrize("tied", [True, False])
def test_a_sigmoid_on_a_softmax_is_as_close_as_a_linear_fit_allows(words_data, tied, tmp_path):
    run(words_data, tmp_path, tie_head=tied)
    old = checkpoint.load_model(tmp_path)
    model = started(words_data, tmp_path, likelihood="sigmoid", tie_head=tied)
    x, _ = validation_blocks(words_data)
    with torch.no_grad():
        hidden, old_hidden = model.hidden(x), old.hidden(x)
        normaliser = model.lm_head.logits(hidden).logsumexp(-1)
        before = old.lm_head.logits(old_hidden).logsumexp(-1)
    # wpe has what wte has lost
    assert_near(hidden, old_hidden, 1e-4)
    assert abs(normaliser.mean()) < 0.05
    assert normaliser.std() < 0.8 * before.std()


def test_another_pos_weight_predicts_the_same(words_data, sigmoid):
    model = started(words_data, sigmoid, likelihood="sigmoid", pos_weight=3.0)
    nll = nll_of(sigmoid, words_data)
    assert scores(model, words_data)[0] == pytest.approx(nll, abs=1e-5)


def test_a_bias_is_kept_and_a_new_one_starts_at_0(words_data, softmax, sigmoid):
    kept = started(words_data, sigmoid).lm_head.bias
    assert torch.equal(kept, checkpoint.load_model(sigmoid).lm_head.bias)
    model = started(words_data, softmax, logit_bias="unigram")
    assert not model.lm_head.bias.any()
    nll = nll_of(softmax, words_data)
    assert scores(model, words_data)[0] == pytest.approx(nll, abs=1e-5)
    for source in (softmax, sigmoid):
        assert "logit_bias" in refusal(
            started, words_data, source, likelihood="sigmoid", logit_bias="none"
        )


def test_a_new_posterior_has_the_width_that_training_would_start_from(words_data, softmax):
    model = started(words_data, softmax, weights="bayes", likelihood="sigmoid", kl_weight=0.1)
    head = model.lm_head.weights
    frequencies = TokenFile(words_data, "train").frequencies(model.config.vocab_size)
    n_effective = model.config.head.n_data / 0.1
    precision = 1 / head.weight.square().mean() + n_effective * frequencies
    found = head.log_std.squeeze(1).double()
    assert_near(found, -precision.log() / 2)


def test_a_posterior_is_kept_or_a_warning_says_that_it_is_not(
    words_data, trained, tmp_path, capsys
):
    source = trained("bayes", "sigmoid")
    old = checkpoint.load_model(source).lm_head.weights.log_std
    kept = started(words_data, source, weights="bayes").lm_head.weights.log_std
    assert torch.equal(kept, old)
    full = started(words_data, source, weights="bayes", posterior="full").lm_head.weights.log_std
    assert torch.equal(full, old.expand_as(full)) and capsys.readouterr().err == ""
    started(words_data, source)
    assert "--weights=bayes" in capsys.readouterr().err
    run(words_data, tmp_path, weights="bayes", posterior="full", max_iters=1, n_embd=8)
    assert "--posterior=full" in refusal(started, words_data, tmp_path, weights="bayes")


@pytest.mark.parametrize("source", ["transformers", "nanogpt", "file"])
def test_a_head_starts_from_other_sources_too(words_data, softmax, tmp_path, source):
    path = tmp_path / "source"
    if source == "transformers":
        model = tiny_gpt2(vocab_size=TokenFile(words_data, "train").vocab_size)
        with torch.no_grad():
            # logits that are all far from 0, as GPT-2's are
            model.transformer.wte.weight.mul_(2).add_(0.5)
        model.save_pretrained(path)
    elif source == "nanogpt":
        path.mkdir()
        write_nanogpt(path / "ckpt.pt", tiny_gpt(std=0.3), bias=False)
    else:
        path = next(softmax.glob("ckpt_*.pt"))
    nll = nll_of(path, words_data)
    found, loss = scores(started(words_data, path, likelihood="sigmoid"), words_data)
    assert found == pytest.approx(nll, abs=0.3) and loss < nll + 1.5
    found, _ = scores(started(words_data, path, weights="bayes"), words_data)
    assert found == pytest.approx(nll, abs=1e-5)


def test_options_hold_on_the_weights_of_another(words_data, softmax, tmp_path):
    options = {
        "dropout": 0.1,
        "block_size": 8,
        "learning_rate": 1e-3,
        "max_iters": 3,
    }
    model = run(words_data, tmp_path, init_from=softmax, **options)
    assert (model.config.dropout, model.config.block_size) == (0.1, 8)
    rates = values(tmp_path, "lr", "loss")
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4])


def test_weights_with_another_tokenizer_are_refused(softmax, tmp_path):
    assert "tokenizer" in refusal(
        run, write_bytes(tmp_path / "bytes"), tmp_path / "run", init_from=softmax
    )


@pytest.mark.parametrize("always", [True, False])
def test_a_run_ends_when_patience_evaluations_bring_no_lower_nll_and_names_the_best(
    words_data, tmp_path, monkeypatch, capsys, always
):
    scripted(monkeypatch, 3.0, 2.0, 2.5, 1.0, 1.0, 1.5, 1.2, 0.5)
    out_dir = tmp_path / "my run"
    options = {"eval_interval": 2, "patience": 3, "always_save_checkpoint": always}
    run(words_data, out_dir, max_iters=30, **options)
    last = records(out_dir, "val_nll")[-1]
    assert (last["step"], last["val_nll"]) == (12, 1.2)
    best = out_dir / "ckpt_00000006.pt"
    assert best.is_file()
    # as in nanoGPT, without always_save_checkpoint the newest is the best
    assert checkpoint.read_newest(out_dir)["step"] == (12 if always else 6)
    command = capsys.readouterr().out.splitlines()[-1].split(": ")[-1]
    assert shlex.split(command)[1:] == ["sample.py", f"--out_dir={best}"]


def test_patience_survives_a_kill_and_a_stopped_run_stays_stopped(words_data, tmp_path):
    run(words_data, tmp_path, **STALE | {"max_iters": 4}, patience=4)
    for _ in range(2):
        run(words_data, tmp_path, **STALE, patience=4, init_from="resume")
    assert values(tmp_path, "step", "val_nll") == [0, 2, 4, 6, 8]
    # it may change
    run(words_data, tmp_path, **STALE | {"max_iters": 12}, patience=0, init_from="resume")
    assert values(tmp_path, "step", "val_nll")[-1] == 12
