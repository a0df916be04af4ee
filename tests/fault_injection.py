"""Fault injection: runs of the loop that are killed or hindered at a point, and their comparison with another run."""

import json
import re
import shutil
import signal
import subprocess
import uuid
from pathlib import Path

import pytest
from psutil import process_iter
from support import PROJECT, score_values, script_env, wait_for, weights

from grath.common.layout import SCORES_RECORD, TRAINING_RECORD
from grath.common.record import read_record
from grath.common.signals import SIGNALS

HOOK = Path(__file__).parent / "faults" / "hook"
ASK, TRAIN, SCORE = "create_pair_responses.py", "dpo.py --dataset_path", "grath.evaluation"


def point(program, event, path, **more):
    """A point of a run, as `hook/sitecustomize.py` describes it."""
    return {"program": program, "event": event, "path": path, **more}


def renamed(program, name, count=1):
    """In the middle of writing a file of this name."""
    return point(program, "os.rename", rf"/{name}$", count=count, cut="source")


def start(settings, folder, fault=None):
    """Run the loop in `folder` with a fault; return its status and output. Fail if one of its processes is left."""
    mark = uuid.uuid4().hex
    settings = {**settings, "RUNS_DIR": str(folder), "MARK": mark, "PYTHONPATH": str(HOOK), "FAULT": json.dumps(fault)}
    # Tests that were started in the background of a shell ignore SIGINT, and those under nohup ignore SIGHUP.
    # Through a pipe: a limit on the size of files would stop the messages too.
    done = subprocess.run(
        ["bash", "-c", 'LOOP=$$ exec "$0"', PROJECT / "run_llama2.sh"],
        env=script_env(settings), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=3600,
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in SIGNALS],
    )  # fmt: skip
    # The process that injects the fault sleeps for two hours: only its death can end it sooner.
    wait_for(lambda: not any((one.info["environ"] or {}).get("MARK") == mark for one in process_iter(["environ"])))
    return done.returncode, done.stdout


def records(run):
    """Return the records of a run: path -> record."""
    paths = [*run.glob("data/*.record.json"), *run.glob(f"*/*/{TRAINING_RECORD}"), *run.glob(f"*/*/{SCORES_RECORD}")]
    return {path: read_record(path) for path in paths}


def finished(run):
    """Return the outputs that the records name as finished: path -> modification time."""
    files = [path.parent / name for path, record in records(run).items() for name in record.get("files", ())]
    return {file: file.stat().st_mtime_ns for file in files}


def hit_and_restart(points, settings, folder, expected=-9, finish=True, each=None):
    """Hit the run at one point after the other, then let it end. Check that no finished output is written twice.

    Args:
        points: dict: name -> point, or (point, status expected instead).
        finish: whether the run is then left to end.
        each: called after every hit with the run's folder, the point's name and what was printed.
    """
    run, earlier = folder / "llama2_seed_0", {}
    for name, fault in [*points.items(), *([("the end", (None, 0))] if finish else [])]:
        fault, wanted = fault if isinstance(fault, tuple) else (fault, expected)
        status, output = start(settings, folder, fault)
        assert status == wanted, f"{name}: status {status}\n{output[-3000:]}"
        now = finished(run)
        assert {file: now.get(file) for file in earlier} == earlier, f"{name}: done twice"
        earlier = now
        if each and fault:
            each(run, name, output)
    return run


def same_as(run, undisturbed):
    """Compare a run with the undisturbed one: pair files, adapters, scores, and what the records say."""
    for file in undisturbed.glob("data/*.json"):
        if not file.name.endswith(".record.json"):
            assert (run / "data" / file.name).read_bytes() == file.read_bytes()
    assert {path.name for path in (run / "data").iterdir()} == {path.name for path in (undisturbed / "data").iterdir()}
    for folder in (undisturbed / "models").iterdir():
        ours, theirs = weights(run / "models" / folder.name), weights(folder)
        assert ours.keys() == theirs.keys()
        assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-6
    made = records(run)
    for path, expected in records(undisturbed).items():
        ours = made[run / path.relative_to(undisturbed)]
        assert ours["inputs"].keys() == expected["inputs"].keys() and ours["files"].keys() == expected["files"].keys()
    partial = [path for path in run.rglob("*") if re.search(r"\.tmp$|partial|\.responses", path.name)]
    assert not partial
    for folder in undisturbed.glob("results/*"):
        assert score_values(run / "results" / folder.name) == pytest.approx(score_values(folder), abs=1e-4)


def copy_without(undisturbed, folder, *iterations):
    """Copy a run as if some iterations had not run yet (iteration 0 is the scores of the base)."""
    run = folder / "llama2_seed_0"
    shutil.copytree(undisturbed, run)
    for number in iterations:
        for path in [*run.glob(f"models/iter_{number}_*"), *run.glob(f"results/iter_{number}")]:
            shutil.rmtree(path)
        for path in run.glob(f"data/iter{number - 1}_*"):
            path.unlink()
    return run
