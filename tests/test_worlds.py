"""How processes share a step."""

import sys
from pathlib import Path

import pytest
import torch

from engine.base.distributed import Processes, divide_step, peak_flops
from engine.base.errors import UserError
from engine.base.options import load_config
from engine.data.batches import Batches
from engine.data.tokens import TokenFile
from engine.runs import checkpoint
from tests.helpers import ROOT, run, values
from train import TrainConfig

GPU_CONFIGS = sorted({*ROOT.glob("config/train_*gpt2*.py")} - {*ROOT.glob("config/*_cpu.py")})


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("config", GPU_CONFIGS, ids=lambda path: path.stem)
def test_gpu_configs_keep_their_step_on_1_to_64_processes(config, world_size):
    options, _ = load_config(TrainConfig, [str(config)])
    n_micro, batch_size = options.gradient_accumulation_steps, options.batch_size
    if world_size == 64 and n_micro * batch_size == 480:  # as config/train_gpt2.py says
        n_micro, batch_size = 64, 8
    n_parts, size = divide_step(n_micro, batch_size, world_size)
    assert n_parts * size == n_micro * batch_size
    assert size <= batch_size and n_parts % world_size == 0


@pytest.mark.parametrize("world_size", [8, 64, 1024])
def test_processes_share_micro_batches_without_gap_or_overlap(world_size):
    cpu = torch.device("cpu")
    first, end = 3 * world_size, 6 * world_size
    shares = [Processes(cpu, rank, world_size).share(first, end) for rank in range(world_size)]
    assert sorted(i for share in shares for i in share) == list(range(first, end))
    assert {len(share) for share in shares} == {3}


def test_a_step_that_processes_cannot_share_names_an_accumulation_that_they_can():
    with pytest.raises(UserError) as error:
        divide_step(5, 3, 8)
    accumulation = int(str(error.value).split("=")[-1])
    assert divide_step(accumulation, 3, 8)


def test_more_and_smaller_micro_batches_train_the_same(words_data, tmp_path):
    """The same blocks in each step, and the same losses but for rounding."""
    train = TokenFile(words_data, "train")
    whole, divided = Batches(train, 8, 16, seed=1), Batches(train, 2, 16, seed=1)
    assert torch.equal(whole[3][0], torch.cat([divided[i][0] for i in range(12, 16)]))
    run(words_data, tmp_path / "whole", max_iters=10)
    run(words_data, tmp_path / "divided", max_iters=10, batch_size=2, gradient_accumulation_steps=4)
    losses = [values(tmp_path / name, "loss") for name in ("whole", "divided")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize(
    "name, peak",
    [("NVIDIA L40S", 362e12), ("NVIDIA L40", 181e12), ("NVIDIA H100 PCIe", 756e12)],
)
def test_a_gpu_has_the_peak_of_its_own_data_sheet(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
def test_the_processes_of_a_machine_share_a_checkpoint_in_memory(trained, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    state = checkpoint.read_newest(trained())
    mapped = Path("/proc/self/maps").read_text()
    assert state and str(checkpoint.list_checkpoints(trained())[-1]) in mapped


def test_a_step_reads_the_device_once(words_data, tmp_path, monkeypatch):
    reads = []

    def counted(read):
        return lambda self, *arguments: reads.append(self) or read(self, *arguments)

    for name in ("item", "tolist", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    n_reads = []
    for n in (3, 7):
        run(words_data, tmp_path / str(n), max_iters=n, eval_interval=100, lr_decay_iters=100)
        n_reads.append(len(reads))
        reads.clear()
    assert n_reads[1] - n_reads[0] == 4
