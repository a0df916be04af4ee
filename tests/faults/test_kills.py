"""Real runs of two iterations on a tiny model: killed where it could do harm, or damaged, and resumed."""

import signal

import pytest
from fault_injection import ASK, SCORE, TRAIN, copy_without, hit_and_restart, point, renamed, same_as, start
from support import put_program, script_env

pytestmark = pytest.mark.faults

RECORD_0 = r"iter0_\w+\.json\.record\.json"
# The points of a run, in order.
POINTS = {
    "the record of the scores": renamed(SCORE, r"settings\.json"),
    "the first task's scores": renamed(SCORE, r"grath_mc1\.json"),
    "the second task's scores": renamed(SCORE, r"grath_mc2\.json"),
    "the record of the second task": renamed(SCORE, r"settings\.json", 2),
    "the answers": renamed(SCORE, r"samples\.jsonl"),
    "the record of pairs": renamed(ASK, RECORD_0),
    "before the first response": point(ASK, "open", r"\.responses\."),
    "the pair file": renamed(ASK, r"iter0_\w+\.json"),
    "the finished record of pairs": renamed(ASK, RECORD_0, 2),
    "after the pair file": point(ASK, "os.remove", r"\.responses"),
    "the training's record": renamed(TRAIN, r"grath\.json"),
    "the first checkpoint": point(TRAIN, "open", r"checkpoint-2/trainer_state\.json", cut="optimizer.pt"),
    "after the first checkpoint": point(TRAIN, "os.mkdir", r"checkpoint-4$"),
    "the last checkpoint": point(TRAIN, "open", r"checkpoint-4/trainer_state\.json", cut="adapter_model.safetensors"),
    "the training's plot": renamed(TRAIN, r"training\.png"),
    "the adapter's configuration": point(TRAIN, "os.rename", r"/adapter_config\.json$"),
    "the adapter": renamed(TRAIN, r"adapter_model\.safetensors"),
    "the finished record": renamed(TRAIN, r"grath\.json", 2),
    "after the adapter": point(TRAIN, "shutil.rmtree", r"\.partial$"),
    "the run's plot": point("grath.report", "os.rename", r"iterations\.png$"),
    "the report": renamed("grath.report", r"report\.md"),
    "the pair file of iteration 2": renamed(ASK, r"iter1_\w+\.json"),
    "the combined file": renamed("combine_new", r"iter1_\w+_combined\.json"),
    "a checkpoint of iteration 2": point(TRAIN, "open", r"checkpoint-2/trainer_state\.json", cut="rng_state.pth"),
    "after a checkpoint of iteration 2": point(TRAIN, "os.mkdir", r"checkpoint-4$"),
}


def test_a_run_is_killed_at_every_point(llama_run, tmp_path):
    undisturbed, settings, _ = llama_run
    hit_and_restart(POINTS, settings, tmp_path / "old", finish=False)
    # The run is moved in the middle of a training.
    (tmp_path / "old").rename(tmp_path / "new place")
    last = {"the adapter of iteration 2": renamed(TRAIN, r"adapter_model\.safetensors")}
    run = hit_and_restart(last, settings, tmp_path / "new place")
    same_as(run, undisturbed)


def ended(fault, name):
    """The point with another signal, and the status that the loop ends with."""
    return {**fault, "signal": name}, 128 + signal.Signals[name]


SIGNALS = {
    "asking": ended(point(ASK, "open", r"\.responses\."), "SIGTERM"),
    "before training": ended(renamed(TRAIN, r"grath\.json"), "SIGTERM"),
    "training": ended(point(TRAIN, "os.mkdir", r"checkpoint-4$"), "SIGTERM"),
    "at the terminal": ended(point(TRAIN, "os.rename", r"/adapter_config\.json$"), "SIGINT"),
    "scoring": ended(point(SCORE, "open", r"/\.grath_mc1\.json"), "SIGHUP"),
    "Slurm's time is over": ended(point(SCORE, "os.rename", r"/samples\.jsonl"), "SIGUSR1"),
    "the report": ended(renamed("grath.report", r"report\.md"), "SIGTERM"),
}


def test_signals_end_every_process(llama_run, tmp_path):
    undisturbed, settings, _ = llama_run
    copy_without(undisturbed, tmp_path, 2)
    put_program(tmp_path / "bin" / "scontrol", f'#!/bin/sh\necho "$@" >>"{tmp_path}/requeued"\n')
    slurm = {"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "14", "SLURM_ARRAY_TASK_ID": "3"}
    settings = settings | slurm | {"PATH": f"{tmp_path}/bin:{script_env()['PATH']}"}

    def says_how_to_resume(run, name, output):
        assert "Traceback" not in output, name
        if name == "Slurm's time is over":
            assert "the job is requeued and resumes" in output
        else:
            assert "run the same command again (without FRESH=1) to resume" in output

    run = hit_and_restart(SIGNALS, settings, tmp_path, each=says_how_to_resume)
    same_as(run, undisturbed)
    assert (tmp_path / "requeued").read_text() == "requeue 14_3\n"


def test_lost_outputs_are_made_again(llama_run, tmp_path):
    undisturbed, settings, _ = llama_run
    run = copy_without(undisturbed, tmp_path)
    lost = [*run.glob("data/iter1_*_True.json"), *run.glob("models/iter_2_*/adapter_model.safetensors")]
    lost.append(run / "results" / "iter_1" / "grath_mc2.json")
    assert len(lost) == 3
    for path in lost:
        path.unlink()
    status, output = start(settings, tmp_path)
    assert status == 0, output[-3000:]
    same_as(run, undisturbed)
