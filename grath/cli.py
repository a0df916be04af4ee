"""What every command line of the project shares: one-line errors, parsers, files that appear whole."""

import argparse
import ctypes
import errno
import json
import logging
import os
import re
import signal
import sys
import tempfile
import traceback
import warnings
from contextlib import suppress
from pathlib import Path

BAD_INPUT = 2
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PROJECT = Path(__file__).resolve().parent.parent
# The paper's values that more than one stage needs.
PAPERS_BATCH = 16
LORA_R, LORA_ALPHA, LORA_DROPOUT = 8, 16, 0.05
LONGEST_LINE = 1_000_000
# What each number may be at least and at most.
RANGES = {
    "num_sample": (1, 1e9),
    "lora_r": (1, 4096),
    "lora_alpha": (1, 1e6),
    "lora_dropout": (0, 0.99),
    "learning_rate": (1e-12, 10),
    "beta": (1e-6, 1e3),
    "seed": (0, 2**32 - 1),
    "max_steps": (-1, 1e9),
    "num_train_epochs": (1e-6, 1e6),
    "warmup_steps": (0, 1e9),
    "per_device_train_batch_size": (1, 1e6),
    "gradient_accumulation_steps": (1, 1e6),
    "max_length": (2, 1e7),
    "save_steps": (1e-6, 1e9),
    "logging_steps": (1e-6, 1e9),
}
# A folder in the hub's layout that holds every model and data set by its hub name; then nothing is asked of the hub.
ROOT = os.environ.get("DATASETS_ROOT")
if ROOT:
    os.environ["HF_HUB_OFFLINE"] = "1"
# DEVICE=cpu: compute on the CPU, whatever else is there. It must be said before torch looks for GPUs.
if os.environ.get("DEVICE") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["ACCELERATE_USE_CPU"] = "true"


class UserError(Exception):
    """Bad input. Its text is the one line that the user sees: what is wrong and what to do."""


class Ended(BaseException):
    """A signal that ends the program, raised so that what is half done is cleared away."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults that say something, and keeps the line breaks of a module's docstring."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class OneLineErrors:
    """Mixin for `argparse.ArgumentParser`: a wrong flag is a `UserError`, not a usage text."""

    def error(self, message):
        raise UserError(f"{message} (see --help)")


class Parser(OneLineErrors, argparse.ArgumentParser):
    """The data scripts' parser: exact flag names only, the module's docstring as description."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def parse_with_rest(self):
        """The arguments before the first `--`, and as `rest` the list of those behind it, as they are.

        argparse itself would take the first of two groups of positional arguments for both.
        """
        at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
        return self.parse_args(sys.argv[1:at], argparse.Namespace(rest=sys.argv[at + 1 :]))


def positive_int(text):
    """An integer of at least 1, for `argparse`."""
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def check_ranges(values):
    """Raise `UserError` if one of the numbers in the dict `values` is out of its range. None is left to the library."""
    for name, (least, most) in RANGES.items():
        value = values.get(name)
        if value is not None and not least <= value <= most:
            raise UserError(f"--{name} must be from {least:.10g} to {most:.10g}, not {value}")


def papers_accumulation(batch, processes):
    """Forward passes of `batch` pairs on each of the processes that make the paper's 16 pairs, or the next below it."""
    return max(1, PAPERS_BATCH // (batch * processes))


def run(main):
    """Run a script's `main` and exit with its status.

    Bad input ends with one line on standard error and status 2, trouble with the machine (disk, rights, memory, GPU)
    with one line and status 1, a signal with 128 + its number. `accelerate launch` turns every child's failure into its
    own status 1, so the status also goes to the file that `GRATH_STATUS_FILE` names. Any other error keeps its
    traceback; `GRATH_DEBUG=1` prints that of the others, too.
    """
    # Libraries' warnings about each other's code: a user can do nothing about them.
    warnings.filterwarnings("ignore", category=FutureWarning)
    # These two warn at every product of an int8 layer.
    for logger in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    name = Path(sys.argv[0]).name
    die_with_loop()
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, end)
    try:
        status = main() or 0
    except UserError as error:
        _debug(error)
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        status = BAD_INPUT
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        status = 128 + signal.SIGINT
    except Ended as ended:
        print(f"{name}: ended by {signal.Signals(ended.number).name}", file=sys.stderr)
        status = 128 + ended.number
    except Exception as error:
        line = explain_system_error(error)
        if line is None:
            raise
        _debug(error)
        print(f"{name}: error: {line}", file=sys.stderr)
        status = 1
    if status and os.environ.get("GRATH_STATUS_FILE"):
        with suppress(OSError):  # on a full disk the status is accelerate's 1
            Path(os.environ["GRATH_STATUS_FILE"]).write_text(f"{status}\n", encoding="utf-8")
    if status in (0, BAD_INPUT):  # of the others a GPU's process group could wait for its peers
        _leave_process_group()
    sys.exit(status)


