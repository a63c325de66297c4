"""A resumed run repeats the uninterrupted one bit for bit."""

import random
import shutil

import pytest
import torch

from engine.base.optim import set_learning_rate
from engine.data.tokens import TokenFile
from engine.runs import checkpoint
from tests.helpers import (
    HEADS,
    TINY,
    difference,
    flags,
    records,
    refusal,
    run,
    run_script,
    same_weights,
    values,
    write_dataset,
)

LONG = {
    "max_iters": 12,
    "lr_decay_iters": 12,
    "dropout": 0.1,
    "gradient_accumulation_steps": 2,
    "batch_size": 4,
    "eval_interval": 3,
    "warmup_iters": 8,
}
HALF = LONG | {"max_iters": 6}
NEWEST = "ckpt_00000006.pt"


@pytest.fixture(scope="module")
def whole(words_data, tmp_path_factory):
    """An uninterrupted softmax run and its folder."""
    out_dir = tmp_path_factory.mktemp("whole")
    return run(words_data, out_dir, **LONG), out_dir


@pytest.fixture(scope="module")
def half_run(words_data, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("half")
    run(words_data, out_dir, **HALF)
    return out_dir


@pytest.fixture
def half(half_run, tmp_path):
    """A copy of the first half of that run."""
    return shutil.copytree(half_run, tmp_path / "half")


def without_times(out_dir) -> list[dict]:
    """metrics.jsonl without what a clock says."""
    found = records(out_dir, "step")
    for record in found:
        record.pop("seconds", None)
        record.pop("tokens_per_second", None)
    return found


@pytest.mark.parametrize(
    "options",
    [
        *({"weights": weights, "likelihood": likelihood} for weights, likelihood in HEADS),
        {"dtype": "float16"},  # with its loss scale
        {"optimizer": "muon"},
        {"weights": "bayes", "posterior": "torchbnn", "prior_std": 0.1},
        {"weights": "bayes", "posterior": "full", "estimator": "sample", "bayes_mlp": True},
    ],
)
def test_two_halves_are_the_whole_bit_for_bit(words_data, tmp_path, options):
    folders = whole, halves = tmp_path / "whole", tmp_path / "halves"
    model = run(words_data, whole, **LONG | options)
    run(words_data, halves, **HALF | options)
    resumed = run(words_data, halves, **LONG | options, init_from="resume")
    assert same_weights(model, resumed)
    assert without_times(halves) == without_times(whole)
    first, *_, last = values(whole, "val_nll")
    assert last < first
    states = [checkpoint.read_newest(folder) for folder in folders]
    moments = [state["optimizer"]["state"].values() for state in states]
    for a, b in zip(*moments, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert states[0]["scaler"] == states[1]["scaler"]
    assert states[0]["best_step"] == states[1]["best_step"]


def test_a_run_killed_between_checkpoints_leaves_no_record_twice(
    words_data, whole, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    def killed(optimizer, step, config):
        if step == 8:
            raise Killed
        return set_learning_rate(optimizer, step, config)

    with monkeypatch.context() as patch:
        patch.setattr("train.set_learning_rate", killed)
        with pytest.raises(Killed):
            run(words_data, tmp_path, **LONG, init_from="auto")
    assert values(tmp_path, "step")[-1] == 8
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "tok')  # half a record
    assert same_weights(run(words_data, tmp_path, **LONG, init_from="auto"), whole[0])
    assert without_times(tmp_path) == without_times(whole[1])


def test_a_folder_of_the_first_edition_resumes_bit_for_bit(words_data, whole, half):
    state = checkpoint.read(half / NEWEST)
    state["data"] = {split: TokenFile(words_data, split).sha256 for split in ("train", "val")}
    state["config"]["allow_change"] = "dataset"
    torch.save(state, half / NEWEST)
    assert same_weights(run(words_data, half, **LONG, init_from="resume"), whole[0])


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    words_data, whole, half, capsys
):
    path = half / NEWEST
    contents = path.read_bytes()
    rng = random.Random(0)
    n_damaged = 0
    for i in range(40):
        at = rng.randrange(len(contents))
        flipped = bytes([contents[at] ^ 1 << rng.randrange(8)])
        path.write_bytes(contents[:at] + (b"" if i % 2 else flipped + contents[at + 1 :]))
        step = checkpoint.read_newest(half)["step"]
        warning = capsys.readouterr().err
        n_damaged += step == 3
        # a bit between the parts of the file changes nothing that is read
        assert (step == 3) == (str(path) in warning) and warning.count("\n") <= 1
    assert n_damaged > 35 and step == 3
    assert same_weights(run(words_data, half, **LONG, init_from="resume"), whole[0])


@pytest.mark.parametrize(
    "change",
    [{"block_size": 8}, {"likelihood": "sigmoid"}, {"tie_head": False}, {"max_iters": 1}],
)
def test_another_model_or_fewer_steps_are_refused_on_resuming(words_data, whole, change):
    before = (whole[1] / "metrics.jsonl").read_bytes()
    assert next(iter(change)) in refusal(
        run, words_data, whole[1], **LONG | change, init_from="resume"
    )
    assert (whole[1] / "metrics.jsonl").read_bytes() == before


def test_an_option_that_is_given_on_resuming_wins_and_is_printed(words_data, whole, half, capsys):
    changed = LONG | {"dropout": 0.3, "weight_decay": 50.0, "beta1": 0.0}
    model = run(words_data, half, **changed, init_from="resume")
    assert model.config.dropout == 0.3 and difference(model, whole[0]) > 0.01
    printed = capsys.readouterr().out.splitlines()[0]
    assert "dropout = 0.3" in printed and "0.1" in printed and "learning_rate" not in printed
    group = checkpoint.read_newest(half)["optimizer"]["param_groups"][0]
    assert group["weight_decay"] == 50.0 and group["betas"][0] == 0.0


def test_an_option_that_is_not_given_on_resuming_keeps_its_value(whole, half):
    argv = flags(out_dir=half, init_from="resume", device="cpu", max_iters=12)
    run_script("train.py", *argv)
    assert same_weights(checkpoint.load_model(half), whole[0])
    assert without_times(half) == without_times(whole[1])


def test_files_of_the_user_that_look_like_checkpoints_are_left_alone(words_data, whole, half):
    mine = [half / name for name in ("ckpt_best.pt", "notes.tmp")]
    for path in mine:
        path.write_text("mine")
    assert same_weights(run(words_data, half, **LONG, init_from="resume"), whole[0])
    assert all(path.read_text() == "mine" for path in mine)


def test_resuming_a_finished_run_trains_no_further(words_data, whole):
    before = without_times(whole[1])
    assert same_weights(run(words_data, whole[1], **LONG, init_from="resume"), whole[0])
    assert without_times(whole[1]) == before


def test_a_checkpoint_holds_the_raw_model_and_all_that_a_run_is(words_data, whole):
    state = checkpoint.read_newest(whole[1])
    assert state["model"].keys() == whole[0].state_dict().keys()
    assert same_weights(checkpoint.load_model(whole[1]), whole[0])
    assert (state["step"], state["tokens"]) == (12, 12 * 2 * 4 * TINY["block_size"])
    assert state["best_val_nll"] == min(values(whole[1], "val_nll"))
    assert state["config"]["seed"] == 1337
    assert state["data"].keys() == {"train", "val"}
    for split, fingerprint in state["data"].items():
        assert TokenFile(words_data, split).matches(fingerprint)


def test_the_same_data_may_move_and_other_data_are_refused(words_data, half, tmp_path):
    moved = shutil.copytree(words_data, tmp_path / "moved")
    run(moved, half, **HALF | {"max_iters": 7}, init_from="resume")
    other = {split: ["the sea of the old wind " * 200] for split in ("train", "val")}
    write_dataset(moved, other, checkpoint.load_tokenizer(moved))
    before = (half / "metrics.jsonl").read_bytes()
    assert "train.bin" in refusal(run, moved, half, **LONG, init_from="resume")
    assert (half / "metrics.jsonl").read_bytes() == before
