"""train.py: the loop, what it writes, and what must not change it."""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import types
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from engine.base.distributed import Processes
from engine.base.errors import UserError
from engine.base.options import flatten
from engine.data.tokens import TokenFile
from engine.data.windows import eval_batches
from engine.eval.validation import mean_loss
from engine.runs import checkpoint, saver
from tests.helpers import (
    HEADS,
    ROOT,
    TINY,
    difference,
    flags,
    records,
    run,
    same_weights,
    write_bytes,
    write_words,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """A softmax run and its folder, to compare others with."""
    out_dir = tmp_path_factory.mktemp("runs") / "plain"
    return run(data, out_dir), out_dir


@pytest.mark.parametrize(("weights", "likelihood"), HEADS)
def test_every_head_learns_more_than_token_frequencies(data, tmp_path, weights, likelihood):
    run(data, tmp_path, weights=weights, likelihood=likelihood)
    before, after = records(tmp_path, "val_nll")
    val, train = TokenFile(data, "val"), TokenFile(data, "train")
    counts, frequencies = val.counts(train.vocab_size), train.frequencies(train.vocab_size)
    unigram = -(counts @ frequencies.log()).item() / counts.sum().item()
    assert after["val_nll"] < 0.75 * unigram < before["val_nll"]
    assert after["val_loss"] < before["val_loss"]


def test_training_records_hold_the_contract(plain):
    found = records(plain[1], "loss")
    assert [record["step"] for record in found] == list(range(1, 31))
    keys = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "seconds"}
    assert all(keys <= record.keys() for record in found)
    assert all(math.isfinite(value) for record in found for value in record.values())
    assert [record["tokens"] for record in found] == [128 * record["step"] for record in found]
    seconds = [record["seconds"] for record in found]
    assert seconds == sorted(seconds) and seconds[0] > 0


@pytest.mark.parametrize(
    ("max_iters", "eval_interval", "steps"),
    [(7, 3, [0, 3, 6, 7]), (6, 3, [0, 3, 6])],
)
def test_evaluations_come_at_their_interval_and_at_the_last_step(
    data, tmp_path, max_iters, eval_interval, steps
):
    run(data, tmp_path, max_iters=max_iters, eval_interval=eval_interval)
    found = records(tmp_path, "val_nll")
    assert [record["step"] for record in found] == steps
    assert all(
        {"step", "tokens", "val_nll", "val_perplexity", "val_ece", "val_loss"} <= record.keys()
        for record in found
    )


def test_config_json_holds_all_options_and_the_environment(plain):
    written = json.loads((plain[1] / "config.json").read_text())
    assert written["vocab_size"] == plain[0].config.vocab_size and written["learning_rate"] == 1e-2
    assert {"commit", "torch", "numpy", "python"} <= written["environment"].keys()
    assert {"step", "command", "device", "world_size"} <= written["starts"][-1].keys()
    assert flatten(plain[0].config).items() <= written.items()


def test_evaluating_logging_and_saving_more_often_change_nothing(data, tmp_path):
    options = {"dropout": 0.1, "weights": "bayes", "max_iters": 12}
    seldom = run(data, tmp_path / "seldom", **options, eval_interval=100, log_interval=100)
    often = run(
        data,
        tmp_path / "often",
        **options,
        eval_interval=1,
        log_interval=1,
        save_interval=2,
        eval_iters=3,
    )
    assert same_weights(seldom, often)


def test_the_same_seed_gives_the_same_model_and_another_seed_another(data, plain, tmp_path):
    assert same_weights(run(data, tmp_path / "again"), plain[0])
    assert difference(run(data, tmp_path / "other", seed=1), plain[0]) > 1e-2


