"""The record of a run, `manifest.json`: the inputs and outputs of every stage, and whether they are unchanged.

A stage is an entry with iteration, stage, title, command, inputs and outputs (path -> SHA-256), settings, seed,
versions, commit, cpu_products (from `grath.modeling.cpu_matmul`), start, seconds (of all starts), starts, and outcome:
"started", "done", "damaged", "failed with status N" or "ended by SIGNAL". Paths inside the run's folder are relative to
it, so a run can be moved.
"""

import json
import shutil
from pathlib import Path

from grath.common.errors import UserError
from grath.common.files import atomic_write_text, sha256
from grath.common.local_data import data_files
from grath.common.paths import ADAPTER, CPU_PRODUCTS, RECORD, resolve_local
from grath.common.provenance import FORMAT, MANIFEST, WAYS_ON, read_manifest
from grath.modeling.loading import resolve_base_and_adapter
from grath.pairs.responses import pair_file_name
from grath.pipeline.settings import EFFECTIVE_BATCH, EVERY_STAGE, FIRST_AFFECTED_STAGE, STEP_SETTINGS

ADAPTER_FILES = (ADAPTER, "adapter_config.json")
MODEL_FILES = (".safetensors", ".json", ".model", ".jinja", ".txt")
UNKNOWN = "not in the cache"


def write_manifest(run, manifest):
    atomic_write_text(Path(run) / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def start_manifest(run, settings, inputs, data=()):
    """Return the manifest of a run: the existing one, or a new one.

    Args:
        settings: what `normalize_settings` returned.
        inputs, data: as in `hashes`; files outside the run, which must not change while it exists.

    Raises:
        UserError: the folder contains a run with other settings, or an input has changed since the run was started.
    """
    manifest = read_manifest(run)
    if manifest is None or not _anything_made(run):
        manifest = {"format": FORMAT, "settings": settings, "inputs": {}, "hash_cache": {}, "stages": []}
    # A stage that refused its input (status 2) has made nothing yet, so its settings can be put right.
    reached = {
        entry["stage"] for entry in manifest["stages"] if entry["outputs"] or entry["outcome"] != "failed with status 2"
    }
    for name in sorted(settings.keys() | manifest["settings"].keys()):
        was, now = (values.get(name, "") for values in (manifest["settings"], settings))
        if was != now and FIRST_AFFECTED_STAGE.get(name) in (EVERY_STAGE, *reached):
            shown = " x ".join(STEP_SETTINGS) if name == EFFECTIVE_BATCH else name
            raise UserError(f"{run} contains a run with {shown}={was}, not {now}: {WAYS_ON}")
    before = manifest["inputs"]
    present = hashes(run, inputs, manifest["hash_cache"], data)
    names = before.keys() & present.keys()
    if before and reached & {"pairs", "dpo"}:  # before that, the questions may still change
        names = before.keys() | present.keys()
    changed = changed_input(*({name: files.get(name) for name in names} for files in (before, present)))
    if changed:
        raise UserError(f"{changed} has changed since the run in {run} was started: {WAYS_ON}")
    present = {name: before.get(name, value) if value == UNKNOWN else value for name, value in present.items()}
    return {**manifest, "settings": settings, "inputs": present}


def _anything_made(run):
    """Whether any stage has produced a file. If not, a start with a wrong setting can be followed by a right one."""
    files = [path.name for path in Path(run).rglob("*") if path.is_file()]
    return any(name not in (MANIFEST, CPU_PRODUCTS, "settings.txt") and not name.endswith(".tmp") for name in files)


def hashes(run, names, hash_cache=None, data=()):
    """Hash files, and the files of model, adapter and data folders: dict of path -> SHA-256 in hexadecimal.

    Args:
        run: the run's folder; a path inside it is relative to it, any other path is its last two parts.
        names: files, model folders or hub names; for a hub name the commit in the local cache replaces the hash.
        hash_cache: dict with size, modification time and hash of files outside the run, so that gigabytes of weights
            are read once; it is updated.
        data: folders or hub names of data sets.
    """
    found = {}
    for kind, name in [*(("model", name) for name in names), *(("dataset", name) for name in data)]:
        path = Path(resolve_local(str(name))).expanduser()
        if path.is_file():
            files = [path]
        elif path.is_dir() and kind == "dataset":
            files = data_files(path)
        elif path.is_dir():
            files = [path / file for file in ADAPTER_FILES if (path / file).is_file()]
            if files and inside(run, path) is None:
                found |= hashes(run, [resolve_base_and_adapter(path)[0]], hash_cache)
            files = files or sorted(file for file in path.iterdir() if file.suffix in MODEL_FILES and file.is_file())
        else:
            found[str(name)] = _commit_in_cache(str(name), kind)
            continue
        for file in files:
            relative = inside(run, file)
            found[relative or "/".join(file.absolute().parts[-2:])] = (
                sha256(file) if relative or hash_cache is None else _cached_hash(file, hash_cache)
            )
    return found


def inside(run, path):
    """Return the path relative to the run's folder, or None if it is not inside."""
    try:
        return Path(path).resolve().relative_to(Path(run).resolve()).as_posix()
    except ValueError:
        return None


def _cached_hash(file, hash_cache):
    stat = file.stat()
    stamp = [stat.st_size, stat.st_mtime_ns]
    key = str(file.absolute())
    if hash_cache.get(key, [])[:2] != stamp:
        hash_cache[key] = [*stamp, sha256(file)]
    return hash_cache[key][2]


def _commit_in_cache(name, kind):
    from huggingface_hub import try_to_load_from_cache

    try:
        path = try_to_load_from_cache(name, "config.json" if kind == "model" else "README.md", repo_type=kind)
    except ValueError:  # no hub name
        path = None
    return Path(path).parent.name if isinstance(path, str) else UNKNOWN


def find(manifest, iteration, stage):
    """Return the entry of a stage in an iteration, or None."""
    same = [entry for entry in manifest["stages"] if (entry["iteration"], entry["stage"]) == (iteration, stage)]
    return same[0] if same else None


def changed_input(was, now):
    """Return the first input whose hash differs between two results of `hashes`, or None. A commit may become known."""
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name) and UNKNOWN not in (was.get(name), now.get(name)):
            return name
    return None


def first_modified_input(manifest, inputs):
    """Return the first of the `inputs` that differs from the output that its stage recorded, or None."""
    made = {name: value for entry in manifest["stages"] for name, value in entry["outputs"].items()}
    return next((name for name, value in inputs.items() if made.get(name, value) != value), None)


def damaged_outputs(run, entry, outputs):
    """List the `outputs` of an entry that are missing or changed: (path relative to the run, what happened)."""
    found = []
    for name in outputs:
        expected = entry["outputs"].get(name)
        if expected is None:
            continue
        path = Path(run) / name
        if not path.is_file():
            found.append((name, "is missing"))
        elif sha256(path) != expected:
            found.append((name, "has changed since it was written"))
    return found


def remove(run, names):
    """Remove outputs that must be made again, and the adapter next to each, which is written last.

    If the record of a training is among them, its whole folder goes: the checkpoints would have no owner.
    """
    for name in names:
        path = Path(run) / name
        if path.name == RECORD:
            shutil.rmtree(path.parent, ignore_errors=True)
        path.unlink(missing_ok=True)
        (path.parent / ADAPTER).unlink(missing_ok=True)


def remove_partial_files(run):
    """Remove what a kill leaves and no resume uses: temporary files, responses of finished pairs, cut checkpoints."""
    run = Path(run)
    for path in run.glob("data/.*.responses*"):
        if (path.parent / pair_file_name(path)).is_file():
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
