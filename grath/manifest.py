"""The record of a run, `manifest.json`: what every stage was made from, what it gave, and whether that is still so.

A stage is an entry with round, stage, title, command, inputs and outputs (path -> SHA-256), settings, seed, versions,
commit, start, seconds (of all starts), starts, and outcome: "started", "done", "damaged", "failed with status N" or
"ended by SIGNAL". Paths inside the run's folder are relative to it, so a run can be moved.
"""

import json
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from grath.cli import PROJECT, UserError, in_root, write_whole
from grath.local_data import data_files
from grath.models import ADAPTER, RECORD, sha256, split_adapter

NAME = "manifest.json"
FORMAT = 1
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "lm-eval", "bitsandbytes")
ADAPTER_FILES = (ADAPTER, "adapter_config.json")
MODEL_FILES = (".safetensors", ".json", ".model", ".jinja", ".txt")
UNKNOWN = "not in the cache"
# Settings that matter from a stage on: until a run has come to it they can still be changed.
MATTERS_FROM = {
    **dict.fromkeys(("EVAL_PRECISION", "LIMIT", "BACKEND", "CHAT_TEMPLATE"), "scores"),
    **dict.fromkeys(
        ("MAX_STEPS", "WARMUP_STEPS", "LEARNING_RATE", "BETA", "EFFECTIVE_BATCH", "MAX_LENGTH", "DPO_PRECISION"), "dpo"
    ),
    "REFERENCE": "dpo",
    **dict.fromkeys(
        ("NUM_QUERY", "DATA_PATH", "DATA_NAME", "SUBDATA_NAME", "SPLIT", "USE_FS", "USE_GT", "DEMOS", "MAX_NEW_TOKENS"),
        "pairs",
    ),
}
WAYS_ON = "set another RUN_NAME, or FRESH=1 to move the old run aside and start again"


def read(run):
    """The manifest of the run in the folder `run`, or None where nothing has been made yet.

    Raises:
        UserError: the manifest cannot be read, or the folder holds something else.
    """
    path = Path(run) / NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        parts = [manifest[name] for name in ("settings", "inputs", "known")]
        sound = manifest["format"] == FORMAT and isinstance(manifest["stages"], list)
        sound = sound and all(isinstance(part, dict) for part in parts)
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


def begin(run, settings, inputs, data=()):
    """The manifest of a run with these settings, new or as it is.

    Args:
        settings: dict of str, all that the pairs, models and scores of the run depend on.
        inputs, data: as in `hashes`; outside the run, they do not change in its life.

    Raises:
        UserError: the folder holds a run with other settings, or an input has changed since it was started.
    """
    manifest = read(run)
    if manifest is None or not _anything_made(run):
        manifest = {"format": FORMAT, "settings": settings, "inputs": {}, "known": {}, "stages": []}
    reached = {entry["stage"] for entry in manifest["stages"]}
    for name in sorted(settings.keys() | manifest["settings"].keys()):
        was, now = (values.get(name, "") for values in (manifest["settings"], settings))
        if was != now and MATTERS_FROM.get(name, "") in ("", *reached):
            shown = (
                "DPO_BATCH_SIZE x NUM_PROCESSES x GRADIENT_ACCUMULATION_STEPS" if name == "EFFECTIVE_BATCH" else name
            )
            raise UserError(f"{run} holds a run with {shown}={was}, not {now}: {WAYS_ON}")
    before = manifest["inputs"]
    present = hashes(run, inputs, manifest["known"], data)
    names = before.keys() & present.keys()
    if before and "pairs" in reached:  # earlier, the questions can be others
        names = before.keys() | present.keys()
    changed = changed_input(*({name: files.get(name) for name in names} for files in (before, present)))
    if changed:
        raise UserError(f"{changed} has changed since the run in {run} was started: {WAYS_ON}")
    present = {name: before.get(name, value) if value == UNKNOWN else value for name, value in present.items()}
    return {**manifest, "settings": settings, "inputs": present}


def _anything_made(run):
    """Whether a first stage has made something, so that a start with a wrong setting can be followed by a right one."""
    files = [path.name for path in Path(run).rglob("*") if path.is_file()]
    return any(name not in (NAME, "settings.txt") and not name.endswith(".tmp") for name in files)


def hashes(run, names, known=None, data=()):
    """The SHA-256 of files, and of the files of model, adapter and data folders: path -> hash in hexadecimal.

    Args:
        run: the run's folder; paths inside it are given relative to it, of others the last two parts.
        names: files, model folders or hub names; of a hub name the commit in the local cache stands for the hash.
        known: dict that keeps size, time of change and hash of files outside the run, so that gigabytes of weights are
            read once; it is brought up to date.
        data: folders or hub names of data sets.
    """
    found = {}
    for kind, name in [*(("model", name) for name in names), *(("dataset", name) for name in data)]:
        path = Path(in_root(str(name))).expanduser()
        if path.is_file():
            files = [path]
        elif path.is_dir() and kind == "dataset":
            files = data_files(path)
        elif path.is_dir():
            files = [path / file for file in ADAPTER_FILES if (path / file).is_file()]
            if files and inside(run, path) is None:
                found |= hashes(run, [split_adapter(path)[0]], known)
            files = files or sorted(file for file in path.iterdir() if file.suffix in MODEL_FILES and file.is_file())
        else:
            found[str(name)] = _commit_in_cache(str(name), kind)
            continue
        for file in files:
            relative = inside(run, file)
            found[relative or "/".join(file.absolute().parts[-2:])] = (
                sha256(file) if relative or known is None else _known_hash(file, known)
            )
    return found


def inside(run, path):
    """The path relative to the run's folder, or None if it is not inside."""
    try:
        return Path(path).resolve().relative_to(Path(run).resolve()).as_posix()
    except ValueError:
        return None


def _known_hash(file, known):
    stat = file.stat()
    stamp = [stat.st_size, stat.st_mtime_ns]
    key = str(file.absolute())
    if known.get(key, [])[:2] != stamp:
        known[key] = [*stamp, sha256(file)]
    return known[key][2]


def _commit_in_cache(name, kind):
    from huggingface_hub import try_to_load_from_cache

    try:
        path = try_to_load_from_cache(name, "config.json" if kind == "model" else "README.md", repo_type=kind)
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


def not_as_made(manifest, inputs):
    """The first of the `inputs` inside the run that is not as its stage has left it, or None."""
    made = {name: value for entry in manifest["stages"] for name, value in entry["outputs"].items()}
    return next((name for name, value in inputs.items() if made.get(name, value) != value), None)


def damage(run, entry, outputs):
    """The `outputs` of an entry that are not as they were: list of (path relative to the run, what became of it)."""
    found = []
    for name in outputs:
        expected = entry["outputs"].get(name)
        if expected is None:
            continue
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
