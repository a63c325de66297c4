"""What the tests run as two processes: torchrun tests/workers.py CASES DATA FOLDER.

A failed claim ends a process."""

import math
import sys
import time
from pathlib import Path

import torch

import train
from engine.base import distributed
from engine.base.errors import Diverged, run_main
from engine.base.options import load_config
from engine.runs import checkpoint
from model import GPT
from tests.helpers import HEADS, TINY, difference, flags, records, same_weights

SHORT = TINY | {
    "max_iters": 6,
    "lr_decay_iters": 6,
    "eval_interval": 3,
    "eval_iters": 3,
    "warmup_iters": 2,
}
SHORT |= {
    "n_layer": 2,
    "dropout": 0.1,
    "gradient_accumulation_steps": 4,
    "batch_size": 2,
    "block_size": 8,
}


def trained(processes, data: str, out_dir: Path, **options) -> GPT:
    config, given = load_config(
        train.TrainConfig, flags(**SHORT | {"dataset": data, "out_dir": out_dir} | options)
    )
    train.train(config, processes, given)
    return checkpoint.load_model(out_dir)


def losses(out_dir: Path) -> list[float]:
    return [
        record[key] for key in ("loss", "val_nll", "val_ece") for record in records(out_dir, key)
    ]


def heads(processes, data: str, folder: Path) -> None:
    """Of every head: halves are the whole bit for bit, sharded or not, and both have the same
    losses.
    """
    for weights, likelihood in HEADS:
        name = folder / f"{weights}_{likelihood}"
        for sharding in ("none", "fsdp"):
            options = {"weights": weights, "likelihood": likelihood, "sharding": sharding}
            whole = trained(processes, data, name / sharding, **options)
            trained(processes, data, name / f"{sharding}_parts", **options | {"max_iters": 3})
            parts = trained(
                processes, data, name / f"{sharding}_parts", **options, init_from="resume"
            )
            assert same_weights(whole, parts), (name, sharding)
            state = checkpoint.read_newest(name / sharding)["model"]
            tied = (state["transformer.wte.weight"], state["lm_head.weights.weight"])
            assert tied[0].data_ptr() == tied[1].data_ptr(), "the file has two copies"
        apart = [
            abs(a - b) for a, b in zip(*(losses(name / s) for s in ("none", "fsdp")), strict=True)
        ]
        assert len(apart) == 12 and max(apart) < 1e-6, (name, apart)
    mixed = trained(processes, data, folder / "mlp", bayes_mlp=True, max_iters=3, sharding="fsdp")
    mixed = trained(
        processes, data, folder / "mlp", bayes_mlp=True, init_from="resume", sharding="none"
    )
    assert difference(mixed, trained(processes, data, folder / "mlp_none", bayes_mlp=True)) < 1e-5


def nan(processes, data: str, folder: Path) -> None:
    """A loss that is not a number on one process alone is left out by both, and a run of them
    ends.
    """
    forward, calls = GPT.forward, {"n": 0, "bad": {7, 9}}

    def sometimes(self, *args):
        calls["n"] += 1
        bad = processes.rank == 1 and calls["n"] in calls["bad"]
        return forward(self, *args) * (math.nan if bad else 1.0)

    GPT.forward = sometimes
    model = trained(processes, data, folder / "some", max_iters=8)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert [r["step"] for r in records(folder / "some", "skipped_loss")] == [4, 5]
    assert (
        records(folder / "some", "loss")[-1]["skipped"] == 2
        and records(folder / "some", "val_nll")[-1]["step"] == 8
    )
    calls["bad"] = range(10**9)
    try:
        trained(processes, data, folder / "all", max_iters=100, eval_interval=100)
    except Diverged as error:
        assert f"{train.MAX_SKIPPED} steps in a row were skipped" in str(
            error
        ) and "--learning_rate" in str(error)
        if processes.is_main:  # who writes the records
            assert records(folder / "all", "skipped")[-1]["step"] == train.MAX_SKIPPED
    else:
        raise AssertionError("a run without any update went on")


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
    hang_timeout = 20 if cases == "hang" else 600
    with distributed.init("cpu", "auto", hang_timeout) as processes:
        for case in cases.split(","):
            globals()[case](processes, data, Path(folder))


if __name__ == "__main__":
    run_main(main)
