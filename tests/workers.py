"""What the tests run as two processes: torchrun tests/workers.py CASES DATA FOLDER.

A failed assertion ends a process."""

import math
import os
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from engine.base import distributed
from engine.base.errors import Diverged, run_main
from engine.base.options import load_config
from engine.runs import checkpoint
from model import GPT
from tests.helpers import HEADS, TINY, difference, flags, records, same_weights, values

SHORT = TINY | {
    "max_iters": 6,
    "lr_decay_iters": 6,
    "eval_interval": 3,
    "eval_iters": 3,
    "warmup_iters": 2,
    "n_layer": 2,
    "dropout": 0.1,
    "gradient_accumulation_steps": 4,
    "batch_size": 2,
    "block_size": 8,
}

MUON = {"optimizer": "muon"}
KRON = {"weights": "bayes", "posterior": "kron", "max_iters": 0}


def trained(processes, data: str, out_dir: Path, **options) -> GPT:
    options = SHORT | {"dataset": data, "out_dir": out_dir} | options
    config, given = load_config(train.TrainConfig, flags(**options))
    train.train(config, processes, given)
    return checkpoint.load_model(out_dir)


def check_same_scores(a: Path, b: Path) -> None:
    """Two runs agree to rounding, which Adam amplifies in the gradients of the first steps."""
    for key in ("loss", "grad_norm", "val_nll", "val_perplexity", "val_ece", "val_loss"):
        found = [values(folder, key) for folder in (a, b)]
        tolerance = 1e-3 if key == "grad_norm" else 1e-5
        assert found[0] == pytest.approx(found[1], tolerance, tolerance), (key, a)


def heads(processes, data: str, folder: Path) -> None:
    """For every head, two halves are the whole bit for bit, and sharding changes nothing."""
    for weights, likelihood in HEADS:
        head = {"weights": weights, "likelihood": likelihood}
        whole = folder / f"{weights}-{likelihood}"
        models = {
            sharding: trained(processes, data, whole / sharding, **head, sharding=sharding)
            for sharding in ("none", "fsdp")
        }
        check_same_scores(whole / "none", whole / "fsdp")
        sharding = "none" if likelihood == "smooth" else "fsdp"
        head |= {"sharding": sharding}
        trained(processes, data, whole / "halves", **head, max_iters=3)
        halves = trained(processes, data, whole / "halves", **head, init_from="resume")
        assert same_weights(models[sharding], halves), head
        state = checkpoint.read_newest(whole / sharding)["model"]
        embedding, output = state["transformer.wte.weight"], state["lm_head.weights.weight"]
        assert embedding.data_ptr() == output.data_ptr(), "the file has tied weights twice"


def elastic(processes, data: str, folder: Path) -> None:
    """Resume what one process began."""
    trained(processes, data, folder / "elastic", init_from="resume", sharding="fsdp")


def machines(processes, data: str, folder: Path) -> None:
    """As on two machines, with a process each: fully_shard keeps a copy on each."""
    local = os.environ["LOCAL_WORLD_SIZE"]
    for n_local, sharding in ((local, "none"), ("1", "fsdp")):
        os.environ["LOCAL_WORLD_SIZE"] = n_local
        trained(processes, data, folder / f"machines-{sharding}", sharding=sharding)
    os.environ["LOCAL_WORLD_SIZE"] = local
    check_same_scores(folder / "machines-none", folder / "machines-fsdp")


def compiled(processes, data: str, folder: Path) -> None:
    """Compiled DDP and fully_shard with bfloat16 weights. Nothing is compiled more than twice: for
    training and for evaluation."""
    losses = []
    for sharding in ("none", "fsdp"):
        # dropout draws other numbers where other functions are compiled
        options = {"dropout": 0.0, "dtype": "bfloat16", "compile": True, "weights": "bayes"}
        limit = {"recompile_limit": 2, "fail_on_recompile_limit_hit": True}
        with torch._dynamo.config.patch(**limit):
            trained(processes, data, folder / sharding, **options, sharding=sharding)
        losses.append(values(folder / sharding, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def bayes_mlp(processes, data: str, folder: Path) -> None:
    whole = trained(processes, data, folder / "mlp", bayes_mlp=True)
    mixed = folder / "mlp_mixed"
    trained(processes, data, mixed, bayes_mlp=True, max_iters=3, sharding="fsdp")
    resumed = trained(processes, data, mixed, bayes_mlp=True, init_from="resume", sharding="none")
    assert difference(whole, resumed) < 1e-5


def others(processes, data: str, folder: Path) -> None:
    """An optimizer and a posterior that test_faults compares with one process."""
    trained(processes, data, folder / "muon-two", **MUON)
    trained(processes, data, folder / "kron-two", **KRON)


def patience(processes, data: str, folder: Path) -> None:
    """Both processes stop when the validation nll does not fall."""
    stale = {
        "learning_rate": 0,
        "min_lr": 0,
        "eval_interval": 1,
        "patience": 2,
    }
    trained(processes, data, folder / "stale", **stale)
    steps = values(folder / "stale", "step", "val_nll")
    assert steps == [0, 1, 2]


def nan(processes, data: str, folder: Path) -> None:
    """Both processes skip a step whose loss or gradient is not finite on one of them, and a run
    of nothing but such steps ends.
    """
    forward, calls = GPT.forward, {"n": 0}
    bad_loss, bad_gradient = {7}, {9}  # steps 4 and 5

    def sometimes(self, *args):
        calls["n"] += 1
        loss = forward(self, *args)
        if processes.rank == 1 and calls["n"] in bad_loss:
            return loss * math.nan
        if processes.rank == 1 and calls["n"] in bad_gradient:
            return loss + 0 * (self.transformer.wte.weight.sum() * 0).sqrt()  # 0 * infinity
        return loss

    GPT.forward = sometimes
    model = trained(processes, data, folder / "some", max_iters=8)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    skipped = values(folder / "some", "step", "skipped_loss")
    assert skipped == [4, 5] and values(folder / "some", "skipped")[-1] == 2
    assert values(folder / "some", "step", "val_nll")[-1] == 8
    bad_loss = range(10**9)
    try:
        trained(processes, data, folder / "all", max_iters=100, eval_interval=100)
    except Diverged as error:
        assert "--learning_rate" in str(error)
        if processes.is_main:  # it writes the records
            last = records(folder / "all", "skipped")[-1]
            assert last["step"] == train.MAX_SKIPPED
    else:
        raise AssertionError("a run without any update continued")
    GPT.forward = forward


def hang(processes, data: str, folder: Path) -> None:
    """One process sleeps in its third step."""
    forward, calls = GPT.forward, []

    def sleepy(self, *args):
        calls.append(1)
        if processes.rank == 1 and len(calls) == 6:
            time.sleep(1000)
        return forward(self, *args)

    GPT.forward = sleepy
    trained(processes, data, folder / "hung")


def main() -> None:
    cases, data, folder = sys.argv[1:]
    torch.set_num_threads(1)
    hang_timeout = 15 if cases == "hang" else 600
    with distributed.init("cpu", "auto", hang_timeout) as processes:
        for case in cases.split(","):
            globals()[case](processes, data, Path(folder))


if __name__ == "__main__":
    run_main(main)
