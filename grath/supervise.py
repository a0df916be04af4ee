"""Runs the stages of `run_grath.sh` by the run's manifest: each once, whole, and all of its processes or none.

    python -m grath.supervise begin RUN [--fresh] [--check] [--lock_fd 9] [--input FILE ...] -- NAME=VALUE ...
    python -m grath.supervise stage RUN --title TITLE --round N --stage NAME --output FILE ... -- COMMAND ...
    python -m grath.supervise lock RUN --lock_fd 9

The first takes the run's folder for these settings, the last only locks it. The second runs the command unless the
manifest records that its outputs were made from these inputs and are as they were; it ends with the command's status.
"""

import contextlib
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from grath import manifest as manifests
from grath.chat import MODEL_TYPES
from grath.cli import (
    PROJECT,
    RANGES,
    SIGNALS,
    Ended,
    Parser,
    UserError,
    check_ranges,
    check_writable,
    die_with_loop,
    end,
    papers_accumulation,
    run,
)
from grath.devices import check_devices, machine
from grath.models import DTYPES, PRECISIONS, resolve_precision
from grath.scores import local_sets

BATCH = {"DPO_BATCH_SIZE", "NUM_PROCESSES", "GRADIENT_ACCUMULATION_STEPS"}
PRECISION_OF = {"PAIRS_PRECISION": "pairs", "DPO_PRECISION": "dpo", "EVAL_PRECISION": "scores"}
SECONDS_TO_END = 15
AGAIN = "start the same command again (without FRESH=1) to go on from here"


def begin(args):
    """Take the folder of a run: lock it, move an old run aside if asked, compare the settings, remove cut-off files."""
    folder = args.run
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder: set RUNS_DIR or RUN_NAME")
    check_writable(folder)
    settings = dict(setting.split("=", 1) for setting in args.rest)
    check_values(settings)
    check_devices(int(settings.get("NUM_PROCESSES", "1")))
    settings = settle(settings)
    precisions = [f"{name}={settings[name]}" for name in PRECISION_OF if name in settings]
    print(f"  {', '.join(precisions)} on {machine()}", flush=True)
    if args.lock_fd is not None:
        lock(args.lock_fd, folder)
    if args.fresh and folder.exists():
        aside = next(path for n in range(1, 10**6) if not (path := folder.with_name(f"{folder.name}.old-{n}")).exists())
        folder.rename(aside)
        print(f"FRESH=1: the run that was in {folder} is in {aside} now")
    if args.check and manifests.read(folder) is None:
        return
    # Read before anything is made: a refused start touches nothing.
    manifest = manifests.begin(folder, settings, args.input, args.data)
    if args.check:
        return
    folder.mkdir(parents=True, exist_ok=True)
    manifests.sweep(folder)
    # All at once, for the report reads what later rounds have left.
    for entry in manifest["stages"]:
        drop_damaged(folder, entry, entry["outputs"])
    manifests.write(folder, manifest)


def check_values(settings):
    """Raise `UserError` for what a later stage would refuse after hours."""
    choices = {"MODEL_TYPE": MODEL_TYPES, "BACKEND": ("hf", "hf-shared"), "EVAL_PRECISION": ("auto", *DTYPES)}
    choices |= dict.fromkeys(("PAIRS_PRECISION", "DPO_PRECISION"), PRECISIONS)
    for name, possible in choices.items():
        if name in settings and settings[name] not in possible:
            raise UserError(f"{name} must be one of {', '.join(possible)}, not '{settings[name]}'")
    for name in {"LEARNING_RATE", "BETA", "MAX_LENGTH"} & settings.keys():
        try:
            check_ranges({name.lower(): float(settings[name])})
        except (ValueError, UserError):
            least, most = RANGES[name.lower()]
            raise UserError(f"{name} must be from {least:g} to {most:g}, not '{settings[name]}'") from None


def settle(settings):
    """The settings as they are compared.

    `auto` is what it means on this machine, and places in the project are given without it. Of batch, accumulation and
    GPUs only the pairs of a step matter, so a run can go on with other ones that make as many.
    """
    settled = {name: value for name, value in settings.items() if name not in BATCH}
    if settings.keys() >= BATCH:
        batch, processes = int(settings["DPO_BATCH_SIZE"]), int(settings["NUM_PROCESSES"])
        accumulation = int(settings["GRADIENT_ACCUMULATION_STEPS"] or papers_accumulation(batch, processes))
        settled["EFFECTIVE_BATCH"] = str(batch * processes * accumulation)
    for name, stage in PRECISION_OF.items():
        if settings.get(name) == "auto":
            settled[name] = resolve_precision("auto", stage)
    for name in ("MODEL_NAME_OR_PATH", "DATA_PATH", "DEMOS"):
        path = Path(settings.get(name) or "")
        if path.is_absolute() and path.is_relative_to(PROJECT):
            settled[name] = path.relative_to(PROJECT).as_posix()
    return settled


