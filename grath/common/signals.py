"""Signals that end a program, raised as an exception, and processes that end with their launcher."""

import ctypes
import os
import signal
import sys

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class SignalReceived(BaseException):
    """A signal that ends the program, raised with its number so that `finally` blocks run."""


def raise_on_signal(number, frame):
    """Signal handler: raise `SignalReceived` for the first signal and ignore every later one."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise SignalReceived(number)


def end_with_launcher():
    """Let Linux kill this process when the launcher of several processes dies: it cannot end them if it is killed."""
    if "LOCAL_RANK" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
