"""Signals that end a program, raised as an exception, and processes that die with the loop."""

import ctypes
import os
import signal
import sys

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class SignalReceived(BaseException):
    """A signal that ends the program, raised so that `finally` blocks run."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number


def raise_on_signal(number, frame):
    """Signal handler: raise `SignalReceived` for the first signal and ignore every later one."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise SignalReceived(number)


def set_parent_death_signal():
    """Let Linux kill this process when its parent dies, if it runs under the loop (`GRATH_LOOP`, a process id).

    Every process under the loop calls this, so a killed loop leaves nothing running.
    """
    loop = os.environ.get("GRATH_LOOP")
    if not loop or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    try:
        os.kill(int(loop), 0)
    except ProcessLookupError:  # the loop died before the call above
        os._exit(128 + signal.SIGKILL)