def lock(descriptor, folder):
    """Lock the open file `descriptor`, which the loop holds as long as it lives, or say who holds it.

    The system gives the lock up when the last process that has the file open ends, however it ends.
    """
    for attempt in range(20):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            # The processes of a start that has just been killed may still be on their way out.
            if attempt < 19:
                time.sleep(0.1)
        except OSError as error:
            print(f"warning: no locks here ({error.strerror}): do not start a run twice", file=sys.stderr)
            return
    else:
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
        raise UserError(f"{folder} is in use by {holder or 'another start'}: wait for it, or set another RUN_NAME")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getppid()} on {socket.gethostname()} since {now()}\n".encode(), 0)


def now():
    return datetime.now(UTC).isoformat(timespec="seconds")


def stage(args):
    """Run one stage, or find that it need not be run. Returns its exit status."""
    folder, title, command = args.run, args.title, args.rest
    for number in SIGNALS:
        # The shell lets its background processes ignore SIGINT; what the user has made the run ignore (nohup) stays so.
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)
    manifest = manifests.read(folder)
    if manifest is None:
        raise UserError(f"{folder / manifests.NAME} has gone since this start began: {AGAIN}")
    outputs = [manifests.inside(folder, path) for path in args.output]
    inputs = manifests.hashes(folder, args.input, manifest["known"], args.data)
    if changed := manifests.not_as_made(manifest, inputs):
        raise UserError(f"{folder / changed} is no longer as it was made: {AGAIN}")
    entry, data = manifests.find(manifest, args.round, args.stage), local_sets(args.tasks.split())
    if entry is None:
        entry = {"round": args.round, "stage": args.stage, "title": title, "start": time.time()}
        entry |= {"inputs": inputs, "outputs": {}, "seconds": 0, "starts": 0}
        manifest["stages"].append(entry)
    elif what_is_there(folder, entry, inputs, outputs, data):
        print(f"== {title}: {args.output[0]} is there", flush=True)
        if entry["outcome"] != "done":
            finish(folder, manifest, entry, outputs, "done")
        return 0
    print(f"== {title}{how_long(manifest, args.stage)}", flush=True)
    entry |= {"command": command, "inputs": inputs, "settings": manifest["settings"]}
    if data:
        entry["data"] = entry.get("data", {}) | data
    entry |= {"seed": manifest["settings"].get("SEED"), "versions": manifests.versions(), "commit": manifests.commit()}
    entry |= {"starts": entry["starts"] + 1, "outcome": "started"}
    manifests.write(folder, manifest)
    began = time.monotonic()
    try:
        status = run_command(command, folder / ".status.tmp")
    except Ended as ended:
        entry["seconds"] += round(time.monotonic() - began, 1)
        manifests.sweep(folder)
        finish(folder, manifest, entry, [], f"ended by {signal.Signals(ended.number).name}")
        return 128 + ended.number
    entry["seconds"] = round(entry["seconds"] + time.monotonic() - began, 1)
    missing = [name for name in outputs if not (folder / name).is_file()]
    if not status and missing:
        print(f"{title}: {folder / missing[0]} was not written", file=sys.stderr)
        status = 1
    if status:
        finish(folder, manifest, entry, [], f"failed with status {status}")
        killed = " (killed from outside: is the machine's memory full?)" if status == 128 + signal.SIGKILL else ""
        print(f"run_grath.sh: error: {title} failed{killed}; {AGAIN}", file=sys.stderr)
        return status
    finish(folder, manifest, entry, outputs, "done")
    return 0


def how_long(manifest, name):
    """In words, what the stage took in the round before, else what `STAGE_SECONDS` ("pairs=40 dpo=80") says of it."""
    seconds = dict(re.findall(r"(\w+)=(\d+)", os.environ.get("STAGE_SECONDS", ""))).get(name)
    for entry in manifest["stages"]:
        if entry["stage"] == name and entry.get("outcome") == "done" and entry["seconds"] >= 1:
            seconds = entry["seconds"]
    return f" (about {float(seconds):.0f} s)" if seconds else ""


