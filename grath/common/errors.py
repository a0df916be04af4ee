"""Errors of the command line: bad input is one line and status 2, a failing machine one line and status 1."""

import ctypes
import errno
import io
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from contextlib import suppress
from pathlib import Path

from grath.common.signals import SignalReceived, raise_on_signal

BAD_INPUT = 2


class UserError(Exception):
    """Bad input. The message is the one line that the user sees: what is wrong and what to do."""


def run_main(main):
    """Run a script's `main` and exit with its status.

    Bad input prints one line on standard error and exits with status 2. A system error (disk, rights, memory, GPU)
    prints one line and exits with status 1. A signal exits with 128 + its number. Any other error keeps its traceback;
    `GRATH_DEBUG=1` prints the traceback of every error.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # of the libraries; those of downloads stay
    # Libraries warn about each other's code, which a user cannot change.
    warnings.filterwarnings("ignore", category=FutureWarning)
    # bitsandbytes warns at every forward pass of an int8 layer.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.setLogRecordFactory(_escaped_record)
    name = program_name()
    # Linux kills this process when the launcher of several processes dies: it cannot end them if it is killed.
    if "LOCAL_RANK" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may not have every character
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, raise_on_signal)
    # The harness's pools end their processes by SIGTERM.
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    try:
        status = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:  # of `| head`; the interpreter writes the rest at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        status = 128 + signal.SIGINT
    except SignalReceived as ended:
        (number,) = ended.args
        print(f"{name}: ended by {signal.Signals(number).name}", file=sys.stderr)
        status = 128 + number
    except Exception as error:
        line = " ".join(str(error).split()) if isinstance(error, UserError) else explain_system_error(error)
        bad_input = isinstance(error, UserError) or getattr(error, "errno", None) in OF_NAMES
        if line is None:
            raise
        if os.environ.get("GRATH_DEBUG") == "1":
            traceback.print_exception(error)
        print(f"{name}: error: {printable(line[:1500])}", file=sys.stderr)
        status = BAD_INPUT if bad_input else 1
    torch = sys.modules.get("torch")
    # Left to the interpreter's exit, torch's process group sometimes aborts. After another error, NCCL could wait here.
    if status in (0, BAD_INPUT) and torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(status)


def printable(text):
    """Return text from outside with its control characters escaped; line breaks are kept."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def _escaped_record(*args, **options):
    """Make a log record; the libraries' warnings quote the files that they read."""
    record = logging.LogRecord(*args, **options)
    with suppress(Exception):  # a wrong call of a library, which its handler reports
        record.msg, record.args = printable(record.getMessage()), ()
    return record


def program_name():
    """Return the name of the running program as its messages show it: `dpo.py`, `grath.report`."""
    path = Path(sys.argv[0])
    return f"grath.{path.parent.name}" if path.name == "__main__.py" else path.name


# Advice for each kind of system error.
MEMORY = (
    "the memory is full: use a smaller --batch_size (--per_device_train_batch_size); in the loop PAIRS_BATCH_SIZE, "
    "DPO_BATCH_SIZE or EVAL_BATCH_SIZE, which you can change during a run"
)
DISK = "no space is left on the disk: free some and run the same command again; finished work is kept"
GPU = "the GPU cannot be used: check nvidia-smi, CUDA_VISIBLE_DEVICES and the number of processes"
PACKAGE = "pip install -e . -c constraints.txt"
BY_ERRNO = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), DISK),
    errno.EFBIG: "the file exceeds the size limit: raise it (ulimit -f)",
    errno.ENAMETOOLONG: "choose a shorter name",
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR), "a file and a folder have the same name: remove one of them"),
    errno.EROFS: "the file system is read-only: choose another output folder",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "permission denied: choose another folder"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "too many files are open: raise the limit (ulimit -n 4096)"),
    errno.ENOMEM: MEMORY,
    errno.ETIMEDOUT: "start the server, and run the same command again: it asks only what is left",
}
# Errors of the names that a user gave.
OF_NAMES = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR)
# CUDA error codes about memory, and about the driver or devices.
BY_CUDA_ERROR = {2: MEMORY, **dict.fromkeys((3, 35, 46, 100, 101, 803, 804), GPU)}
# System errors that torch raises as a plain RuntimeError, by their text.
BY_TEXT = {
    **dict.fromkeys(("PytorchStreamWriter", "inline_container", "iostream error"), DISK),
    **dict.fromkeys(("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"), MEMORY),
    **dict.fromkeys(("No CUDA GPUs are available", "NVIDIA driver"), GPU),
}


def explain_system_error(error):
    """Describe a system error in one line: what is wrong and what to do. Return None for any other error.

    Its class and number decide, or those of an explicit cause of it (`raise ... from`).
    """
    while error is not None:
        if advice := _advice(error):
            return f"{f'{type(error).__name__}: {error}'.splitlines()[0][:200]}: {advice}"
        error = error.__cause__
    return None


def _advice(error):
    if isinstance(error, MemoryError):
        return MEMORY
    if isinstance(error, ModuleNotFoundError):
        return None if (error.name or "grath").partition(".")[0] == "grath" else PACKAGE
    if isinstance(error, OSError) and error.errno is not None:
        return BY_ERRNO.get(error.errno)
    # Libraries written in Rust (safetensors, tokenizers) put the error number into the text.
    if number := re.search(r"\(os error (\d+)\)", str(error)):
        return BY_ERRNO.get(int(number[1]))
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return None
    if isinstance(error, torch.OutOfMemoryError):
        return MEMORY
    if isinstance(error, torch.AcceleratorError):
        return BY_CUDA_ERROR.get(getattr(error, "error_code", None))
    return next((advice for sign, advice in BY_TEXT.items() if sign in str(error)), None)


def first_line(error):
    """Return the first line of an error's message, and the second if the first ends with a colon."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
