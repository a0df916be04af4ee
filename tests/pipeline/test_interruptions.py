"""A run that is killed, locked, or cannot be written: one case of each kind; `make faults` has them all."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from fault_injection import (
    ASK,
    ITERATION_1,
    WITHOUT_SCORES,
    copy_without,
    hit_and_restart,
    point,
    start,
)
from support import call, weights

# Between stages and inside one, for `make test`.
FEW = ["after the pair file", "the first checkpoint"]


@pytest.mark.slow
def test_two_kills(llama_run, tmp_path):
    undisturbed, settings, _ = llama_run
    settings = {**settings, **WITHOUT_SCORES, "ITERATIONS": "1"}
    run = hit_and_restart({name: ITERATION_1[name] for name in FEW}, settings, tmp_path)
    pairs = next((run / "data").iterdir())
    assert pairs.read_bytes() == (undisturbed / "data" / pairs.name).read_bytes()
    for folder in (run / "models").iterdir():
        ours, theirs = weights(folder), weights(undisturbed / "models" / folder.name)
        assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-6


def test_two_starts_at_once(llama_run, tmp_path):
    _, settings, _ = llama_run
    settings = {**settings, **WITHOUT_SCORES}
    held = point(ASK, "open", r"\.responses\.0$", signal="SIGCONT")  # which only makes this process wait for a minute
    found = []
    first = threading.Thread(target=lambda: found.append(start(settings, tmp_path, held)))
    first.start()
    lock = tmp_path / ".llama2_seed_0.lock"
    deadline = time.monotonic() + 600
    while not (tmp_path / "llama2_seed_0" / "manifest.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    holder = int(re.match(r"process (\d+) on ", lock.read_text())[1])
    status, output = start(settings, tmp_path)
    assert status == 2
    last = output.splitlines()[-1]
    assert re.search(rf"llama2_seed_0 is locked by process {holder} on \S+ since 20\S+: wait for it, or", last)
    os.kill(holder, signal.SIGTERM)
    first.join()
    assert found[0][0] == 128 + signal.SIGTERM
    assert lock.exists() and not list(tmp_path.rglob("*.tmp"))


def test_a_lock_whose_owner_is_dead_is_taken_over(llama_run, tmp_path):
    undisturbed, settings, _ = llama_run
    copy_without(undisturbed, tmp_path)
    lock = tmp_path / ".llama2_seed_0.lock"
    lock.write_text("process 1 on elsewhere since 2020-01-01\n")
    hold = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, 2); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        status, output = start(settings, tmp_path)
        assert status == 2 and "is locked by process 1 on elsewhere since 2020-01-01: wait for it" in output
        holder.kill()
    status, output = start(settings, tmp_path)
    assert status == 0, output
    assert "elsewhere" not in lock.read_text()


@pytest.mark.parametrize("place", ["/proc/runs", "FILE/runs"])
def test_a_folder_that_cannot_be_written(place, tiny_llama, tmp_path):
    (tmp_path / "file").write_text("")
    env = {"MODEL_NAME_OR_PATH": str(tiny_llama), "RUNS_DIR": place.replace("FILE", str(tmp_path / "file"))}
    done = call("run_llama2.sh", env=env, status=2)
    assert "set RUNS_DIR to a folder that can be written to" in done.stderr
    assert done.stderr.count("\n") == 1


def name_of(process):
    """The program and the script of a process; empty if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline()[:2])
    return ""


def test_a_signal_to_every_process_is_recorded(llama_run, tmp_path):
    """As `scancel` sends it: to the loop, to bash and to the stage at once."""
    settings = {**llama_run[1], **WITHOUT_SCORES}
    held = point(ASK, "open", r"\.responses\.0$", signal="SIGCONT")
    found = []
    loop = threading.Thread(target=lambda: found.append(start(settings, tmp_path, held)))
    loop.start()
    manifest, lock = tmp_path / "llama2_seed_0" / "manifest.json", tmp_path / ".llama2_seed_0.lock"
    everything, deadline = [], time.monotonic() + 600
    while not any(ASK in name for name in map(name_of, everything)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        if manifest.exists():
            holder = psutil.Process(int(re.match(r"process (\d+) on ", lock.read_text())[1]))
            everything = [holder, *holder.children(recursive=True)]
    assert len(everything) == 4  # the loop, bash, the stage and its command
    for process in everything:
        with contextlib.suppress(psutil.NoSuchProcess):  # the loop's own signal may have ended it
            process.send_signal(signal.SIGTERM)
    loop.join()
    assert found[0][0] == 128 + signal.SIGTERM
    (entry,) = json.loads(manifest.read_text())["stages"]
    assert entry["outcome"] == "ended by SIGTERM"


def test_an_inherited_loop_is_not_taken_for_the_own_one():
    done = call("run_llama2.sh", env={"DRY_RUN": "1", "GRATH_LOOP": "1"})
    assert done.stdout.startswith("GRATH: 2 iteration(s) in runs/llama2_seed_0\n")
