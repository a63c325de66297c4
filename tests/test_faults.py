"""Two processes repeat one; short campaigns of tests/faults.py, and other faults of runs."""

import os
import random
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
from tests.faults import MAX_SECONDS, OPTIONS, STEP, Run, first_step, steps_saved, undisturbed
from tests.helpers import HEADS, ROOT, difference, flags, run, same_weights
from tests.workers import KRON, MUON, SHORT, check_same_scores


def torchrun(cases: str, data: Path, folder: Path) -> tuple[int, str]:
    """Exit code and output of these cases of tests/workers.py on two processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = ROOT / "tests" / "workers.py"
    done = subprocess.run(
        [sys.executable, *launch, script, cases, data, folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    return done.returncode, done.stdout


def test_two_processes_repeat_the_run_of_one_and_runs_move_between_them(words_data, tmp_path):
    """tests/workers.py has more claims about two processes."""
    elastic = tmp_path / "elastic"
    run(words_data, elastic, **SHORT | {"max_iters": 3})
    code, output = torchrun(
        "heads,elastic,machines,bayes_mlp,others,patience,nan", words_data, tmp_path
    )
    assert code == 0, output[-5000:]
    for weights, likelihood in HEADS:
        one, two = tmp_path / f"{weights}-{likelihood}-one", tmp_path / f"{weights}-{likelihood}"
        model = run(words_data, one, **SHORT, weights=weights, likelihood=likelihood)
        assert difference(model, checkpoint.load_model(two / "none")) < 1e-4
        check_same_scores(one, two / "none")
    model = run(words_data, tmp_path / "muon", **SHORT, **MUON)
    # updates of up to 0.02 in bfloat16, six of them
    assert difference(model, checkpoint.load_model(tmp_path / "muon-two")) < 3e-3
    model = run(words_data, tmp_path / "kron", **SHORT | KRON)
    kron = checkpoint.load_model(tmp_path / "kron-two").lm_head.weights.column_factor
    assert (kron - model.lm_head.weights.column_factor).abs().max() < 1e-6
    longer = SHORT | {"max_iters": 9}
    model = run(words_data, elastic, **longer, init_from="resume")
    assert difference(model, run(words_data, tmp_path / "longer", **longer)) < 1e-4
    check_same_scores(elastic, tmp_path / "longer")


@pytest.mark.parametrize("n, processes", [(4, 1), pytest.param(8, 2, marks=pytest.mark.slow)])
def test_after_signals_at_any_instant_a_run_resumes_and_ends_as_if_undisturbed(
    words_data, tmp_path, n, processes
):
    counts = faults.campaign(n, words_data, tmp_path, random.Random(3), processes)
    events = counts["events"]
    assert all(events.values()) and counts["resumed_from_the_newest_checkpoint"] == n
    assert counts["saved_the_last_step"] == events["SIGTERM"] + events["SIGINT"]
    assert counts["same_weights_as_undisturbed"]


def main_with_slow_writer() -> None:
    """train.main, which writes its checkpoint of step 20, and hangs in any later one."""
    write = Saver._write_and_read_back

    def slowly(self, temporary, state):
        if state["step"] > 20:
            print("writing", flush=True)
            time.sleep(1000)
        write(self, temporary, state)

    Saver._write_and_read_back = slowly
    train.main()


def test_steps_continue_during_a_write_and_a_second_signal_ends_it_at_once(words_data, tmp_path):
    out_dir = tmp_path / "run"
    options = {"save_interval": 20, "max_iters": 1000, "eval_interval": 1000}
    started = Run(words_data, out_dir, main=main_with_slow_writer, **options)
    try:
        assert started.wait_for("writing") and started.wait_for("step +50/")
        started.send(signal.SIGTERM)
        assert started.wait_for("SIGTERM")
        time.sleep(1.5)  # within a second it counts as an echo of the first
        assert started.process.poll() is None
        started.send(signal.SIGINT)
        assert started.end() == 128 + signal.SIGINT
    finally:
        started.kill()
    assert steps_saved(out_dir)[-1] == 20
    again = Run(words_data, out_dir, max_iters=21, lr_decay_iters=200, save_interval=20)
    assert first_step(again) == 20
    again.end()


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_one_trains(
    words_data, tmp_path
):
    first = Run(words_data, tmp_path / "run", max_iters=10**6)
    try:
        assert first.wait_for(STEP)
        second = Run(words_data, tmp_path / "run", log=tmp_path / "second.log")
        assert second.end() == 2 and "--out_dir" in second.output.splitlines()[-1]
    finally:
        first.kill()


def main_without_a_reader() -> None:
    """train.main, whose output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    sys.stdout = os.fdopen(writer, "w")
    train.main()


def test_a_run_continues_when_the_reader_of_its_output_has_ended(words_data, tmp_path):
    started = Run(words_data, tmp_path / "run", main=main_without_a_reader, max_iters=5)
    assert started.end() == 0 and started.output == ""
    assert steps_saved(tmp_path / "run")[-1] == 5


@pytest.mark.slow
def test_two_compiled_processes_train_sharded_as_with_ddp(words_data, tmp_path):
    code, output = torchrun("compiled", words_data, tmp_path)
    assert code == 0, output[-5000:]


@pytest.mark.slow
def test_a_hang_ends_with_the_stacks_of_the_process_that_hangs(words_data, tmp_path):
    code, output = torchrun("hang", words_data, tmp_path)
    assert code != 0 and "in sleepy" in output, output[-5000:]


SLURM = {  # stand-ins for two machines
    "srun": 'shift; for _ in 1 2; do "$@" & jobs="$jobs $!"; done; trap "kill -TERM $jobs" TERM\n'
    "for job in $jobs; do while kill -0 $job 2>/dev/null; do wait $job; code=$?; done; done; "
    "exit $code",
    "scontrol": '[ "$1" = requeue ] && echo "requeued $2" || echo 127.0.0.1',
}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_the_slurm_script_trains_on_two_machines_and_requeues_the_job(words_data, tmp_path):
    for name, script in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_NODELIST": "a,b",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "1",
        "RDZV_PORT": str(free_port()),
    }
    out_dir = tmp_path / "run"
    options = OPTIONS | {"dataset": words_data, "out_dir": out_dir, "save_interval": 1000}
    command = [ROOT / "config" / "cluster" / "slurm.sh", ROOT / "train.py", *flags(**options)]

    def start(log) -> subprocess.Popen:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT)

    with open(tmp_path / "log", "w+") as log:
        job = start(log)
        end = time.monotonic() + MAX_SECONDS
        while "step 100/" not in (tmp_path / "log").read_text() and time.monotonic() < end:
            assert job.poll() is None
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(MAX_SECONDS) == 0
        assert "requeued 7" in (tmp_path / "log").read_text()
        assert steps_saved(out_dir)[-1] >= 100
        assert start(log).wait(MAX_SECONDS) == 0
    reference = undisturbed(words_data, tmp_path / "calm", 2)
    assert same_weights(checkpoint.load_model(out_dir), reference)
