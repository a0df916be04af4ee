"""Locks and signals of a run. `make faults` kills and damages runs."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading

import psutil
import pytest
from fault_injection import ASK, point, start
from support import PROJECT, put_program, script_env, wait_for

# It only makes this process wait.
HELD = point(ASK, "open", r"\.responses\.", signal="SIGCONT")


@contextlib.contextmanager
def held_start(settings, folder):
    """A start that waits in its first stage; yield (process of the loop, its lock file, a list for its result)."""
    found = []
    thread = threading.Thread(target=lambda: found.append(start(settings, folder, HELD)), daemon=True)
    thread.start()
    wait_for(lambda: list(folder.glob("*/data/*.record.json")))
    lock = folder / ".llama2_seed_0.lock"
    yield psutil.Process(int(re.match(r"process (\d+) on ", lock.read_text())[1])), lock, found
    thread.join()


def test_two_starts_at_once_and_then_a_signal_to_every_process(llama_run, tmp_path):
    """As `scancel` sends it: to the loop and to the stage at once."""
    settings = {**llama_run[1], "TASKS": ""}
    with held_start(settings, tmp_path) as (loop, lock, found):
        status, output = start(settings, tmp_path)
        assert status == 2
        said = rf"llama2_seed_0 is locked by process {loop.pid} on \S+ since 20\S+, or by the stage .*: wait for it"
        assert re.search(said, output.splitlines()[-1])
        everything = [loop, *loop.children(recursive=True)]
        assert len(everything) == 2  # the loop and the stage
        for process in everything:
            with contextlib.suppress(psutil.NoSuchProcess):  # the loop's own signal may have ended it
                process.send_signal(signal.SIGTERM)
    assert found[0][0] == 128 + signal.SIGTERM and "Traceback" not in found[0][1]
    assert lock.exists() and not list(tmp_path.rglob("*.tmp"))


def test_a_killed_loop_leaves_one_stage_that_holds_the_lock(llama_run, tmp_path):
    settings = {**llama_run[1], "TASKS": ""}
    with held_start(settings, tmp_path) as (loop, _, found):
        (stage,) = [one for one in loop.children(recursive=True) if ASK in " ".join(one.cmdline())]
        loop.kill()
        wait_for(lambda: loop.status() == psutil.STATUS_ZOMBIE)  # its pipe is still open
        assert stage.is_running()
        status, output = start(settings, tmp_path)
        assert status == 2 and "or by the stage that it started: wait for it" in output
        stage.terminate()
    assert found[0][0] == -signal.SIGKILL
    assert start(settings, tmp_path, HELD | {"signal": "SIGTERM"})[0] == 128 + signal.SIGTERM  # the lock is free


def waiting_loop(folder, ask, **env):
    """Arguments of `Popen` for a loop whose first stage runs the lines of bash `ask` and waits for the file `go`."""
    python = folder / "bin" / "python"  # the loop asks it for the settings, and then starts it for the pairs
    asked = f'if [[ $* == *settings* ]]; then exec {sys.executable} "$@"; fi'
    wait = f"touch '{folder}/started'; until [[ -e '{folder}/go' ]]; do sleep 0.1; done"
    put_program(python, f"#!/bin/bash\n{asked}\n{ask}\n{wait}\n")
    put_program(python.with_name("scontrol"), f'#!/bin/sh\necho "$@" >>"{folder}/requeued"\n')
    (python.parent / "accelerate").symlink_to(python)
    env |= {"PATH": f"{python.parent}:{os.environ['PATH']}", "TASKS": ""}
    env |= {"MODEL_NAME_OR_PATH": "m", "NUM_QUERY": "1", "RUNS_DIR": str(folder), "ITERATIONS": "1"}
    return {
        "env": script_env(env), "cwd": PROJECT, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE,
        "text": True, "preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    }  # fmt: skip


@pytest.mark.parametrize(("number", "ignored"), [("HUP", True), ("INT", True), ("HUP", False)])
def test_a_signal_that_the_shell_ignores_ends_nothing(number, ignored, tmp_path):
    """nohup ignores SIGHUP, and a shell ignores SIGINT for what it starts in the background."""
    trap = f"trap '' {number}; " if ignored else f"trap - {number}; "
    start = ["bash", "-c", f'{trap}exec "$0"', "./run_grath.sh"]
    with subprocess.Popen(start, **waiting_loop(tmp_path, "")) as process:
        wait_for((tmp_path / "started").exists, process)
        process.send_signal(signal.Signals[f"SIG{number}"])
        if ignored:
            (tmp_path / "go").touch()
        assert process.wait(timeout=600) == (0 if ignored else 128 + signal.Signals[f"SIG{number}"])


@pytest.mark.parametrize(
    ("file", "requeued"),
    [
        ("data/.iter0.json.responses.1.0", True),
        ("models/iter_1/checkpoint-2/trainer_state.json", True),
        ("models/iter_1/grath.json", False),
        ("data/iter0.json.record.json", False),
    ],
)
def test_a_job_is_requeued_only_if_its_start_has_saved_something(file, requeued, tmp_path):
    """Whatever was saved before. Slurm sends SIGUSR1 before the time limit."""
    run = tmp_path / "grath_seed_0"
    for old in ("data/.iter0.json.responses", "models/iter_0/checkpoint-1/trainer_state.json"):
        (run / old).parent.mkdir(parents=True)
        (run / old).write_text("[0, 1]\n")
    save = f"mkdir -p '{(run / file).parent}'; echo '[1, 2]' >'{run / file}'"
    slurm = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "1"}
    with subprocess.Popen(["./run_grath.sh"], **waiting_loop(tmp_path, save, **slurm)) as process:
        wait_for((tmp_path / "started").exists, process)
        process.send_signal(signal.SIGUSR1)
        said = process.communicate(timeout=600)[1]
    assert process.returncode == 128 + signal.SIGUSR1
    assert (tmp_path / "requeued").exists() == requeued
    assert ("the job is requeued and resumes" in said) == requeued != ("this start saved nothing" in said)
