"""A resumed run repeats the uninterrupted one bit for bit, and two processes repeat one."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import train
from engine.base import distributed
from engine.base.errors import UserError
from engine.base.optim import set_learning_rate
from engine.base.options import load_config
from engine.data.tokenizer import CharTokenizer
from engine.data.tokens import TokenFile
from engine.runs import checkpoint
from tests.helpers import (
    HEADS,
    ROOT,
    TINY,
    difference,
    flags,
    records,
    run,
    same_weights,
    words,
    write_dataset,
    write_words,
)

LONG = {
    "max_iters": 60,
    "lr_decay_iters": 60,
    "dropout": 0.1,
    "gradient_accumulation_steps": 2,
    "eval_interval": 15,
}
LONG |= {"batch_size": 4, "warmup_iters": 40}

PROCESSES = {
    "dropout": 0.1,
    "gradient_accumulation_steps": 4,
    "batch_size": 2,
    "max_iters": 10,
    "eval_interval": 5,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted softmax run and its folder."""
    out_dir = tmp_path_factory.mktemp("runs") / "whole"
    return run(data, out_dir, **LONG), out_dir


def without_times(out_dir) -> list[dict]:
    """metrics.jsonl as it is, but for what a clock says."""
    found = records(out_dir, "step")
    return [{name: r[name] for name in r.keys() - {"seconds", "tokens_per_second"}} for r in found]


@pytest.mark.parametrize(("weights", "likelihood"), HEADS)
def test_thirty_steps_and_thirty_more_are_sixty_bit_for_bit(data, tmp_path, weights, likelihood):
    options = LONG | {"weights": weights, "likelihood": likelihood}
    whole = run(data, tmp_path / "whole", **options)
    run(data, tmp_path / "parts", **options | {"max_iters": 30})
    resumed = run(data, tmp_path / "parts", **options, init_from="resume")
    assert same_weights(whole, resumed)
    assert without_times(tmp_path / "parts") == without_times(tmp_path / "whole")
    states = [checkpoint.read_newest(tmp_path / name) for name in ("whole", "parts")]
    for a, b in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert [state["best_step"] for state in states] == [states[0]["best_step"]] * 2


def test_float16_resumes_bit_for_bit_with_its_loss_scale(data, tmp_path):
    whole = run(data, tmp_path / "whole", **LONG | {"max_iters": 20, "dtype": "float16"})
    run(data, tmp_path / "parts", **LONG | {"max_iters": 10, "dtype": "float16"})
    resumed = run(
        data, tmp_path / "parts", **LONG | {"max_iters": 20, "dtype": "float16"}, init_from="resume"
    )
    assert same_weights(whole, resumed)


