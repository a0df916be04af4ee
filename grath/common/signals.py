"""Signals that end a program, raised as an exception."""

import signal

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class SignalReceived(BaseException):
    """A signal that ends the program, raised with its number so that `finally` blocks run."""


def raise_on_signal(number, frame):
    """Signal handler: raise `SignalReceived` for the first signal and ignore every later one."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise SignalReceived(number)