def what_is_there(folder, entry, inputs, outputs, data):
    """Whether all outputs of a recorded stage are there, whole and made from these inputs.

    `data` are the sets that scores are of, as `local_sets` gives them; of these, what both know of is compared, for a
    task can be added later.

    What is damaged, or was made from something else, is named and removed.
    """
    title = entry["title"]
    changed = manifests.changed_input(entry["inputs"], inputs)
    before = entry.get("data", {})
    changed = changed or next((name for name in data if before.get(name, data[name]) != data[name]), None)
    if changed:
        print(f"{title}: made again, for {changed} is not what it was made from", flush=True)
        manifests.remove(folder, {*outputs, *entry["outputs"]})
        entry["outputs"], entry["data"] = {}, {}
        return False
    if drop_damaged(folder, entry, outputs):
        return False
    # Outputs appear whole: one that is there but not recorded was made by a start that was killed right behind it.
    new = [folder / name for name in outputs if name not in entry["outputs"]]
    if entry["outcome"] == "done" and new:
        return False
    return all(path.is_file() and path.stat().st_mtime >= entry["start"] for path in new)


def drop_damaged(folder, entry, outputs):
    """Name and remove the `outputs` of a stage that are not as they were. Returns whether there were any."""
    damaged = manifests.damage(folder, entry, outputs)
    for name, what in damaged:
        print(f"{entry['title']}: made again, for {folder / name} {what}", flush=True)
    if damaged:
        manifests.remove(folder, [name for name, _ in damaged])
        # What is left of a training's files will be written anew beside the adapter.
        whole = {name: value for name, value in entry["outputs"].items() if (folder / name).is_file()}
        entry["outputs"] = {} if entry["stage"] == "dpo" else whole
        entry["outcome"] = "damaged"
    return bool(damaged)


def finish(folder, manifest, entry, outputs, outcome):
    """Record how a stage ended. A full disk does not hide the stage's own end."""
    entry["outcome"] = outcome
    entry["outputs"] |= manifests.hashes(folder, [folder / name for name in outputs])
    try:
        manifests.write(folder, manifest)
    except OSError:
        if outcome == "done":
            raise


def run_command(command, status_file):
    """Run a command in a process group of its own; on a signal, end all that it has started. Returns its status."""
    status_file.write_bytes(b"")
    environment = {**os.environ, "GRATH_STATUS_FILE": str(status_file.resolve())}
    try:
        process = subprocess.Popen(command, env=environment, process_group=0, preexec_fn=die_with_loop)
    except FileNotFoundError:
        raise UserError(f"there is no program {command[0]}: are the packages of requirements.txt installed?") from None
    try:
        status = process.wait()
        # accelerate turns every status into 1; the stage has left its own.
        if status < 0:
            return 128 - status
        return int(status_file.read_text() or status) if status else 0
    except Ended:
        end_all(process.pid)
        raise
    finally:
        status_file.unlink(missing_ok=True)


def end_all(pid):
    """End a process and all that it has started: first by SIGTERM, what is left after some seconds by SIGKILL."""
    import psutil

    try:
        parent = psutil.Process(pid)
        processes = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        _send(process.terminate)
    _, alive = psutil.wait_procs(processes, timeout=SECONDS_TO_END)
    for process in alive:
        _send(process.kill)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=SECONDS_TO_END)


def _send(method):
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        method()


def main():
    parser = Parser(__doc__)
    parser.add_argument("what", choices=("begin", "lock", "stage"))
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--fresh", action="store_true", help="begin: move an old run aside first")
    parser.add_argument("--lock_fd", type=int, help="begin: open file of the loop that is locked as long as it lives")
    parser.add_argument("--check", action="store_true", help="begin: only compare the settings, and write nothing")
    parser.add_argument("--input", action="append", default=[], help="file, model folder or hub name it is made from")
    parser.add_argument("--data", action="append", default=[], help="folder or hub name of a data set it is made from")
    parser.add_argument("--output", action="append", default=[], help="stage: a file that is there afterwards")
    parser.add_argument("--tasks", default="", help="stage: what is scored; local data sets of these are inputs")
    parser.add_argument("--title", help="stage: what is printed")
    parser.add_argument("--round", type=int, help="stage: the round, from 0 for the base's scores")
    parser.add_argument("--stage", help="stage: its name")
    args = parser.parse_with_rest()
    if args.what == "lock":
        lock(args.lock_fd, args.run)
        return None
    return begin(args) if args.what == "begin" else stage(args)


if __name__ == "__main__":
    run(main)
