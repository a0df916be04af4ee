"""The record of a stage, next to its output: what the output depends on, and how it was made.

A record is a JSON object: "inputs" (what two starts of the stage must have in common), "files" (name -> SHA-256 of each
finished output), "starts", "seconds" (of all starts), "versions", "commit", and what else the stage reports.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from grath.common.errors import UserError
from grath.common.files import atomic_write_text, file_hash, read_json
from grath.common.layout import PROJECT

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "lm-eval", "bitsandbytes")
NUMBER = int | float
# What is read again from a record; a stage may add more.
RECORD = {
    "inputs": {"model?": {str: (str, {str: str})}, "data?": {str: str}, "precision?": str | None},
    "files?": {str: str},
    "starts": int,
    "seconds": NUMBER,
    "versions?": {str: str | None},
    "commit?": str | None,
    "warnings?": [str],
    "counts?": {str: int},
    "model?": str,
}
# What is also read from the record of a training.
OF_TRAINING = {"base_model": str, "incoming_adapter": str | None, "settings": dict, "pairs": {str: int}}


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
            shown = ", not ".join(_shown(one.get(name)) for one in (was, now))
            raise UserError(f"{output} was made with {name} {shown}: {advice}")


def check_files(record, folder, advice):
    """Return whether a record names finished outputs, and all are in `folder`; raise `UserError` if one was changed."""
    files = {Path(folder) / name: digest for name, digest in record.get("files", {}).items()}
    for file, digest in files.items():
        if file.is_file() and file_hash(file) != digest:
            raise UserError(f"{file} is not the file that was written: {advice}")
    return bool(files) and all(file.is_file() for file in files)


@contextmanager
def locked(path, seen, write=True):
    """Hold the lock of the output whose record is the file `path`.

    Args:
        seen: the record that this start has read, {} if there was none; None if it does not matter.
        write: False in all processes but the first, which lock nothing.

    Raises:
        UserError: another process has the lock, or has written the record since it was read.
    """
    if not write:
        yield
        return
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    lock, other = path.with_name(f".{path.name}.lock"), f"another process is writing {path.parent}"
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{other}: wait for it, or choose another output") from None
        except OSError:
            print("warning: no locks on this file system: do not start this twice", file=sys.stderr)
        # The other process removes the file when it ends.
        if not lock.exists() or lock.stat().st_ino != os.fstat(file.fileno()).st_ino:
            raise UserError(f"{other}: run the same command again")
        try:
            if seen is not None and (read_record(path) or {}) != seen:
                raise UserError(f"another process has just written {path}: run the same command again")
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def recording(path, inputs, earlier=None, write=True, began=None, **content):
    """Write the record of a stage at its start, and add the seconds of this start when it ends, however it ends.

    Args:
        inputs: as in `check_inputs`.
        earlier: the record of an interrupted start, or None.
        write: False in all processes but the first.
        began: what `time.monotonic` was when the stage began; None: now.
        content: what else to record.

    Yields:
        the record (dict). The stage adds "files" when its outputs are complete.
    """
    earlier, began = earlier or {}, began or time.monotonic()
    record = {"inputs": inputs, "starts": earlier.get("starts", 0) + 1, "seconds": earlier.get("seconds", 0)}
    record |= {"versions": versions(), "commit": commit(), **content}
    if write:
        write_record(path, record)
    try:
        yield record
    finally:
        record["seconds"] = round(earlier.get("seconds", 0) + time.monotonic() - began, 1)
        if write:
            write_record(path, record)


def _flat(content, prefix=""):
    found = {}
    for name, value in content.items():
        nested = isinstance(value, dict)
        found |= _flat(value, f"{prefix}{name} ") if nested else {f"{prefix}{name}": value}
    return found


def _shown(value):
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] if len(text) == 64 else text[:100]


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
