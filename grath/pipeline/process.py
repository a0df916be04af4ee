"""Processes: run a command so that nothing of it is left when it ends, whatever ends it."""

import contextlib
import os
import signal
import subprocess

from grath.common.errors import UserError
from grath.common.paths import CPU_PRODUCTS, CPU_PRODUCTS_VARIABLE
from grath.common.signals import SIGNALS, SignalReceived, raise_on_signal, set_parent_death_signal

SECONDS_TO_END = 15
RESUME = "run the same command again (without FRESH=1) to resume"


def share_cpu_products(run):
    """Let this process and its children compute matrix products in the way that the run's first stage finds."""
    os.environ[CPU_PRODUCTS_VARIABLE] = str((run / CPU_PRODUCTS).resolve())


def run_command(command, status_file):
    """Run a command (list of str); on a signal, terminate all of its processes.

    Args:
        status_file: where the command leaves its own status, because `accelerate launch` replaces it with 1.

    Returns:
        (status, killed): its exit status, and whether it may have been killed from outside: it was, or its launcher
        reports 1 and the process below has left no status of its own.
    """
    status_file.unlink(missing_ok=True)
    environment = {**os.environ, "GRATH_STATUS_FILE": str(status_file.resolve())}
    try:
        # In a process group of its own, so that Ctrl-C reaches this process only.
        process = subprocess.Popen(command, env=environment, process_group=0, preexec_fn=set_parent_death_signal)
    except FileNotFoundError:
        raise UserError(f"there is no program {command[0]}: run `pip install -e . -c constraints.txt`") from None
    try:
        status = process.wait()
        if status < 0:
            return 128 - status, status == -signal.SIGKILL
        left = status_file.read_text() if status_file.is_file() else ""
        return (int(left or status) if status else 0), (status == 1 and not left) or status == 128 + signal.SIGKILL
    except SignalReceived:
        terminate_tree(process.pid)
        raise
    finally:
        status_file.unlink(missing_ok=True)


def terminate_tree(pid):
    """End a process and its descendants: SIGTERM first, and SIGKILL for what is left after 15 seconds."""
    import psutil

    try:
        parent = psutil.Process(pid)
        processes = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=SECONDS_TO_END)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=SECONDS_TO_END)


def catch_signals():
    """Raise `SignalReceived` for every ending signal that the caller does not ignore (nohup, a background job)."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, raise_on_signal)