def test_a_run_killed_between_checkpoints_leaves_no_record_twice(
    data, whole, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    def killed(optimizer, step, config):
        if step == 40:
            raise Killed
        return set_learning_rate(optimizer, step, config)

    with monkeypatch.context() as patch:
        patch.setattr("train.set_learning_rate", killed)
        with pytest.raises(Killed):
            run(data, tmp_path, **LONG)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "tok')  # half a record
    assert '"step": 40' in (tmp_path / "metrics.jsonl").read_text().splitlines()[-2]
    assert same_weights(run(data, tmp_path, **LONG, init_from="auto"), whole[0])
    assert without_times(tmp_path) == without_times(whole[1])


def test_a_folder_of_the_first_edition_resumes_bit_for_bit(data, whole, tmp_path):
    run(data, tmp_path, **LONG | {"max_iters": 30})
    newest = tmp_path / "ckpt_00000030.pt"
    state = checkpoint.read(newest)
    splits = json.loads((data / "meta.json").read_text())["splits"]
    state["data"] = {split: splits[split]["sha256"] for split in ("train", "val")}
    state["config"]["allow_change"] = "dataset"
    torch.save(state, newest)
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {newest.name}\n")
    assert same_weights(run(data, tmp_path, **LONG, init_from="resume"), whole[0])


def test_auto_starts_where_there_is_no_run_and_resumes_where_there_is(
    data, whole, tmp_path, capsys
):
    run(data, tmp_path, **LONG | {"max_iters": 30}, init_from="auto")
    assert "resuming" not in capsys.readouterr().out
    assert same_weights(run(data, tmp_path, **LONG, init_from="auto"), whole[0])
    assert "resuming at step 30" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_a_damaged_newest_checkpoint_is_named_and_passed_over(
    data, whole, tmp_path, capsys, damage
):
    run(data, tmp_path, **LONG | {"max_iters": 30})
    newest = tmp_path / "ckpt_00000030.pt"
    contents = newest.read_bytes()
    middle = len(contents) // 2
    damaged = {
        "cut": contents[:middle],
        "flip": contents[:middle]
        + bytes(255 - byte for byte in contents[middle : middle + 9])
        + contents[middle + 9 :],
        "empty": b"",
        "text": b"no checkpoint at all",
    }
    newest.write_bytes(damaged[damage])
    assert same_weights(run(data, tmp_path, **LONG, init_from="resume"), whole[0])
    output = capsys.readouterr()
    assert (
        f"warning: {newest} is not a good checkpoint" in output.err and output.err.count("\n") == 1
    )
    assert "resuming at step 15" in output.out


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    torch.save({"model": {}, "run": os.system}, tmp_path / "ckpt_00000001.pt")
    with pytest.raises(UserError, match="not a good checkpoint"):
        checkpoint.read(tmp_path / "ckpt_00000001.pt")


@pytest.mark.parametrize(
    "change", [{"n_layer": 2}, {"block_size": 8}, {"likelihood": "sigmoid"}, {"tie_head": False}]
)
def test_resuming_another_model_is_refused(data, whole, change):
    ((name, value),) = change.items()
    before = (whole[1] / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=f"{name} = {value!r} .* cannot change"):
        run(data, whole[1], **LONG | change, init_from="resume")
    assert (whole[1] / "metrics.jsonl").read_bytes() == before


def test_an_option_that_is_given_on_resuming_wins_and_is_printed(data, whole, tmp_path, capsys):
    run(data, tmp_path, **LONG | {"max_iters": 30})
    capsys.readouterr()
    changed = LONG | {"dropout": 0.3, "weight_decay": 50.0, "beta1": 0.0}
    model = run(data, tmp_path, **changed, init_from="resume")
    assert model.config.dropout == 0.3 and difference(model, whole[0]) > 0.01
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "changed" in line]
    for name, value, before in (("dropout", 0.3, 0.1), ("beta1", 0.0, 0.9), ("max_iters", 60, 30)):
        assert f"{name} = {value} (was {before})" in line
    assert "learning_rate" not in line
    group = checkpoint.read_newest(tmp_path)["optimizer"]["param_groups"][0]
    assert group["weight_decay"] == 50.0 and group["betas"][0] == 0.0


def test_files_of_the_user_that_look_like_checkpoints_are_left_alone(data, whole, tmp_path):
    mine = [tmp_path / name for name in ("ckpt_best.pt", "ckpt_before_change.pt", "notes.tmp")]
    for path in mine:
        path.write_text("mine")
    model = run(data, tmp_path, **LONG)
    assert same_weights(model, whole[0]) and len(list(tmp_path.glob("ckpt_0*.pt"))) in (2, 3)
    assert all(
        (tmp_path / name).read_text() == "mine"
        for name in ("ckpt_best.pt", "ckpt_before_change.pt", "notes.tmp")
    )


def test_what_is_not_said_stays_as_it_was(data, whole, tmp_path):
    run(data, tmp_path, **LONG | {"max_iters": 30})
    argv = flags(out_dir=tmp_path, init_from="resume", device="cpu", max_iters=60)
    config, given = load_config(train.TrainConfig, argv)
    with distributed.init(config.device, config.backend) as processes:
        resumed = train.train(config, processes, given)
    assert same_weights(resumed, whole[0]) and without_times(tmp_path) == without_times(whole[1])