@pytest.mark.parametrize(("weights", "likelihood"), HEADS)
def test_accumulating_two_micro_batches_equals_one_of_twice_the_size(
    data, tmp_path, weights, likelihood
):
    options = {"weights": weights, "likelihood": likelihood, "max_iters": 3}
    one = run(data, tmp_path / "one", **options, batch_size=8, gradient_accumulation_steps=1)
    two = run(data, tmp_path / "two", **options, batch_size=4, gradient_accumulation_steps=2)
    for a, b in zip(
        records(tmp_path / "one", "loss"), records(tmp_path / "two", "loss"), strict=True
    ):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["tokens"] == b["tokens"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert difference(one, two) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "likelihood"), [("bfloat16", "categorical"), ("float16", "sigmoid")]
)
def test_half_precision_trains_as_float32_does(data, tmp_path, dtype, likelihood):
    options = {"weights": "bayes", "likelihood": likelihood}
    model = run(data, tmp_path / dtype, **options, dtype=dtype)
    run(data, tmp_path / "float32", **options)
    half, full = (records(tmp_path / name, "val_nll")[-1]["val_nll"] for name in (dtype, "float32"))
    assert half == pytest.approx(full, rel=0.02)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    state = checkpoint.read_newest(tmp_path / dtype)
    assert ("scale" in state["scaler"]) == (dtype == "float16")


