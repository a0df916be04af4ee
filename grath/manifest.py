"""The record of a run, `manifest.json`: what every stage was made from, what it gave, and whether that is still so.

A stage is an entry with round, stage, title, command, inputs and outputs (path -> SHA-256), settings, seed, versions,
commit, start, seconds (of all starts), starts, and outcome: "started", "done", "failed with status N" or "ended by
SIGNAL". Paths inside the run's folder are relative to it, so a run can be moved.
"""

import json
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from grath.cli import UserError, in_root, write_whole
from grath.models import ADAPTER, RECORD, sha256
from grath.questions import PROJECT

NAME = "manifest.json"
FORMAT = 1
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "lm-eval", "bitsandbytes")
ADAPTER_FILES = (ADAPTER, "adapter_config.json")
MODEL_FILES = (".safetensors", ".json", ".model", ".jinja", ".txt")
UNKNOWN = "not in the cache"
WAYS_ON = "set another RUN_NAME, or FRESH=1 to move the old run aside and start again"


def read(run):
    """The manifest of the run in the folder `run`, or None where nothing has been made yet.

    Raises:
        UserError: the manifest cannot be read, or the folder holds something else.
    """
    path = Path(run) / NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        sound = manifest["format"] == FORMAT and isinstance(manifest["stages"], list)
    except FileNotFoundError:
        if any(Path(run).glob("[!.]*")):
            raise UserError(f"{run} is not empty and holds no {NAME}: {WAYS_ON}") from None
        return None
    except (OSError, ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise UserError(f"{path} cannot be read as this program's record of a run: {WAYS_ON}")
    return manifest


def write(run, manifest):
    write_whole(Path(run) / NAME, json.dumps(manifest, indent=2) + "\n")


def begin(run, settings, inputs):
    """The manifest of a run with these settings, new or as it is.

    Args:
        settings: dict of str, all that the pairs, models and scores of the run depend on.
        inputs: names of files, model folders and hub names outside the run that do not change in the run's life.

    Raises:
        UserError: the folder holds a run with other settings, or an input has changed since it was started.
    """
    manifest = read(run)
    if manifest is None or not _anything_made(run):
        manifest = {"format": FORMAT, "settings": settings, "inputs": None, "known": {}, "stages": []}
    for name in sorted(settings.keys() | manifest["settings"].keys()):
        was, now = (values.get(name, "") for values in (manifest["settings"], settings))
        if was != now:
            raise UserError(f"{run} holds a run with {name}={was}, not {now}: {WAYS_ON}")
    present = hashes(run, inputs, manifest["known"])
    changed = manifest["inputs"] and changed_input(manifest["inputs"], present)
    if changed:
        raise UserError(f"{changed} has changed since the run in {run} was started: {WAYS_ON}")
    return {**manifest, "inputs": present}


def _anything_made(run):
    """Whether a first stage has made something, so that a start with a wrong setting can be followed by a right one."""
    return any(path.is_file() for path in Path(run).rglob("*") if path.name not in (NAME, "settings.txt"))


def hashes(run, names, known=None):
    """The SHA-256 of files, and of the files of model and adapter folders: path -> hash in hexadecimal.

    Args:
        run: the run's folder; paths inside it are given relative to it.
        names: files, folders or hub names; of a hub name the commit in the local cache stands for the hash.
        known: dict that keeps size, time of change and hash of files outside the run, so that gigabytes of weights are
            read once; it is brought up to date.
    """
    found = {}
    for name in names:
        path = Path(in_root(str(name))).expanduser()
        if path.is_dir():
            own = [path / file for file in ADAPTER_FILES if (path / file).is_file()]
            files = own or [file for file in sorted(path.iterdir()) if file.suffix in MODEL_FILES and file.is_file()]
        elif path.is_file():
            files = [path]
        else:
            found[str(name)] = _commit_in_cache(str(name))
            continue
        for file in files:
            key = inside(run, file)
            found[key] = sha256(file) if key != str(file) or known is None else _known_hash(file, known)
    return found


def inside(run, path):
    """The path relative to the run's folder if it is inside, else as it is: str."""
    try:
        return Path(path).resolve().relative_to(Path(run).resolve()).as_posix()
    except ValueError:
        return str(path)


def _known_hash(file, known):
    stat = file.stat()
    stamp = [stat.st_size, stat.st_mtime_ns]
    if known.get(str(file), [])[:2] != stamp:
        known[str(file)] = [*stamp, sha256(file)]
    return known[str(file)][2]


def _commit_in_cache(name):
    from huggingface_hub import try_to_load_from_cache

    try:
        path = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no hub name
        path = None
    return Path(path).parent.name if isinstance(path, str) else UNKNOWN


def find(manifest, number, stage):
    """The entry of a stage of a round, or None."""
    same = [entry for entry in manifest["stages"] if (entry["round"], entry["stage"]) == (number, stage)]
    return same[0] if same else None


def changed_input(was, now):
    """The first input whose hash differs between two dicts of `hashes`, or None. A hub's commit may become known."""
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name) and UNKNOWN not in (was.get(name), now.get(name)):
            return name
    return None


def damage(run, entry):
    """What has become of the outputs of an entry: list of (path relative to the run, "is missing" or "has changed")."""
    found = []
    for name, expected in entry["outputs"].items():
        path = Path(run) / name
        if not path.is_file():
            found.append((name, "is missing"))
        elif sha256(path) != expected:
            found.append((name, "has changed since it was made"))
    return found


def remove(run, names):
    """Remove outputs that must be made again, each with the adapter beside it, which is made last.

    A training whose record is lost cannot tell whose checkpoints it has: its whole folder goes.
    """
    for name in names:
        path = Path(run) / name
        if path.name == RECORD:
            shutil.rmtree(path.parent, ignore_errors=True)
        path.unlink(missing_ok=True)
        (path.parent / ADAPTER).unlink(missing_ok=True)


def sweep(run):
    """Remove what a kill leaves and no restart uses: temporary files, replies of written pairs, cut checkpoints."""
    run = Path(run)
    for path in run.glob("data/.*.replies*"):
        if (path.parent / path.name[1:].partition(".replies")[0]).is_file():
            path.unlink()
    for path in [*run.rglob(".*.tmp"), *run.rglob(".*partial")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for checkpoint in run.glob("models/*/checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(checkpoint, ignore_errors=True)


def versions():
    """The versions of the libraries that a result depends on: dict of str."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def commit():
    """The commit of this project's checkout, with "+" behind it if files differ from it; None where there is none."""

    def git(*arguments):
        return subprocess.run(["git", "-C", PROJECT, *arguments], capture_output=True, text=True).stdout.strip()

    try:
        head = git("rev-parse", "--short", "HEAD")
        return f"{head}+" if head and git("status", "--porcelain", "-uno") else head or None
    except OSError:
        return None
