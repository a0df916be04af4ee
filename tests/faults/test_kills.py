"""Real runs of two rounds on a tiny model, killed at every point where it could hurt, and started again."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from conftest import PROJECT, weights

HOOK = Path(__file__).parent / "hook"
WITHOUT_SCORES = {"TASKS": ""}
STAGE = "grath.supervise stage"


def point(program, event, path, count=1, cut=None):
    return {"program": program, "event": event, "path": path, "count": count, "cut": cut}


def stage(name, count):
    """At the first or second writing of the manifest by a stage: just before it starts, or just behind its end."""
    return point(f"{STAGE} RUN --stage {name}", "os.rename", r"manifest\.json$", count, "source")


def renamed(program, name, count=1):
    """In the middle of writing a file of this name."""
    return point(program, "os.rename", rf"/{name}$", count, "source")


ASK, TRAIN = "create_pair_responses.py", "dpo.py --dataset_path"
ROUND_1 = {
    "the run's folder": renamed("supervise begin", r"manifest\.json"),
    "before pairs": stage("pairs", 1),
    "the command of pairs": point(STAGE, "subprocess.Popen", ASK),
    "before the first reply": point(ASK, "open", r"\.replies\.0$"),
    "the pair file": renamed(ASK, r"iter0_\w+\.json"),
    "behind the pair file": point(ASK, "os.remove", r"\.replies"),
    "behind pairs": stage("pairs", 2),
    "before DPO": stage("dpo", 1),
    "the training's record": renamed(TRAIN, r"grath\.json"),
    "the first checkpoint": point(TRAIN, "open", r"checkpoint-2/trainer_state\.json", cut="optimizer.pt"),
    "behind the first checkpoint": point(TRAIN, "os.mkdir", r"checkpoint-4$"),
    "the last checkpoint": point(TRAIN, "open", r"checkpoint-4/trainer_state\.json", cut="adapter_model.safetensors"),
    "the training's plot": renamed(TRAIN, r"training\.png"),
    "the finished record": renamed(TRAIN, r"grath\.json"),
    "the adapter's configuration": point(TRAIN, "os.rename", r"/adapter_config\.json$"),
    "the adapter": renamed(TRAIN, r"adapter_model\.safetensors"),
    "behind the adapter": point(TRAIN, "shutil.rmtree", r"\.partial$"),
    "behind DPO": stage("dpo", 2),
    "the report": renamed("grath.report", r"report\.md"),
}
ROUND_2 = {
    "pairs of round 2": point(ASK, "open", r"\.replies\.0$"),
    "the pair file of round 2": renamed(ASK, r"iter1_\w+\.json"),
    "behind pairs of round 2": stage("pairs", 2),
    "before the splice": stage("splice", 1),
    "the combined file": renamed("combine_new", r"iter1_\w+_combined\.json"),
    "behind the splice": stage("splice", 2),
    "the record of round 2": renamed(TRAIN, r"grath\.json"),
    "a checkpoint of round 2": point(TRAIN, "open", r"checkpoint-2/trainer_state\.json", cut="rng_state.pth"),
    "the adapter of round 2": renamed(TRAIN, r"adapter_model\.safetensors"),
    "behind DPO of round 2": stage("dpo", 2),
    "the run's plot": point("grath.report", "os.rename", r"iterations\.png$"),
}
SCORES = {
    "before scores": stage("scores", 1),
    "the harness's results": point("grath.harness run", "open", r"results_.*\.json$"),
    "the first task's scores": renamed("grath.harness split", r"grath_mc1\.json"),
    "the second task's scores": renamed("grath.harness split", r"grath_mc2\.json"),
    "behind scores": stage("scores", 2),
    "the answers": renamed("grath.samples", r"samples\.jsonl"),
    "behind the answers": stage("samples", 2),
}
# One of each kind, for every run of the test suite.
FEW = [
    "the run's folder", "behind the pair file", "behind pairs", "the first checkpoint", "the adapter", "behind DPO",
]  # fmt: skip


def start(settings, folder, fault=None):
    """Run the loop in `folder` with a fault: its status and output; when it is over, so are all of its processes."""
    mark = uuid.uuid4().hex
    env = {
        **os.environ, **settings, "RUNS_DIR": str(folder), "MARK": mark, "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix,
        "PYTHONPATH": str(HOOK),
    }  # fmt: skip
    if fault:
        fault = {**fault, "program": fault["program"].replace("RUN", str(folder / "llama2_seed_0"))}
        env["FAULT"] = json.dumps(fault)
    with subprocess.Popen(
        [PROJECT / "run_llama2.sh"], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        output = process.communicate(timeout=600)[0]
    deadline = time.monotonic() + 10
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, f"still running: {left}"
    return process.returncode, output


def marked(mark):
    """The command lines of the processes that carry the mark in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def finished(run):
    """The outputs that the manifest says are done: path -> time of change."""
    if not (run / "manifest.json").is_file():
        return {}
    entries = json.loads((run / "manifest.json").read_text())["stages"]
    files = [run / name for entry in entries if entry["outcome"] == "done" for name in entry["outputs"]]
    return {file: file.stat().st_mtime_ns for file in files}


