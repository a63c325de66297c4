"""Short forms of tests/faults.py (kills, damage, signals, a soak), and the faults that need two
processes.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from engine.runs import checkpoint
from engine.runs.saver import Saver
from tests import faults
from tests.faults import LAST_WORDS, OPTIONS, Run, begins_at, steps_saved, undisturbed
from tests.helpers import ROOT, flags, records, run, same_weights, write_words


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    """The model of two processes that nothing happens to."""
    return undisturbed(data, tmp_path_factory.mktemp("reference") / "two", 2)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def torchrun(*argv, agents: int = 1) -> list[subprocess.CompletedProcess]:
    """Two processes under torchrun, or under two of them as on two machines, to their end."""
    nodes = ["--standalone", "--nproc_per_node=2"]
    if agents > 1:
        endpoint = f"127.0.0.1:{free_port()}"
        nodes = [
            "--nnodes=2",
            "--nproc_per_node=1",
            "--rdzv_backend=c10d",
            f"--rdzv_endpoint={endpoint}",
        ]
        nodes += ["--rdzv_id=7", "--local_addr=127.0.0.1"]
    command = [sys.executable, "-m", "torch.distributed.run", *nodes, *map(str, argv)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "start_new_session": True,
    }
    started = [subprocess.Popen(command, env=environment, cwd=ROOT, **pipes) for _ in range(agents)]
    outputs = []
    try:
        for process in started:
            outputs.append(process.communicate(timeout=LAST_WORDS)[0])
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(command, p.returncode, out)
        for p, out in zip(started, outputs, strict=True)
    ]


def test_a_run_killed_at_any_instant_goes_on_from_its_newest_checkpoint_to_the_undisturbed_end(
    data, tmp_path
):
    counted = faults.kills(4, data, tmp_path, random.Random(1))
    assert (
        counted["resumed"] == 4
        and counted["with_the_undisturbed_weights"] == counted["runs_finished"] >= 1
    )


def test_a_damaged_checkpoint_is_passed_over_with_a_warning_and_refused_by_name(data, tmp_path):
    counted = faults.corruptions(12, data, tmp_path, random.Random(1))
    damaged = 12 - counted["harmless"]
    assert counted["passed_over"] == counted["refused_by_name"] == damaged >= 10
    assert counted["same_end"]


def test_a_signal_leaves_a_checkpoint_of_the_last_step_and_the_run_goes_on_to_the_same_end(
    data, tmp_path
):
    counted = faults.signals(4, data, tmp_path, random.Random(1))
    assert counted["checkpoint_at_most_one_step_old"] == 4
    assert counted["with_the_undisturbed_weights"] == counted["runs_finished"] >= 2


def test_a_soak_of_kills_and_signals_ends_with_the_undisturbed_weights(data, tmp_path):
    assert faults.soak(12, data, tmp_path, random.Random(1), apart=200)[
        "same_weights_as_undisturbed"
    ]


def test_torchrun_starts_anew_after_one_process_is_killed_and_ends_as_if_nothing_had_been(
    data, tmp_path, reference
):
    started = Run(data, tmp_path / "run", 2, save_interval=20)
    assert started.wait_for("step 1[0-9][0-9]/")
    os.kill(started.workers()[1], signal.SIGKILL)
    code, _ = started.ended()
    assert code == 0 and "resuming at step" in started.output
    assert same_weights(checkpoint.load_model(tmp_path / "run"), reference)


def slow_main() -> None:
    """train.main, which writes its checkpoint of step 20, and hangs in any later one."""
    write = Saver._write_and_read_back

    def slowly(self, temporary, state):
        if state["step"] > 20:
            print("writing", flush=True)
            time.sleep(1000)
        write(self, temporary, state)

    Saver._write_and_read_back = slowly
    train.main()


@pytest.fixture
def slow_writer(data, tmp_path):
    options = {"save_interval": 20, "max_iters": 1000, "eval_interval": 1000}
    started = Run(data, tmp_path / "run", main=slow_main, **options)
    yield started
    started.kill()


def test_a_second_signal_ends_at_once_and_leaves_the_checkpoint_before(data, tmp_path, slow_writer):
    assert slow_writer.wait_for("step +25/")
    slow_writer.process.send_signal(signal.SIGTERM)
    assert slow_writer.wait_for("a second signal ends at once")
    time.sleep(1.5)  # within a second it counts as an echo of the first
    assert slow_writer.process.poll() is None
    slow_writer.process.send_signal(signal.SIGINT)
    assert slow_writer.ended()[0] == 128 + signal.SIGINT
    assert "SIGINT again: ended at once" in slow_writer.output
    out_dir = tmp_path / "run"
    assert steps_saved(out_dir)[-1] == 20 and checkpoint.read_newest(out_dir)["step"] == 20
    assert begins_at(Run(data, out_dir, max_iters=21, lr_decay_iters=400, save_interval=20)) == 20


def test_steps_go_on_while_a_checkpoint_is_written(slow_writer):
    assert slow_writer.wait_for("writing")
    assert slow_writer.wait_for("step +50/")  # ten steps after the one that is being written


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(data, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    undisturbed(data, tmp_path / "one", max_iters=1)
    size = int(
        2.5 * (tmp_path / "one" / "ckpt_00000001.pt").stat().st_size
    )  # two are kept, the third does not fit
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("to mount a small file system needs root")
    try:
        started = Run(data, disk / "run", log=tmp_path / "log", save_interval=5, max_iters=30)
        code, _ = started.ended()
        newest = checkpoint.read_newest(disk / "run")["step"]
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    errors = re.findall(r"error: cannot write .*(?:ckpt|metrics).*make room", started.output)
    assert code == 2 and len(errors) == 1 and "Traceback" not in started.output
    assert newest >= 5


def test_two_processes_keep_what_one_promises(data, tmp_path):
    """Halves are the whole for every head, sharded or not; a bad gradient on one is left out by
    both.
    """
    (ended,) = torchrun(ROOT / "tests" / "workers.py", "heads,nan", data, tmp_path)
    assert ended.returncode == 0, ended.stdout[-5000:]


def test_a_hang_ends_with_the_stacks_of_the_process_that_hangs(data, tmp_path):
    (ended,) = torchrun(ROOT / "tests" / "workers.py", "hang", data, tmp_path)
    assert ended.returncode != 0
    assert "Timeout" in ended.stdout and "in sleepy" in ended.stdout, ended.stdout[-5000:]


def test_processes_may_come_and_go_two_one_two_and_be_sharded(data, tmp_path):
    options = {
        "eval_interval": 10,
        "save_interval": 10,
        "gradient_accumulation_steps": 4,
        "lr_decay_iters": 40,
    }
    run(data, tmp_path / "one", **OPTIONS | options | {"max_iters": 40})
    parts = ((10, 2, "fsdp"), (20, 1, "none"), (30, 2, "none"), (40, 2, "fsdp"))
    for end, processes, sharding in parts:
        options |= {"max_iters": end, "sharding": sharding}
        assert Run(data, tmp_path / "elastic", processes, **options).ended()[0] == 0
    for key in ("loss", "val_nll"):
        whole, parts = (
            [r[key] for r in records(tmp_path / name, key)] for name in ("one", "elastic")
        )
        assert parts == pytest.approx(whole, abs=1e-5) and len(whole) >= 4


def test_two_torchruns_that_meet_train_as_one_process_does(data, tmp_path):
    options = OPTIONS | {"gradient_accumulation_steps": 4, "max_iters": 10}
    run(data, tmp_path / "one", **options)
    both = torchrun(
        ROOT / "train.py",
        *flags(**options | {"dataset": data, "out_dir": tmp_path / "two"}),
        agents=2,
    )
    assert [ended.returncode for ended in both] == [0, 0], both[0].stdout[-3000:]
    whole, parts = (
        [r["loss"] for r in records(tmp_path / name, "loss")] for name in ("one", "two")
    )
    assert parts == pytest.approx(whole, abs=1e-5) and len(whole) == 10


SLURM = {  # stand-ins: two "machines" that are this one
    "srun": 'shift; for _ in 1 2; do "$@" & jobs="$jobs $!"; done; trap "kill -TERM $jobs" TERM\n'
    "for job in $jobs; do while kill -0 $job 2>/dev/null; do wait $job; code=$?; done; done; "
    "exit $code",
    "scontrol": '[ "$1" = requeue ] && echo "requeued $2" || echo 127.0.0.1',
}


def test_the_slurm_script_trains_on_two_machines_and_goes_back_into_the_queue(
    data, tmp_path, reference
):
    for name, script in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    slurm = {
        "SLURM_JOB_NODELIST": "a,b",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "1",
        "RDZV_PORT": str(free_port()),
    }
    options = OPTIONS | {
        "dataset": data,
        "out_dir": tmp_path / "run",
        "save_interval": 1000,
        "device": "cpu",
    }
    command = [ROOT / "config" / "cluster" / "slurm.sh", ROOT / "train.py", *flags(**options)]
    output = ""
    for last in (False, True):
        with open(tmp_path / "log", "w+") as log:
            environment = os.environ | slurm | {"PATH": path, "OMP_NUM_THREADS": "1"}
            job = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
            )
            end = time.monotonic() + LAST_WORDS
            while (
                not last
                and "step 100/" not in output
                and time.monotonic() < end
                and job.poll() is None
            ):
                time.sleep(0.05)
                output = (tmp_path / "log").read_text()
            if not last:
                job.send_signal(signal.SIGUSR1)
            code = job.wait(LAST_WORDS)
            output = (tmp_path / "log").read_text()
        assert code == 0, output[-3000:]
        assert ("requeued 7" in output, "resuming at step" in output) == (not last, last), output[
            -3000:
        ]
    assert same_weights(checkpoint.load_model(tmp_path / "run"), reference)


def test_torchrun_does_not_start_from_scratch_in_the_folder_of_a_run(data, tmp_path):
    undisturbed(data, tmp_path / "run", max_iters=5)
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    started = Run(data, tmp_path / "run", 2, restarts=1, init_from="scratch", max_iters=9)
    code, _ = started.ended()
    assert (
        code != 0 and "already holds a run" in started.output and "resuming" not in started.output
    )
    assert {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")} == before


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_one_trains(data, tmp_path):
    first = Run(data, tmp_path / "run", max_iters=10**6)
    try:
        assert first.wait_for("step +[0-9]+/")
        second = Run(data, tmp_path / "run", log=tmp_path / "second.log")
        assert second.ended()[0] == 2
        last_line = second.output.splitlines()[-1]
        assert re.fullmatch("error: another process is training in .*--out_dir", last_line)
    finally:
        first.kill()


def test_the_counts_in_the_training_logs_are_of_whole_campaigns_without_a_failure():
    found = json.loads((ROOT / "training_logs" / "reliability.json").read_text())
    assert found["kills"]["resumed"] == found["kills"]["kills"] >= 100
    assert found["corruptions"]["passed_over"] == found["corruptions"]["corruptions"] >= 40
    assert found["signals"]["checkpoint_at_most_one_step_old"] == found["signals"]["signals"] >= 50
    assert found["soak"]["same_weights_as_undisturbed"] and found["soak"]["seconds"] >= 3600