def test_compile_without_a_compiler_is_refused_before_the_run_has_a_folder(
    data, tmp_path, monkeypatch
):
    monkeypatch.setattr("engine.base.distributed.shutil.which", lambda name: None)
    with pytest.raises(UserError, match="--compile=False"):
        run(data, tmp_path / "out", compile=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(
    not shutil.which("c++") and not shutil.which("g++"), reason="torch.compile needs a C++ compiler"
)
def test_a_compiled_run_has_the_same_losses_and_a_checkpoint_without_its_traces(
    data, plain, tmp_path
):
    run(data, tmp_path, compile=True, max_iters=5, lr_decay_iters=30)
    compiled, eager = records(tmp_path, "loss"), records(plain[1], "loss")[:5]
    assert [r["loss"] for r in compiled] == pytest.approx([r["loss"] for r in eager], abs=1e-4)
    assert checkpoint.read_newest(tmp_path)["model"].keys() == plain[0].state_dict().keys()


def test_checkpoints_hold_the_bare_model_and_load_without_running_code(plain):
    model, out_dir = plain
    path = out_dir / "ckpt_00000030.pt"
    state = torch.load(path, weights_only=True)
    assert not any(name.startswith(("_orig_mod.", "module.")) for name in state["model"])
    assert same_weights(checkpoint.load_model(path), model)
    assert same_weights(checkpoint.load_model(out_dir), model)


def test_the_two_newest_checkpoints_and_the_best_are_kept(data, tmp_path, monkeypatch):
    nll = iter([3.0, 2.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr("train.mean_loss", lambda *_: {"val_nll": next(nll), "val_loss": 0.0})
    run(data, tmp_path, max_iters=6, eval_interval=1)
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [
        f"ckpt_0000000{n}.pt" for n in (2, 5, 6)
    ]
    assert not list(tmp_path.glob("*.tmp"))


def test_without_always_save_checkpoint_only_improvements_are_saved(data, tmp_path, monkeypatch):
    nll, saved = iter([3.0, 2.0, 2.5, 1.0, 1.0, 4.0]), []
    monkeypatch.setattr("train.mean_loss", lambda *_: {"val_nll": next(nll), "val_loss": 0.0})
    monkeypatch.setattr(saver.Saver, "_write", lambda _, state, kept: saved.append(state["step"]))
    run(data, tmp_path, max_iters=5, eval_interval=1, always_save_checkpoint=False)
    assert saved == [1, 3]


def test_save_interval_saves_between_evaluations_and_at_the_end(data, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(saver.Saver, "_write", lambda _, state, kept: saved.append(state["step"]))
    run(data, tmp_path, max_iters=7, eval_interval=100, save_interval=2)
    assert saved == [2, 4, 6, 7]


def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_rubbish(
    data, plain, tmp_path, monkeypatch
):
    shutil.copy(plain[1] / "ckpt_00000030.pt", tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        checkpoint.UserError, match="No space left.*earlier checkpoints are untouched"
    ):
        run(data, tmp_path, init_from="resume", max_iters=31, lr_decay_iters=30)
    assert [path.name for path in tmp_path.glob("ckpt*")] == ["ckpt_00000030.pt"]


def test_the_learning_rate_is_nanogpts(data, tmp_path):
    run(
        data,
        tmp_path,
        max_iters=12,
        warmup_iters=4,
        lr_decay_iters=10,
        learning_rate=1e-2,
        min_lr=1e-3,
    )

    def expected(step: int) -> float:
        if step < 4:
            return 1e-2 * (step + 1) / 5
        if step > 10:
            return 1e-3
        return 1e-3 + 0.5 * (1 + math.cos(math.pi * (step - 4) / 6)) * 9e-3

    assert [r["lr"] for r in records(tmp_path, "loss")] == pytest.approx(
        [expected(step) for step in range(12)]
    )


def test_without_decay_lr_the_learning_rate_is_constant(data, tmp_path):
    run(data, tmp_path, max_iters=5, decay_lr=False)
    assert {r["lr"] for r in records(tmp_path, "loss")} == {1e-2}


@pytest.mark.parametrize(("max_iters", "ramp"), [(0, 0.1), (4, 0.5), (12, 1.0)])
def test_the_kl_follows_the_warm_up(data, tmp_path, max_iters, ramp):
    model = run(data, tmp_path, weights="bayes", max_iters=max_iters, warmup_iters=9)
    assert model.lm_head.kl_ramp.item() == pytest.approx(ramp)
    val, last = TokenFile(data, "val"), records(tmp_path, "val_loss")[-1]
    batches = eval_batches(val, TINY["block_size"], TINY["batch_size"], TINY["eval_iters"])
    model.lm_head.kl_ramp.fill_(0.0)
    data_loss = mean_loss(model, batches, val, Processes(torch.device("cpu")), nullcontext())[
        "val_loss"
    ]
    kl = model.lm_head.weights.kl().item() / model.config.head.n_data
    assert last["val_loss"] - data_loss == pytest.approx(ramp * kl, rel=1e-4)


def test_n_data_is_the_number_of_training_tokens(data, tmp_path):
    model = run(data, tmp_path, weights="bayes", max_iters=0)
    assert model.config.head.n_data == len(TokenFile(data, "train"))


def test_eval_only_evaluates_once_and_saves_nothing(data, plain, tmp_path):
    run(data, tmp_path / "fresh", eval_only=True)
    assert [r["step"] for r in records(tmp_path / "fresh", "step")] == [0]
    assert not list((tmp_path / "fresh").glob("*.pt"))
    run(
        data, tmp_path / "from", eval_only=True, init_from=plain[1]
    )  # as nanoGPT's eval_gpt2.py does with gpt2
    expected = records(plain[1], "val_nll")[-1]["val_nll"]
    assert records(tmp_path / "from", "val_nll")[0]["val_nll"] == pytest.approx(expected, abs=1e-6)


def test_eval_only_on_a_run_leaves_its_records_alone(data, tmp_path):
    run(data, tmp_path, max_iters=4, eval_interval=4)
    run(
        data,
        tmp_path,
        max_iters=6,
        eval_interval=100,
        init_from="resume",
        always_save_checkpoint=False,
    )
    for path in tmp_path.glob("ckpt_00000006.pt"):
        path.unlink()  # as after a run whose last evaluations were no improvement
    before = records(tmp_path, "step")
    run(data, tmp_path, eval_only=True, init_from="resume")
    after = records(tmp_path, "step")
    assert [r for r in after if r in before] == before


def test_a_run_is_not_overwritten_by_another(data, plain):
    before = (plain[1] / "metrics.jsonl").read_text()
    with pytest.raises(
        checkpoint.UserError, match="already holds a run.*--init_from=resume.*--out_dir"
    ):
        run(data, plain[1])
    assert (plain[1] / "metrics.jsonl").read_text() == before


def test_fine_tuning_takes_another_head_on_the_weights_of_a_run(data, plain, tmp_path):
    model = run(
        data, tmp_path, init_from=plain[1], weights="bayes", likelihood="smooth", max_iters=0
    )
    tuned, started = model.state_dict(), plain[0].state_dict()
    assert all(torch.equal(tuned[name], started[name]) for name in started)
    assert model.config.head.weights == "bayes"


@pytest.fixture
def no_wandb_account(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_wandb_without_an_account_logs_offline(data, plain, tmp_path, no_wandb_account, capfd):
    pytest.importorskip("wandb")
    model = run(data, tmp_path / "out", wandb_log=True)
    assert same_weights(model, plain[0])
    assert list((tmp_path / "out").glob("wandb/offline-run-*/*.wandb"))
    assert "warning" not in capfd.readouterr().out


class FailingWandb(types.ModuleType):
    """A wandb whose function `broken` raises."""

    class Error(Exception):
        pass

    def __init__(self, broken: str):
        super().__init__("wandb")
        self.broken, self.api, self.calls, self.id, self.starting_step = broken, None, [], "abc", 0

    def init(self, **_):
        return self._call("init")

    def define_metric(self, name, **_):
        if name == "val/*":
            self._call("define_metric")

    def log(self, record, step):
        self._call("log")

    @property
    def dir(self):
        return self._call("dir") and self.folder

    def finish(self):
        self._call("finish")

    def _call(self, name):
        self.calls.append(name)
        if name == self.broken:
            raise self.Error("the service is down")
        return self


@pytest.mark.parametrize("broken", ["init", "define_metric", "log", "finish"])
def test_a_failing_wandb_is_said_once_and_does_not_stop_the_run(
    data, plain, tmp_path, monkeypatch, capsys, broken
):
    wandb = FailingWandb(broken)
    (tmp_path / "wandb").mkdir()
    wandb.folder = tmp_path / "wandb"
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert same_weights(run(data, tmp_path, wandb_log=True), plain[0])
    assert wandb.calls.count(broken) == 1
    assert capsys.readouterr().out.count("the service is down") == 1


def test_divergence_ends_in_one_line_and_is_not_saved(data, tmp_path):
    with pytest.raises(UserError, match="val nll is nan at step 4; try a lower"):
        run(data, tmp_path, learning_rate=1e3, grad_clip=0, eval_interval=4, warmup_iters=0)
    assert not list(tmp_path.glob("*.pt"))


def test_a_folder_that_takes_no_files_ends_in_one_line(data, tmp_path, monkeypatch):
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path) != tmp_path
    )  # as root it would take them
    with pytest.raises(UserError, match="cannot be written to; .* name another folder"):
        run(data, tmp_path, max_iters=1)
    assert not list(tmp_path.iterdir())


def test_the_command_to_sample_with_can_be_pasted_whatever_the_folder_is_called(
    data, tmp_path, capsys
):
    run(data, out := tmp_path / "my run's folder", max_iters=1)
    command = capsys.readouterr().out.splitlines()[-1].split(": ", 1)[1]
    assert shlex.split(command) == ["python", "sample.py", f"--out_dir={out}"]


def test_training_needs_no_git(data, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    run(data, tmp_path / "run", max_iters=1)
    assert (
        json.loads((tmp_path / "run" / "config.json").read_text())["environment"]["commit"]
        == "unknown"
    )


def test_weights_of_another_tokenizer_are_refused(data, plain, tmp_path):
    other = write_bytes(tmp_path / "bytes")
    with pytest.raises(UserError, match="another tokenizer"):
        run(other, tmp_path / "run", init_from=plain[1])


def test_fine_tuning_keeps_a_posterior(data, tmp_path):
    trained = run(data, tmp_path / "bayes", weights="bayes")
    tuned = run(
        data,
        tmp_path / "tuned",
        weights="bayes",
        init_from=tmp_path / "bayes",
        learning_rate=0,
        min_lr=0,
    )
    assert torch.equal(tuned.lm_head.weights.log_std, trained.lm_head.weights.log_std)


def test_a_run_goes_on_to_its_end_when_nobody_reads_along_any_more(data, tmp_path):
    argv = flags(**TINY | {"dataset": data, "out_dir": tmp_path / "out", "log_interval": 1})
    process = subprocess.Popen(
        [sys.executable, "train.py", *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 0
    assert (tmp_path / "out" / "ckpt_00000030.pt").is_file()