def test_resuming_a_finished_run_trains_no_further(data, whole):
    before = without_times(whole[1])
    assert same_weights(run(data, whole[1], **LONG, init_from="resume"), whole[0])
    assert without_times(whole[1]) == before


@pytest.fixture(scope="module")
def two_processes(data, tmp_path_factory):
    """The folders of two runs, each by torchrun with two processes, both at once."""
    root = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    started = {}
    for script in ("train.py", "train_bayes_sigmoid.py"):
        options = TINY | PROCESSES | {"dataset": data, "out_dir": root / script}
        command = [*launch, str(ROOT / script), *flags(**options)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started[script] = subprocess.Popen(command, cwd=root, env=environment, **pipes)
    try:
        for process in started.values():
            output, _ = process.communicate(timeout=600)
            assert process.returncode == 0, output
            assert output.count("step 10/10 | val nll") == 1  # the second process is silent
    finally:
        for process in started.values():
            process.kill()
    return root


@pytest.mark.parametrize(
    ("script", "head"),
    [
        ("train.py", {}),
        ("train_bayes_sigmoid.py", {"weights": "bayes", "likelihood": "sigmoid"}),
    ],
)
def test_two_processes_repeat_the_run_of_one(data, two_processes, tmp_path, script, head):
    one = run(data, tmp_path, **PROCESSES | head)
    two = checkpoint.load_model(two_processes / script)
    assert difference(one, two) < 1e-5
    for key in ("loss", "grad_norm", "val_nll", "val_perplexity", "val_ece", "val_loss"):
        values = [
            [record[key] for record in records(folder, key)]
            for folder in (tmp_path, two_processes / script)
        ]
        assert values[0] == pytest.approx(values[1], abs=1e-5) and len(values[0]) > 2
    assert checkpoint.read_newest(two_processes / script)["model"].keys() == one.state_dict().keys()


def test_a_run_of_two_processes_goes_on_with_one(data, two_processes, tmp_path):
    longer = PROCESSES | {"max_iters": 14, "lr_decay_iters": 10}
    one = run(data, tmp_path, **longer)
    folder = two_processes / "train.py"
    assert difference(run(data, folder, **longer, init_from="resume"), one) < 1e-5


def test_a_checkpoint_holds_all_that_a_run_is(data, whole):
    state = checkpoint.read_newest(whole[1])
    assert state.keys() >= {
        "model",
        "optimizer",
        "scaler",
        "step",
        "tokens",
        "best_val_nll",
        "best_step",
        "wandb_id",
    }
    assert (state["step"], state["tokens"]) == (60, 60 * 2 * 4 * TINY["block_size"])
    assert state["config"]["seed"] == 1337 and state["best_val_nll"] == min(
        r["val_nll"] for r in records(whole[1], "val_nll")
    )
    assert all(TokenFile(data, split).matches(found) for split, found in state["data"].items())
    assert state["data"].keys() == {"train", "val"}


def test_resuming_on_other_data_is_refused(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    run(tmp_path / "data", tmp_path / "run", **LONG | {"max_iters": 5})
    moved = (tmp_path / "data").rename(tmp_path / "moved")
    longer = LONG | {"max_iters": 8, "init_from": "resume"}
    run(moved, tmp_path / "run", **longer)  # the same data elsewhere are the same data
    chars = CharTokenizer(sorted(set(words(4000))))
    write_dataset(moved, {"train": [words(4000, seed=7)], "val": [words(500, seed=1)]}, chars)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"train\.bin holds other tokens than the run to resume"):
        run(moved, tmp_path / "run", **longer | {"max_iters": 9})
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_resuming_to_fewer_steps_than_are_done_is_refused_and_erases_nothing(data, whole):
    before = (whole[1] / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="is at step .* already, beyond max_iters = 1"):
        run(data, whole[1], **LONG | {"init_from": "resume", "max_iters": 1})
    assert (whole[1] / "metrics.jsonl").read_bytes() == before
