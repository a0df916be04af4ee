"""The process above the shell's loop: check the settings, lock the run's folder, end all stages on a signal."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime

from grath.common.errors import UserError
from grath.common.signals import SignalReceived, set_parent_death_signal
from grath.pipeline.process import RESUME, SECONDS_TO_END, catch_signals, terminate_tree
from grath.pipeline.settings import question_inputs, read_settings, run_folder

SECONDS_TO_LOCK = 3


def run_loop(script):
    """Run the shell script of the loop under a lock on the run's folder. Return its exit status."""
    if re.match("[1-9]", os.environ.get("SLURM_RESTART_COUNT", "")):
        os.environ["FRESH"] = "0"  # a requeued job resumes what it has made
    values = read_settings()
    run = run_folder(values)
    print(f"GRATH: {values['ITERATIONS']} iteration(s) in {run}")
    for name, value in values.items():
        print(f"  {name}={value}", flush=True)
    catch_signals()
    with contextlib.ExitStack() as stack:
        if values["DRY_RUN"] == "0":
            question_inputs(values)
            if values["CHECK"] == "0":
                stack.enter_context(lock(run))
        os.environ["GRATH_LOOP"] = str(os.getpid())  # `preexec_fn` reads it too
        process = subprocess.Popen(["bash", script], process_group=0, preexec_fn=set_parent_death_signal)
        try:
            status = process.wait()
        except SignalReceived as received:
            return _end(process, received.number)
    return 128 - status if status < 0 else status


def _end(process, number):
    """End the stage at work, requeue the Slurm job on SIGUSR1, and say how to resume. Return the exit status."""
    import psutil

    # Only the stages: each records how it ended, and then bash ends, which waits for them.
    told, deadline = set(), time.monotonic() + 2 * SECONDS_TO_END
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            for stage in set(psutil.Process(process.pid).children()) - told:
                stage.terminate()
                told.add(stage)
        time.sleep(0.05)
    terminate_tree(process.pid)
    if number == signal.SIGUSR1 and os.environ.get("SLURM_JOB_ID"):
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False)
    name = signal.Signals(number).name
    print(f"run_grath.sh: ended by {name}; {RESUME}", file=sys.stderr)
    return 128 + number


@contextlib.contextmanager
def lock(run):
    """Hold the lock of a run's folder. The system releases it when this process ends, however it ends.

    Raises:
        UserError: another process holds it, or the folder of the runs cannot be written to.
    """
    from filelock import FileLock, Timeout

    path = run.parent / f".{run.name}.lock"
    # Without the fallback, a file system without locks raises an error.
    held = FileLock(path, fallback_to_soft=False)
    try:
        run.parent.mkdir(parents=True, exist_ok=True)
        # The processes of a start that was just killed may still be ending.
        held.acquire(timeout=SECONDS_TO_LOCK)
    except Timeout:
        holder = path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
        raise UserError(f"{run} is locked by {holder}: wait for it, or set another RUN_NAME") from None
    except OSError as error:
        if not os.access(run.parent, os.W_OK):
            raise UserError(
                f"cannot write to {run.parent} ({error.strerror}): set RUNS_DIR to a folder that can be written to"
            ) from None
        print(f"warning: no locks on this file system ({error.strerror}): do not start a run twice", file=sys.stderr)
        yield
        return
    try:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        path.write_text(f"process {os.getpid()} on {socket.gethostname()} since {since}\n", encoding="utf-8")
        yield
    finally:
        held.release()
