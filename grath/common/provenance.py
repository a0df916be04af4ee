"""What a result was made with: library versions, the commit, and the manifest of a run."""

import json
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from grath.common.errors import UserError
from grath.common.layout import PROJECT

MANIFEST = "manifest.json"
FORMAT = 2
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "lm-eval", "bitsandbytes")
WAYS_ON = "set another RUN_NAME, or FRESH=1 to move the old run aside and start again"


def read_manifest(run):
    """Read the manifest of the run in the folder `run`; return None if the folder is empty or missing.

    Raises:
        UserError: the manifest cannot be read, or the folder contains something else.
    """
    path = Path(run) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] == 1:
            manifest = _upgrade(manifest)
        parts = [manifest[name] for name in ("settings", "inputs", "hash_cache")]
        sound = manifest["format"] == FORMAT and isinstance(manifest["stages"], list)
        sound = sound and all(isinstance(part, dict) for part in parts)
    except FileNotFoundError:
        if any(Path(run).glob("[!.]*")):
            raise UserError(f"{run} is not empty and contains no {MANIFEST}: {WAYS_ON}") from None
        return None
    except (OSError, ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise UserError(f"{path} is damaged, or was written by another version: {WAYS_ON}")
    return manifest


def _upgrade(manifest):
    """Convert a manifest of format 1, which called an iteration a round and the combine stage a splice."""
    stages = []
    for entry in manifest["stages"]:
        stage = "combine" if entry["stage"] == "splice" else entry["stage"]
        others = {name: value for name, value in entry.items() if name != "round"}
        stages.append({"iteration": entry["round"], **others, "stage": stage})
    others = {name: value for name, value in manifest.items() if name != "known"}
    return {**others, "format": FORMAT, "hash_cache": manifest["known"], "stages": stages}


def versions():
    """Return the versions of the libraries that a result depends on: dict of str."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def commit():
    """Return the commit of the checkout, with "+" appended if files differ from it; None without git."""

    def git(*arguments):
        return subprocess.run(["git", "-C", PROJECT, *arguments], capture_output=True, text=True).stdout.strip()

    try:
        head = git("rev-parse", "--short", "HEAD")
        return f"{head}+" if head and git("status", "--porcelain", "-uno") else head or None
    except OSError:
        return None
