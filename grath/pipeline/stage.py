"""Run one stage by the run's manifest: skip it if its outputs are there and unchanged, else run it and record it."""

import os
import re
import signal
import sys
import time

from grath.common.errors import UserError
from grath.common.files import read_json
from grath.common.paths import CPU_PRODUCTS
from grath.common.provenance import MANIFEST, commit, read_manifest, versions
from grath.common.signals import SignalReceived
from grath.evaluation.results import local_dataset_hashes
from grath.pipeline import manifest as manifests
from grath.pipeline.process import RESUME, catch_signals, run_command, share_cpu_products
from grath.pipeline.settings import question_inputs, read_settings


def run_stage(args):
    """Run one stage unless its outputs are up to date. Return the exit status of its command.

    Args:
        args: run (the folder), stage, iteration, title, input, output, questions, and rest (the command).
    """
    run, title, command = args.run, args.title, args.rest
    catch_signals()
    manifest = read_manifest(run)
    if manifest is None:
        raise UserError(f"{run / MANIFEST} has disappeared since the start: {RESUME}")
    files, datasets = question_inputs(read_settings()) if args.questions else ([], [])
    outputs = [manifests.inside(run, path) for path in args.output]
    inputs = manifests.hashes(run, [*args.input, *files], manifest["hash_cache"], datasets)
    if changed := manifests.first_modified_input(manifest, inputs):
        raise UserError(f"{run / changed} has changed since its stage wrote it: {RESUME}")
    entry = manifests.find(manifest, args.iteration, args.stage)
    scored = local_dataset_hashes(os.environ.get("TASKS", "").split()) if args.stage == "scores" else {}
    if entry is None:
        entry = {"iteration": args.iteration, "stage": args.stage, "title": title, "start": time.time()}
        entry |= {"inputs": inputs, "outputs": {}, "seconds": 0, "starts": 0}
        manifest["stages"].append(entry)
    elif outputs_up_to_date(run, entry, inputs, outputs, scored):
        print(f"== {title}: {args.output[0]} is up to date", flush=True)
        if entry["outcome"] != "done":
            record_outcome(run, manifest, entry, outputs, "done")
        return 0
    print(f"== {title}{duration_hint(manifest, args.stage)}", flush=True)
    entry |= {"command": command, "inputs": inputs, "settings": manifest["settings"]}
    if scored:
        entry["data"] = entry.get("data", {}) | scored
    entry |= {"seed": manifest["settings"].get("SEED"), "versions": versions(), "commit": commit()}
    entry |= {"starts": entry["starts"] + 1, "outcome": "started"}
    manifests.write_manifest(run, manifest)
    share_cpu_products(run)
    began = time.monotonic()
    try:
        status, killed = run_command(command, run / ".status.tmp")
    except SignalReceived as received:
        entry["seconds"] += round(time.monotonic() - began, 1)
        manifests.remove_partial_files(run)
        record_outcome(run, manifest, entry, [], f"ended by {signal.Signals(received.number).name}")
        return 128 + received.number
    entry["seconds"] = round(entry["seconds"] + time.monotonic() - began, 1)
    missing = [name for name in outputs if not (run / name).is_file()]
    if not status and missing:
        print(f"{title}: {run / missing[0]} was not written", file=sys.stderr)
        status = 1
    if status:
        record_outcome(run, manifest, entry, [], f"failed with status {status}")
        cause = " (if no error is shown above, the system has killed it: is the memory full?)" if killed else ""
        print(f"run_grath.sh: error: {title} failed{cause}; {RESUME}", file=sys.stderr)
        return status
    record_outcome(run, manifest, entry, outputs, "done")
    return 0


def duration_hint(manifest, stage):
    """Say how long the stage took in the last iteration, or what `STAGE_SECONDS` ("pairs=40 dpo=80") announces."""
    seconds = dict(re.findall(r"(\w+)=(\d+)", os.environ.get("STAGE_SECONDS", ""))).get(stage)
    for entry in manifest["stages"]:
        if entry["stage"] == stage and entry.get("outcome") == "done" and entry["seconds"] >= 1:
            seconds = entry["seconds"]
    return f" (about {float(seconds):.0f} s)" if seconds else ""


def outputs_up_to_date(run, entry, inputs, outputs, scored):
    """Whether all outputs of a recorded stage exist, are unchanged and were made from these inputs.

    Damaged outputs, and outputs made from something else, are named and removed.

    Args:
        scored: hashes of the local data sets that the scores are of. Only those that the entry has too are compared,
            because a task can be added later.
    """
    title, before = entry["title"], entry.get("data", {})
    changed = manifests.changed_input(entry["inputs"], inputs)
    changed = changed or next((name for name in scored if before.get(name, scored[name]) != scored[name]), None)
    if changed:
        print(f"{title}: running again, because {changed} has changed", flush=True)
        manifests.remove(run, {*outputs, *entry["outputs"]})
        entry["outputs"], entry["data"] = {}, {}
        return False
    if drop_damaged(run, entry, outputs):
        return False
    # Outputs are never incomplete: one that is not recorded comes from a start that was killed right after writing it.
    new = [run / name for name in outputs if name not in entry["outputs"]]
    if entry["outcome"] == "done" and new:
        return False
    return all(path.is_file() and path.stat().st_mtime >= entry["start"] for path in new)


def drop_damaged(run, entry, outputs):
    """Name and remove the `outputs` of a stage that are missing or changed. Return whether there were any."""
    damaged = manifests.damaged_outputs(run, entry, outputs)
    for name, what in damaged:
        print(f"{entry['title']}: running again, because {run / name} {what}", flush=True)
    if damaged:
        manifests.remove(run, [name for name, _ in damaged])
        # A training writes its other files again, next to the adapter.
        whole = {name: value for name, value in entry["outputs"].items() if (run / name).is_file()}
        entry["outputs"] = {} if entry["stage"] == "dpo" else whole
        entry["outcome"] = "damaged"
    return bool(damaged)


def record_outcome(run, manifest, entry, outputs, outcome):
    """Record how a stage ended. If the disk is full, the error of the stage itself is the one that is shown."""
    entry["outcome"] = outcome
    if (run / CPU_PRODUCTS).is_file() and entry["stage"] != "combine":
        entry["cpu_products"] = read_json(run / CPU_PRODUCTS, "record of matrix products")
    entry["outputs"] |= manifests.hashes(run, [run / name for name in outputs])
    try:
        manifests.write_manifest(run, manifest)
    except OSError:
        if outcome == "done":
            raise