def _leave_process_group():
    """End torch's process group. One that is left to the interpreter's exit aborts there, now and then (SIGABRT)."""
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _debug(error):
    if os.environ.get("GRATH_DEBUG") == "1":
        traceback.print_exception(error)


def end(number, frame):
    """A handler that turns the first signal into `Ended`; a second one must not stop the first one's work."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise Ended(number)


def die_with_loop():
    """Below the loop (`GRATH_LOOP` is its process) end with it, however it ends: a killed loop leaves nothing running.

    Every process below it asks the system (Linux) to be killed when its parent dies.
    """
    loop = os.environ.get("GRATH_LOOP")
    if not loop or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    try:
        os.kill(int(loop), 0)
    except ProcessLookupError:  # it died before the line above
        os._exit(128 + signal.SIGKILL)


# What can be done about an error of the machine.
MEMORY = (
    "the memory is full: take a smaller --batch_size (--per_device_train_batch_size); in the loop PAIRS_BATCH_SIZE, "
    "DPO_BATCH_SIZE, EVAL_BATCH_SIZE, which can change in the middle of a run"
)
DISK = "no space is left on the disk: free some and start the same command again; what was finished is kept"
RIGHTS = "no right to read or write it: choose another folder"
FILES = "too many files are open: raise the limit (ulimit -n 4096)"
GPU = "the GPU cannot be used: look at nvidia-smi, CUDA_VISIBLE_DEVICES and the number of processes"
PACKAGE = "pip install -r requirements.txt -c constraints.txt"
BY_ERRNO = {
    errno.ENOSPC: DISK,
    errno.EDQUOT: DISK,
    errno.EFBIG: "a file may not grow that large here: raise the limit (ulimit -f)",
    errno.EROFS: "the file system is read-only: choose another output folder",
    errno.EACCES: RIGHTS,
    errno.EPERM: RIGHTS,
    errno.EMFILE: FILES,
    errno.ENFILE: FILES,
    errno.ENOMEM: MEMORY,
}
# Of CUDA's own error numbers those that are about memory, or about driver and devices.
BY_CUDA_ERROR = {2: MEMORY, **dict.fromkeys((3, 35, 46, 100, 101, 803, 804), GPU)}
# What torch raises as a plain RuntimeError: by its text.
BY_TEXT = {
    "PytorchStreamWriter": DISK,
    "inline_container": DISK,
    "iostream error": DISK,
    "can't allocate memory": MEMORY,
    "No CUDA GPUs are available": GPU,
    "NVIDIA driver": GPU,
}


def explain_system_error(error):
    """One line on an error that the machine is to blame for, what is wrong and what to do; None for any other.

    It is told by the error itself, its class or its number, and by what a library has explicitly raised it from; not by
    what was being handled when it was raised.
    """
    while error is not None:
        advice = _advice(error)
        if advice:
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
    # Libraries written in Rust (safetensors, tokenizers) keep the system's number in the text.
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
    """What an error says first: its first line, and the next where that only announces it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


def in_root(name):
    """The folder of a hub name below `DATASETS_ROOT`, or the name itself where there is none."""
    if not ROOT or Path(name).expanduser().exists():
        return name
    folder = Path(ROOT).resolve() / name
    return str(folder) if folder.is_dir() else name


def read_json(path, what):
    """The JSON object, a dict, in a file.

    Raises:
        UserError: it holds none; `what` says what it should be.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged, or no {what}")
    return content


def write_whole(path, text):
    """Write `text` (UTF-8) to `path` so that the name never shows a part of it: temporary file, then rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_writable(folder):
    """Raise `UserError` unless files can be made in `folder`, or in the nearest of its parents that exists."""
    folder = Path(folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{existing} is a file, not a folder: choose another output folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {existing}: choose another output folder or change its rights")


def read_json_lines(path, what):
    """The objects of a JSON-lines file as a list of dicts. A BOM and Windows' line ends are taken as they come.

    Args:
        path: the file.
        what: the file's role, for the error message.

    Raises:
        UserError: the file is missing, no UTF-8 text, empty, or a line is too long, no JSON object or no sound text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{what} {path} is a folder, not a file") from None
    except UnicodeDecodeError:
        raise UserError(f"{what} {path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}") from None
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{what} {path}, line {number}"
        if len(line) > LONGEST_LINE:
            raise UserError(f"{where}: {len(line)} characters, where {LONGEST_LINE} are the most: it is no such file")
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({getattr(error, 'msg', 'too deep')})") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: not a JSON object")
        if any("\0" in text or any("\ud800" <= c <= "\udfff" for c in text) for text in _strings(row)):
            raise UserError(f"{where}: holds a NUL or half a character (a surrogate)")
        rows.append(row)
    if not rows:
        raise UserError(f"{what} {path} is empty")
    return rows


def _strings(value):
    """All strings in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
