"""The record of a stage, next to its output: what the output depends on, and how it was made.

A record is a JSON object: "inputs" (what two starts of the stage must have in common), "files" (name -> SHA-256 of each
finished output), "starts", "seconds" (of all starts), "versions", "commit", and what else the stage reports.
"""

import json
import re
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType

from grath.common.errors import UserError
from grath.common.files import atomic_write_text, file_hash, read_json
from grath.common.layout import PROJECT

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "lm-eval", "bitsandbytes")
NUMBER = int | float
# What may stand in a report as it is.
VERSION = re.compile(r"[\w./+-]{0,60}")
# What is read again from a record; a stage may add more.
RECORD = {
    "inputs": {"model?": {str: (str, {str: str})}, "data?": {str: str}, "precision?": str | None},
    "files?": {str: str},
    "starts": int,
    "seconds": NUMBER,
    "versions?": {str: (VERSION, NoneType)},
    "commit?": (VERSION, NoneType),
    "warnings?": [str],
    "counts?": {str: int},
    "model?": str,
}
# What is also read from the record of a training.
OF_TRAINING = {"base_model": str, "incoming_adapter": str | None, "settings": dict, "pairs": {"read": int, "kept": int}}


def read_record(path, more=()):
    """Read the record in the file `path`; return None if there is no file.

    Raises:
        UserError: it does not fit `RECORD` and the shapes in `more` (dict).
    """
    if not Path(path).is_file():
        return None
    return read_json(path, "record of this version", RECORD | dict(more))


def write_record(path, record):
    """Write a record (dict) to the file `path`."""
    atomic_write_text(path, json.dumps(record, indent=2) + "\n")


def check_inputs(record, inputs, output, advice):
    """Raise `UserError` if the record of `output` has other inputs (dict, may be nested); name the first difference."""
    was, now = _flat(record["inputs"]), _flat(json.loads(json.dumps(inputs)))
    for name in [*now, *was]:
        if was.get(name) != now.get(name) or (name in was) != (name in now):
            texts = [one if isinstance(one, str) else json.dumps(one) for one in (was.get(name), now.get(name))]
            shown = ", not ".join(text[:12] if len(text) == 64 else text[:100] for text in texts)
            raise UserError(f"{output} was made with {name} {shown}: {advice}")


def check_files(record, folder, advice):
    """Return whether a record names finished outputs, and all are in `folder`; raise `UserError` if one was changed."""
    files = {Path(folder) / name: digest for name, digest in record.get("files", {}).items()}
    for file, digest in files.items():
        if file.is_file() and file_hash(file) != digest:
            raise UserError(f"{file} is not the file that was written: {advice}")
    return bool(files) and all(file.is_file() for file in files)


@contextmanager
def recording(path, inputs, earlier, seen, write=True, began=None, clear=None, **content):
    """Lock an output and write its record at the start of a stage; add the seconds when it ends, however it ends.

    Args:
        path: the record's file.
        inputs: as in `check_inputs`.
        earlier: the record of an interrupted start, or None.
        seen: the record that this start has read, {} if there was none; None if it does not matter.
        write: False in all processes but the first, which lock and write nothing.
        began: what `time.monotonic` was when the stage began; None: now.
        clear: function that removes what was in the place of the output, before the record is written.
        content: what else to record.

    Yields:
        the record (dict). The stage adds "files" when its outputs are complete.

    Raises:
        UserError: another process has the lock, or has written the record since it was read.
    """
    earlier, began = earlier or {}, began or time.monotonic()
    record = {"inputs": inputs, "starts": earlier.get("starts", 0) + 1, "seconds": earlier.get("seconds", 0)}
    record |= {"versions": versions(), "commit": commit(), **content, "warnings": earlier.get("warnings", [])}
    if not write:
        yield record
        return
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"), fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"another process is writing {path.parent}: wait for it, or choose another output") from None
    except (OSError, NotImplementedError) as error:  # a file system without locks
        print(f"warning: no lock on {path.parent} ({error}): do not start this twice", file=sys.stderr)
    try:
        if seen is not None and (read_record(path) or {}) != seen:
            raise UserError(f"another process has just written {path}: run the same command again")
        if clear:
            clear()
        write_record(path, record)
        try:
            yield record
        finally:
            record["seconds"] = round(earlier.get("seconds", 0) + time.monotonic() - began, 1)
            write_record(path, record)
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def add_warnings(record, warnings):
    """Add warnings (list of str) to a record, each once."""
    record["warnings"] = [*dict.fromkeys([*record["warnings"], *warnings])]


def _flat(content, prefix=""):
    found = {}
    for name, value in content.items():
        found |= _flat(value, f"{prefix}{name} ") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def versions():
    """Return the versions of the libraries that a result depends on: dict of str, or None where one is missing."""
    found = dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def commit():
    """Return the commit of the checkout, with "+" appended if files differ from it; None without git."""
    command = ["git", "-C", PROJECT, "describe", "--always", "--exclude=*", "--dirty=+"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
