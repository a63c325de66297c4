"""Fine-tuning: any head on the weights of any other, what step 0 then predicts; early stop, and the
best kept.
"""

import contextlib
import json
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import train
from engine.base.errors import UserError
from engine.base.options import load_config
from engine.data.tokens import TokenFile, gather
from engine.runs import checkpoint
from engine.runs.checkpoint import read_checkpoint
from engine.runs.finetune import from_weights
from heads import HeadConfig
from heads.likelihoods import linear_fit
from tests.helpers import (
    HEADS,
    ROOT,
    TINY,
    flags,
    records,
    run,
    same_weights,
    tiny_gpt,
    write_words,
)
from tests.test_model import tiny_gpt2
from tests.test_pretrained import write_nanogpt

every_head = pytest.mark.parametrize(("weights", "likelihood"), HEADS)
STALE = {
    "learning_rate": 0,
    "min_lr": 0,
    "eval_interval": 2,
    "max_iters": 40,
}  # nothing ever improves


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A trained run of every head, by (weights, likelihood)."""
    root = tmp_path_factory.mktemp("runs")
    for weights, likelihood in HEADS:
        run(data, root / f"{weights}-{likelihood}", weights=weights, likelihood=likelihood)
    return {head: root / "-".join(head) for head in HEADS}


def started(data, source, **options):
    """The model at step 0 of a run with these options on these weights."""
    argv = flags(**TINY | {"dataset": data, "out_dir": "none", "init_from": source} | options)
    config, _ = load_config(train.TrainConfig, argv)
    file = TokenFile(data, "train")
    head = replace(config.model.head, n_data=len(file))
    config = replace(config, model=replace(config.model, head=head))
    return from_weights(config, read_checkpoint(str(source)), file, options.keys()).eval()


def scores(model, data) -> tuple[float, float]:
    """nll, from log_probs, and loss on validation text."""
    file = TokenFile(data, "val")
    x, y = gather(file, torch.arange(0, 60 * 16, 16).numpy(), 16)
    with torch.no_grad():
        nll = -model.log_probs(x).gather(-1, y.unsqueeze(-1)).mean()
        return nll.item(), model.lm_head.data_loss(model.hidden(x), y).item()


@every_head
@pytest.mark.parametrize("old", HEADS, ids="-".join)
def test_step_0_has_the_nll_of_the_original(data, runs, old, weights, likelihood):
    nll = scores(checkpoint.load_model(runs[old]), data)[0]
    model = started(data, runs[old], weights=weights, likelihood=likelihood)
    new, loss = scores(model, data)
    if ("sigmoid" in old) == (likelihood == "sigmoid"):
        assert new == pytest.approx(nll, abs=1e-5)  # the same logits mean the same
    else:  # one of the 27 tokens often has nearly all probability: sigmoid and exp differ there
        assert new == pytest.approx(nll, abs=0.15)
    if (
        likelihood == "sigmoid"
    ):  # where the sigmoids sum to 1, their loss is that of softmax and somewhat below 1
        assert new < loss < new + 1.1


@pytest.mark.parametrize("tied", [True, False])
def test_a_sigmoid_on_a_softmax_is_so_close_as_a_linear_fit_allows(data, tied, tmp_path):
    run(data, tmp_path / "softmax", tie_head=tied)
    old = checkpoint.load_model(tmp_path / "softmax")
    model = started(data, tmp_path / "softmax", likelihood="sigmoid", tie_head=tied)
    x, _ = gather(TokenFile(data, "val"), torch.arange(0, 60 * 16, 16).numpy(), 16)
    with torch.no_grad():
        torch.testing.assert_close(
            model.hidden(x), old.hidden(x), atol=1e-4, rtol=0
        )  # wpe has what wte has lost
        normaliser = model.lm_head.logits(model.hidden(x)).logsumexp(-1)
        before = old.lm_head.logits(old.hidden(x)).logsumexp(-1)
    assert abs(normaliser.mean()) < 0.05 and normaliser.std() < 0.8 * before.std()


def test_the_linear_fit_is_least_squares_and_needs_few_positions():
    torch.manual_seed(0)
    x, slope = torch.randn(400, 8) * torch.logspace(-2, 2, 8) + 3, torch.randn(8)
    y = x @ slope + 5
    found, constant = linear_fit(x, y, ridge=0.0)
    torch.testing.assert_close(x @ found + constant, y, atol=1e-3, rtol=0)
    x = torch.randn(10, 30)  # fewer positions than dimensions, and one that never changes
    x[:, 0] = 7
    found, constant = linear_fit(x, torch.randn(10))
    assert found.isfinite().all() and constant.isfinite()


def test_another_pos_weight_predicts_the_same(data, runs):
    source = runs["point", "sigmoid"]
    model = started(data, source, likelihood="sigmoid", pos_weight=3.0)
    assert scores(model, data)[0] == pytest.approx(
        scores(checkpoint.load_model(source), data)[0], abs=1e-5
    )


def test_a_bias_goes_along_and_is_not_lost_unasked(data, runs):
    source = runs["point", "sigmoid"]
    model, old = started(data, source), checkpoint.load_model(source)
    assert model.config.head.likelihood == "categorical" and torch.equal(
        model.lm_head.bias, old.lm_head.bias
    )
    with pytest.raises(UserError, match="logit_bias = 'none' would lose; leave that out"):
        started(data, source, logit_bias="none")


def test_a_new_bias_starts_at_0_on_weights_that_know_token_frequencies(data, runs):
    source = runs["point", "categorical"]
    model = started(data, source, logit_bias="unigram")
    assert not model.lm_head.bias.any()
    nll = scores(checkpoint.load_model(source), data)[0]
    assert scores(model, data)[0] == pytest.approx(nll, abs=1e-5)
    with pytest.raises(UserError, match="logit_bias"):
        started(data, source, likelihood="sigmoid", logit_bias="none")


@pytest.mark.parametrize("likelihood", ["categorical", "sigmoid"])
def test_a_new_posterior_has_the_width_that_training_would_start_from(data, runs, likelihood):
    model = started(
        data, runs["point", "categorical"], weights="bayes", likelihood=likelihood, kl_weight=0.1
    )
    weight, frequencies = (
        model.lm_head.weights.weight,
        TokenFile(data, "train").frequencies(model.config.vocab_size),
    )
    precision = 1 / weight.square().mean() + model.config.head.n_data * frequencies / 0.1
    torch.testing.assert_close(
        model.lm_head.weights.log_std.squeeze(1).double(), -precision.log() / 2, atol=1e-5, rtol=0
    )


def test_a_posterior_goes_along_or_is_said_to_be_left(data, runs, tmp_path, capsys):
    source = runs["bayes", "sigmoid"]
    old = checkpoint.load_model(source).lm_head.weights.log_std
    assert torch.equal(started(data, source, weights="bayes").lm_head.weights.log_std, old)
    full = started(data, source, weights="bayes", posterior="full").lm_head.weights.log_std
    assert torch.equal(full, old.expand_as(full)) and capsys.readouterr().err == ""
    started(data, source)
    assert "only the means are kept; --weights=bayes" in capsys.readouterr().err
    run(data, tmp_path / "full", weights="bayes", posterior="full", max_iters=1, n_embd=8)
    with pytest.raises(UserError, match="add --posterior=full"):
        started(data, tmp_path / "full", weights="bayes")


@every_head
@pytest.mark.parametrize("source", ["transformers", "nanogpt", "file"])
def test_every_source_takes_every_head(data, runs, tmp_path, source, weights, likelihood):
    if source == "transformers":
        model = tiny_gpt2(vocab_size=TokenFile(data, "train").vocab_size)
        with torch.no_grad():
            for parameter in model.transformer.wte.parameters():
                parameter.mul_(2).add_(0.5)  # logits that all lie far from 0, as GPT-2's do
        model.save_pretrained(tmp_path / "source")
    elif source == "nanogpt":
        model = tiny_gpt(std=0.3)
        (tmp_path / "source").mkdir()
        write_nanogpt(tmp_path / "source" / "ckpt.pt", model, bias=False)
    path = (
        next(runs["point", "categorical"].glob("ckpt_*.pt"))
        if source == "file"
        else tmp_path / "source"
    )
    nll = scores(checkpoint.load_model(path), data)[0]
    model = started(data, path, weights=weights, likelihood=likelihood)
    found, loss = scores(model, data)
    assert found == pytest.approx(nll, abs=0.3 if likelihood == "sigmoid" else 1e-5)
    if (
        weights == "point"
    ):  # a new posterior adds to the loss what its width costs under weights so wild
        assert loss < nll + 1.5


def test_options_hold_on_the_weights_of_another(data, runs, tmp_path):
    source = runs["point", "categorical"]
    options = {
        "init_from": source,
        "dropout": 0.1,
        "block_size": 8,
        "learning_rate": 1e-3,
        "max_iters": 3,
    }
    model = run(data, tmp_path / "tuned", **options)
    assert (model.config.dropout, model.config.block_size) == (0.1, 8)
    assert [r["lr"] for r in records(tmp_path / "tuned", "loss")] == pytest.approx(
        [2.5e-4, 5e-4, 7.5e-4]
    )
    assert not same_weights(model, run(data, tmp_path / "dry", **options | {"dropout": 0.0}))
    first = records(tmp_path / "tuned", "val_nll")[0], records(tmp_path / "dry", "val_nll")[0]
    assert first[0]["val_nll"] == first[1]["val_nll"]  # no dropout in an evaluation
    with pytest.raises(UserError, match="n_layer = 3, but the weights to start from have 1"):
        run(data, tmp_path / "no", **options | {"n_layer": 3})


@every_head
def test_another_head_is_soon_no_worse_than_the_original(data, runs, tmp_path, weights, likelihood):
    source = runs["point", "categorical"]
    options = {"weights": weights, "likelihood": likelihood, "max_iters": 30, "learning_rate": 3e-3}
    run(data, tmp_path, init_from=source, **options)
    original = records(source, "val_nll")[-1]["val_nll"]
    assert records(tmp_path, "val_nll")[-1]["val_nll"] < original


def scripted(monkeypatch, *nlls: float) -> None:
    values = iter(nlls)
    monkeypatch.setattr("train.mean_loss", lambda *_: {"val_nll": next(values), "val_loss": 0.0})


@pytest.mark.parametrize("always", [True, False])
def test_a_run_ends_after_so_many_evaluations_without_a_better_one(
    data, tmp_path, monkeypatch, capsys, always
):
    scripted(monkeypatch, 3.0, 2.0, 2.5, 1.0, 1.0, 1.5, 1.2, 0.5)
    run(data, tmp_path, max_iters=30, eval_interval=2, patience=3, always_save_checkpoint=always)
    assert [(r["step"], r["val_nll"]) for r in records(tmp_path, "val_nll")][-1] == (12, 1.2)
    newest = (
        12 if always else 6
    )  # as in nanoGPT, without always_save_checkpoint only what is better is saved
    assert (
        checkpoint.read_newest(tmp_path)["step"] == newest
        and (tmp_path / "ckpt_00000006.pt").is_file()
    )
    last = capsys.readouterr().out.splitlines()[-1]
    path = tmp_path / "ckpt_00000006.pt" if always else tmp_path
    assert last == (
        "no lower val nll in 3 evaluations: stopped; best val nll 1.0000 at step 6: "
        f"python sample.py --out_dir={path}"
    )


def test_without_patience_a_run_goes_on_to_the_end_and_names_its_best(
    data, tmp_path, monkeypatch, capsys
):
    scripted(monkeypatch, *range(9, 30))
    run(data, tmp_path, max_iters=6, eval_interval=1)
    assert records(tmp_path, "val_nll")[-1]["step"] == 6
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .startswith("best val nll 9.0000 at step 0: training")
    )


def test_patience_survives_a_kill_and_a_stopped_run_stays_stopped(data, tmp_path):
    run(data, tmp_path / "whole", **STALE, patience=4)
    run(data, tmp_path / "parts", **STALE | {"max_iters": 4}, patience=4)
    for _ in range(2):
        run(data, tmp_path / "parts", **STALE, patience=4, init_from="resume")
    steps = [
        [r["step"] for r in records(tmp_path / name, "val_nll")] for name in ("whole", "parts")
    ]
    assert steps == [[0, 2, 4, 6, 8]] * 2
    run(
        data, tmp_path / "parts", **STALE | {"max_iters": 12}, patience=0, init_from="resume"
    )  # it may change
    assert records(tmp_path / "parts", "val_nll")[-1]["step"] == 12


def test_two_processes_stop_together(data, tmp_path):
    argv = flags(**TINY | STALE | {"dataset": data, "out_dir": tmp_path, "patience": 2})
    argv = [*argv, "--gradient_accumulation_steps=2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, "train.py", *argv], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in records(tmp_path, "val_nll")] == [0, 2, 4]
    assert done.stdout.count("no lower val nll in 2 evaluations: stopped") == 1


def test_the_best_checkpoint_is_sampled_and_evaluated_by_its_file(
    data, runs, tmp_path, monkeypatch, capsys
):
    folder = shutil.copytree(runs["point", "categorical"], tmp_path / "run")
    (path,) = folder.glob("ckpt_*.pt")
    for script, options in (
        ("sample.py", {"num_samples": 1, "max_new_tokens": 2, "start": "the"}),
        ("evaluate.py", {}),
    ):
        monkeypatch.setattr(sys, "argv", [script, *flags(out_dir=path, device="cpu", **options)])
        with contextlib.suppress(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert "the" in (printed := capsys.readouterr().out) and "test split" in printed
    assert json.loads((folder / f"eval_test_{path.stem}.json").read_text())["nll"] > 0


def test_head_config_of_the_original_is_the_one_that_its_logits_mean():
    head = tiny_gpt(likelihood="sigmoid", pos_weight=2.0).lm_head
    before = head.bias.clone()
    assert (
        head.convert_likelihood(
            HeadConfig(likelihood="sigmoid", pos_weight=2.0), lambda: pytest.fail("not needed")
        )
        == 0.0
    )
    assert torch.equal(head.bias, before)