def kill_and_restart(points, settings, folder):
    """Kill the run at one point after the other, and let it end; nothing that was finished is touched again."""
    run, earlier = folder / "llama2_seed_0", {}
    for name, fault in [*points.items(), ("the end", None)]:
        status, output = start(settings, folder, fault)
        assert status == (-signal.SIGKILL if fault else 0), f"{name}: status {status}\n{output[-3000:]}"
        now = finished(run)
        assert {file: now.get(file) for file in earlier} == earlier, f"{name}: done twice"
        earlier = now
    return run


def same_as(run, undisturbed):
    """Check a run against the undisturbed one: pair files, adapters, and what the manifest says was made from what."""
    for file in sorted((undisturbed / "data").iterdir()):
        assert (run / "data" / file.name).read_bytes() == file.read_bytes()
    assert {path.name for path in (run / "data").iterdir()} == {path.name for path in (undisturbed / "data").iterdir()}
    for folder in sorted((undisturbed / "models").iterdir()):
        ours, theirs = weights(run / "models" / folder.name), weights(folder)
        assert ours.keys() == theirs.keys()
        assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-6
    manifest, expected = (json.loads((path / "manifest.json").read_text()) for path in (run, undisturbed))
    assert {name: value for name, value in manifest["settings"].items()} == expected["settings"]
    chain = {(entry["round"], entry["stage"]): entry for entry in manifest["stages"]}
    made = {}
    for entry in expected["stages"]:
        ours = chain.get((entry["round"], entry["stage"]))
        if ours is None:
            assert entry["stage"] in ("scores", "samples")
            continue
        assert ours["outcome"] == "done"
        assert ours["inputs"].keys() == entry["inputs"].keys() and ours["outputs"].keys() == entry["outputs"].keys()
        for name, value in ours["inputs"].items():
            assert made.get(name, value) == value
        made |= ours["outputs"]
    partial = [path for path in run.rglob("*") if re.search(r"\.tmp$|partial|\.replies", path.name)]
    assert not partial


def copy_without(undisturbed, folder, *rounds):
    """A copy of a run as if some rounds had not been yet (round 0 is the base's scores)."""
    run = folder / "llama2_seed_0"
    shutil.copytree(undisturbed, run)
    manifest = json.loads((run / "manifest.json").read_text())
    for number in rounds:
        for path in [*run.glob(f"models/iter_{number}_*"), *run.glob(f"results/iter_{number}")]:
            shutil.rmtree(path)
        for path in run.glob(f"data/iter{number - 1}_*"):
            path.unlink()
    manifest["stages"] = [entry for entry in manifest["stages"] if entry["round"] not in rounds]
    (run / "manifest.json").write_text(json.dumps(manifest))


def test_six_kills(llama_run, tmp_path):
    undisturbed, settings, _ = llama_run
    settings = {**settings, **WITHOUT_SCORES, "ROUNDS": "1"}
    run = kill_and_restart({name: ROUND_1[name] for name in FEW}, settings, tmp_path)
    pairs = next((run / "data").iterdir())
    assert pairs.read_bytes() == (undisturbed / "data" / pairs.name).read_bytes()
    for folder in (run / "models").iterdir():
        ours, theirs = weights(folder), weights(undisturbed / "models" / folder.name)
        assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-6


@pytest.mark.faults
def test_kills_in_the_first_round(llama_run, tmp_path):
    undisturbed, settings, _ = llama_run
    run = kill_and_restart(ROUND_1, {**settings, **WITHOUT_SCORES}, tmp_path)
    same_as(run, undisturbed)


@pytest.mark.faults
def test_kills_in_the_second_round(llama_run, tmp_path):
    undisturbed, settings, _ = llama_run
    copy_without(undisturbed, tmp_path, 2)
    run = kill_and_restart(ROUND_2, {**settings, **WITHOUT_SCORES}, tmp_path)
    same_as(run, undisturbed)


@pytest.mark.faults
def test_kills_while_scoring(llama_run, tmp_path):
    undisturbed, settings, _ = llama_run
    copy_without(undisturbed, tmp_path, 0)
    run = kill_and_restart(SCORES, settings, tmp_path)
    same_as(run, undisturbed)
    for task in ("grath_mc1", "grath_mc2"):
        ours, theirs = (json.loads((r / f"results/iter_0/{task}.json").read_text()) for r in (run, undisturbed))
        assert ours["results"] == theirs["results"]
