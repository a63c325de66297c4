"""How a run's records are shown: on screen, and by wandb."""

import struct
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from engine.base.distributed import Processes
from engine.runs.logger import Logger, has_account
from tests.helpers import records, run, write_words
from train import Progress


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("data"))


def test_the_screen_shows_an_evaluation_in_one_short_line(data, tmp_path, capsys):
    run(data, tmp_path, max_iters=1)
    line = [line for line in capsys.readouterr().out.splitlines() if "val nll" in line][0]
    names = [part.split()[:-1] for part in line.split(" | ")[1:]]
    assert names == [["val", "nll"], ["perplexity"], ["ece"], ["loss"]] and len(line) < 80


def test_the_time_left_counts_evaluations_and_the_speed_does_not(tmp_path, monkeypatch, capsys):
    clock, progress = SimpleNamespace(now=100.0), Progress(step=2)
    monkeypatch.setattr("engine.runs.logger.time", SimpleNamespace(perf_counter=lambda: clock.now))
    log = Logger(tmp_path, Processes(torch.device("cpu")), 10, 1.0, progress, 12)
    with log.paused():
        clock.now += 30  # an evaluation
    clock.now, progress.step = clock.now + 10, 4
    log.training(1.0, 1e-3, 1.0)
    log.close()
    assert (
        " 2 tokens/s | 0:02:40 left" in capsys.readouterr().out
    )  # 20 tokens in 10 s; 2 of 10 steps in 40 s


def stored(path) -> list:
    """The records in wandb's own file. wandb's service may still be writing it when finish() is
    back.
    """
    end = time.monotonic() + 30
    while not (found := read(path.read_bytes())) or found[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < end, f"{path} has no end"
        time.sleep(0.02)
    return found


def read(content: bytes) -> list:
    """The records in a LevelDB log: 32 KiB blocks of checksum, length, kind and bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, part, found = 7, b"", []
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, n, kind = struct.unpack("<IHB", content[at : at + 7])
        if at + 7 + n > len(content):  # not all of it is there yet
            break
        part, at = part + content[at + 7 : at + 7 + n], at + 7 + n
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(part))
            part = b""
    return found


def charts(out_dir) -> dict[str, list[tuple[int, str]]]:
    """name -> (step, value) of all that the newest offline run in out_dir would upload."""
    newest = max(
        out_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns
    )
    found = {}
    for record in stored(newest):
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            found.setdefault(name, []).append((record.history.step.num, item.value_json))
    return found


@pytest.fixture
def offline(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))


def test_two_heads_share_their_charts_in_wandb_against_tokens(data, tmp_path, offline):
    run(data, tmp_path / "softmax", wandb_log=True, max_iters=4, eval_interval=2)
    run(
        data,
        tmp_path / "other",
        wandb_log=True,
        max_iters=4,
        eval_interval=2,
        weights="bayes",
        likelihood="sigmoid",
    )
    found, other = (charts(tmp_path / name) for name in ("softmax", "other"))
    assert found.keys() == other.keys()
    assert {
        "val/nll",
        "val/perplexity",
        "val/ece",
        "objective/val_loss",
        "objective/train_loss",
    } <= found.keys()
    assert {
        "train/lr",
        "train/grad_norm",
        "tokens",
        "seconds",
    } <= found.keys() and "loss" not in found
    nlls = [
        (record["step"], record["val_nll"]) for record in records(tmp_path / "other", "val_nll")
    ]
    assert [(step, float(value)) for step, value in other["val/nll"]] == nlls
    path = next((tmp_path / "other").glob("wandb/offline-run-*/*.wandb"))
    metrics = {
        record.metric.name or record.metric.glob_name: record.metric for record in stored(path)
    }
    assert all(
        metrics[f"{group}/*"].step_metric == "tokens" for group in ("train", "val", "objective")
    )


def test_the_newest_offline_file_of_a_resumed_run_holds_all_of_it(data, tmp_path, offline, capfd):
    options = {"lr_decay_iters": 8, "eval_interval": 2}
    run(data, tmp_path, wandb_log=True, max_iters=4, **options)
    assert [step for step, _ in charts(tmp_path)["val/nll"]] == [0, 2, 4]
    (tmp_path / "metrics.jsonl").open("a").write(
        '{"step": 6, "tokens": 1, "val_nll": 99.0}\n'
    )  # of a killed process
    run(data, tmp_path, wandb_log=True, max_iters=8, init_from="resume", **options)
    assert [step for step, _ in charts(tmp_path)["val/nll"]] == [0, 2, 4, 6, 8]
    assert float(dict(charts(tmp_path)["val/nll"])[6]) < 99
    assert "less than the current step" not in capfd.readouterr().err


def test_wandb_gets_the_name_and_the_options_of_a_run(data, tmp_path, offline, monkeypatch):
    import wandb

    options, init = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **given: options.append(given) or init(**given))
    run(
        data,
        tmp_path / "s" / "bayes",
        wandb_log=True,
        max_iters=2,
        lr_decay_iters=4,
        weights="bayes",
    )
    time.sleep(1.1)  # wandb names a run's folder by the second
    run(
        data,
        tmp_path / "s" / "bayes",
        wandb_log=True,
        max_iters=4,
        lr_decay_iters=4,
        init_from="resume",
    )
    run(
        data,
        tmp_path / "s" / "mine",
        wandb_log=True,
        max_iters=1,
        wandb_run_name="mine",
        likelihood="sigmoid",
    )
    assert [given["name"] for given in options] == ["s/bayes", "s/bayes", "mine"]
    assert options[-1]["config"]["likelihood"] == "sigmoid"
    first, again = sorted((tmp_path / "s" / "bayes").glob("wandb/offline-run-*"))
    assert first.name.split("-")[-1] == again.name.split("-")[-1], "a resumed run keeps its id"


def test_an_account_is_a_key_in_the_environment_or_in_netrc(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not has_account()
    (tmp_path / "netrc").write_text("machine example.com login a password b\n")
    assert not has_account()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password b\n")
    assert has_account()
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert has_account()


class Charts:
    """A wandb that has the steps below starting_step."""

    def __init__(self, starting_step: int):
        self.starting_step, self.api, self.id, self.steps, self.dir = (
            starting_step,
            None,
            "abc",
            [],
            "unused",
        )

    def init(self, **_):
        return self

    def define_metric(self, *_, **__):
        pass

    def log(self, record, step):
        assert record["val/nll"] == 1.0
        self.steps.append(step)

    def finish(self):
        pass


@pytest.mark.parametrize(
    ("has", "sent"), [(4, [4, 5, 6, 7]), (7, [7]), (0, [0, 1, 2, 3, 4, 5, 6, 7])]
)
def test_wandb_is_sent_what_it_lacks_and_no_step_twice(tmp_path, monkeypatch, has, sent):
    lines = [f'{{"step": {step}, "tokens": 0, "val_nll": 1.0}}\n' for step in range(6)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    wandb, progress = Charts(has), Progress(step=5)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = Logger(tmp_path, Processes(torch.device("cpu")), 1, 1.0, progress, 10)
    log.start_wandb(tmp_path)
    for progress.step in (6, 7):
        log.evaluation({"val_nll": 1.0})
    log.close()
    assert wandb.steps == sent
