"""Real runs of two rounds on a tiny model, killed at every point where it could hurt, and started again."""

import signal

import pytest
from conftest import weights
from hitting import (
    ASK,
    STAGE,
    TRAIN,
    WITHOUT_SCORES,
    copy_without,
    hit_and_restart,
    point,
    renamed,
    same_as,
    same_scores,
    stage,
)  # fmt: skip

ROUND_1 = {
    "the run's folder": renamed("supervise begin", r"manifest\.json"),
    "before pairs": stage("pairs", 1),
    "the command of pairs": point(STAGE, "subprocess.Popen", ASK),
    "before the first reply": point(ASK, "open", r"\.replies\.0$"),
    "the pair file": renamed(ASK, r"iter0_\w+\.json"),
    "behind the pair file": point(ASK, "os.remove", r"\.replies"),
    "behind pairs": stage("pairs", 1),  # the last kill left the whole file: it is only recorded
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
    "behind DPO": stage("dpo", 1),
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


def test_six_kills(llama_run, tmp_path):
    undisturbed, settings, _ = llama_run
    settings = {**settings, **WITHOUT_SCORES, "ROUNDS": "1"}
    run = hit_and_restart({name: ROUND_1[name] for name in FEW}, settings, tmp_path)
    pairs = next((run / "data").iterdir())
    assert pairs.read_bytes() == (undisturbed / "data" / pairs.name).read_bytes()
    for folder in (run / "models").iterdir():
        ours, theirs = weights(folder), weights(undisturbed / "models" / folder.name)
        assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-6


@pytest.mark.faults
def test_kills_in_the_first_round(llama_run, tmp_path):
    undisturbed, settings, _ = llama_run
    settings = {**settings, **WITHOUT_SCORES}
    names = list(ROUND_1)
    half = names.index("the last checkpoint") + 1
    hit_and_restart({name: ROUND_1[name] for name in names[:half]}, settings, tmp_path / "old", finish=False)
    # The run goes to another place in the middle of a training.
    (tmp_path / "old").rename(tmp_path / "new place")
    run = hit_and_restart({name: ROUND_1[name] for name in names[half:]}, settings, tmp_path / "new place")
    same_as(run, undisturbed)


@pytest.mark.faults
def test_kills_in_the_second_round(llama_run, tmp_path):
    undisturbed, settings, _ = llama_run
    copy_without(undisturbed, tmp_path, 2)
    run = hit_and_restart(ROUND_2, {**settings, **WITHOUT_SCORES}, tmp_path)
    same_as(run, undisturbed)


@pytest.mark.faults
def test_kills_while_scoring(llama_run, tmp_path):
    undisturbed, settings, _ = llama_run
    copy_without(undisturbed, tmp_path, 0)
    run = hit_and_restart(SCORES, settings, tmp_path)
    same_as(run, undisturbed)
    same_scores(run, undisturbed)


def ended(fault, name):
    """The point with another signal, and the status that the loop ends with."""
    return {**fault, "signal": name}, 128 + signal.Signals[name]


SIGNALS = {
    "asking": ended(point(ASK, "open", r"\.replies\.0$"), "SIGTERM"),
    "before training": ended(renamed(TRAIN, r"grath\.json"), "SIGTERM"),
    "training": ended(point(TRAIN, "os.mkdir", r"checkpoint-4$"), "SIGTERM"),
    "at the terminal": ended(point(TRAIN, "os.rename", r"/adapter_config\.json$"), "SIGINT"),
    "scoring": ended(point("grath.harness run", "open", r"results_.*\.json$"), "SIGTERM"),
    "Slurm's time is over": ended(point("grath.samples", "os.rename", r"/samples\.jsonl"), "SIGUSR1"),
    "the report": ended(renamed("grath.report", r"report\.md"), "SIGTERM"),
}


@pytest.mark.faults
def test_signals_end_every_process(llama_run, tmp_path):
    undisturbed, settings, _ = llama_run
    copy_without(undisturbed, tmp_path, 2)
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >>"{tmp_path}/requeued"\n')
    scontrol.chmod(0o755)
    settings = {**settings, "SLURM_JOB_ID": "17", "EXTRA_PATH": str(scontrol.parent)}

    def nothing_half_is_left(run, name, output):
        left = [path.name for path in run.rglob("*") if path.name.endswith(".tmp") or "partial" in path.name]
        assert not left, name
        assert "Traceback" not in output, name
        for checkpoint in run.glob("models/*/checkpoint-*"):
            assert (checkpoint / "trainer_state.json").is_file(), name
        if name != "the end":
            assert "start the same command again (without FRESH=1) to go on from here" in output

    run = hit_and_restart(SIGNALS, settings, tmp_path, each=nothing_half_is_left)
    same_as(run, undisturbed)
    same_scores(run, undisturbed)
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
