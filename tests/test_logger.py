"""How a run's records are shown: on screen, and by wandb."""

import sys
import time
import types
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from engine.base.distributed import Processes
from engine.runs import logger
from engine.runs.logger import Logger
from tests.helpers import records, refusal, run, same_weights, values
from train import Progress


def new_logger(out_dir: Path, progress: Progress, tokens_per_step: int = 1) -> Logger:
    one = Processes(torch.device("cpu"))
    return Logger(out_dir, one, tokens_per_step, 1.0, progress, max_iters=12)


def test_the_time_left_counts_evaluations_and_the_speed_does_not(tmp_path, monkeypatch, capsys):
    clock, progress = types.SimpleNamespace(now=100.0), Progress(step=2)
    monkeypatch.setattr(logger, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    log = new_logger(tmp_path, progress, tokens_per_step=10)
    with log.paused():
        clock.now += 30  # an evaluation
    clock.now += 10
    progress.step = 4
    log.training(1.0, 1e-3, 1.0)
    (record,) = records(tmp_path, "loss")
    assert record["tokens_per_second"] == 2.0 and record["seconds"] == 10.0
    assert "0:02:40" in capsys.readouterr().out  # 2 of 10 steps in 40 s


def test_a_full_disk_ends_the_run_in_one_line(tmp_path):
    log = new_logger(tmp_path, Progress())
    log.path = Path("/dev/full")
    assert "/dev/full" in refusal(log.evaluation, {"val_nll": 1.0})


@pytest.fixture
def wandb(monkeypatch):
    module = MagicMock()
    module.init.return_value.id = "abc"
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.mark.parametrize("broken", ["init", "init.return_value.log", "init.return_value.finish"])
def test_a_failing_wandb_gives_one_warning_and_does_not_stop_the_run(
    words_data, tmp_path, wandb, capsys, broken
):
    wandb.configure_mock(**{f"{broken}.side_effect": RuntimeError("the service is down")})
    out_dir = tmp_path / "study" / "bayes"
    run(words_data, out_dir, wandb_log=True, max_iters=2, weights="bayes")
    options = wandb.init.call_args.kwargs
    assert options["name"] == "study/bayes" and options["config"]["weights"] == "bayes"
    assert values(out_dir, "step", "val_nll")[-1] == 2
    assert capsys.readouterr().out.count("the service is down") == 1


def test_wandb_gets_the_records_of_a_resumed_run_under_its_id(tmp_path, wandb):
    progress = Progress(step=5, wandb_id="abc")
    log = new_logger(tmp_path, progress)
    log.start_wandb(tmp_path)
    assert wandb.init.call_args.kwargs["id"] == "abc"
    for progress.step in (6, 7):
        log.evaluation({"val_nll": 1.0})
    log.close()
    wandb.init.return_value.define_metric.assert_any_call("val/*", step_metric="tokens")
    sent = [call.kwargs["step"] for call in wandb.init.return_value.log.call_args_list]
    assert sent == [6, 7]


@pytest.mark.slow
def test_the_offline_files_of_wandb_hold_all_of_a_resumed_run(
    words_data, tmp_path, monkeypatch, capfd
):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    out_dir = tmp_path / "run"
    options = {"lr_decay_iters": 8, "eval_interval": 2, "wandb_log": True}
    first = run(words_data, out_dir, **options, max_iters=4)
    assert same_weights(first, run(words_data, tmp_path / "plain", max_iters=4, lr_decay_iters=8))
    with open(out_dir / "metrics.jsonl", "a") as file:  # of a killed process
        file.write('{"step": 6, "tokens": 1, "val_nll": 99.0}\n')
    run(words_data, out_dir, **options, max_iters=8, init_from="resume")
    nlls = values(out_dir, "val_nll")
    assert len(nlls) == 5 and 99.0 not in nlls
    texts = ["val/nll", "objective/val_loss", "train/grad_norm", *map(repr, nlls)]
    files = list(out_dir.glob("wandb/offline-run-*/*.wandb"))
    end = time.monotonic() + 30
    # wandb's service may still write a file when finish() returns
    while any(not any(text.encode() in file.read_bytes() for file in files) for text in texts):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert "warning" not in capfd.readouterr().out
