"""Stages run by the manifest, with commands that take no time."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from support import PROJECT, call, call_here

from grath.common.signals import SIGNALS
from grath.pipeline.manifest import hashes
from grath.pipeline.settings import normalize_settings, read_settings

PIPELINE = (sys.executable, "-m", "grath.pipeline")


def settings_of(run, **changes):
    """The environment of a run in the folder `run`, which must end with _seed_0."""
    values = {"MODEL_NAME_OR_PATH": "a/b", "NUM_QUERY": "1", "RUNS_DIR": run.parent, "RUN_NAME": run.name[:-7]}
    return {name: str(value) for name, value in (values | changes).items()}


def start(run, status=0, **changes):
    return call_here("grath.pipeline", "start", env=settings_of(run, **changes), status=status)


def command_of(run, name, script, outputs, inputs=(), number=1):
    files = ["--output", *(run / file for file in outputs)]
    files += ["--input", *(run / file for file in inputs)] if inputs else []
    command = [*PIPELINE, "stage", run, "--iteration", number, "--stage", name, "--title", name, *files, "--"]
    return [*command, "bash", "-c", script]


def stage(run, *arguments, status=0, **options):
    return call(*command_of(run, *arguments, **options), cwd=run, status=status)


@pytest.fixture
def run(tmp_path):
    start(tmp_path / "run_seed_0")
    return tmp_path / "run_seed_0"


def entries(run):
    return {entry["stage"]: entry for entry in json.loads((run / "manifest.json").read_text())["stages"]}


def test_a_stage_says_how_long_it_will_take(run):
    told = {"STAGE_SECONDS": "b=7 a=40"}
    done = call(*command_of(run, "a", "echo >f", ["f"]), cwd=run, env=told)
    assert "== a (about 40 s)\n" in done.stdout
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["stages"][0]["seconds"] = 93.4  # what it took counts more than what was told
    (run / "manifest.json").write_text(json.dumps(manifest))
    done = call(*command_of(run, "a", "echo >g", ["g"], number=2), cwd=run, env=told)
    assert "== a (about 93 s)\n" in done.stdout
    assert "== c\n" in stage(run, "c", "echo >c", ["c"]).stdout


def test_a_stage_runs_once(run):
    for _ in range(2):
        stage(run, "a", "echo x >>f", ["f"])
    assert (run / "f").read_text() == "x\n"
    assert entries(run)["a"]["starts"] == 1


def test_a_failed_stage_is_run_again_and_its_status_is_kept(run):
    done = stage(run, "a", "exit 7", ["f"], status=7)
    assert done.stderr == "run_grath.sh: error: a failed; run the same command again (without FRESH=1) to resume\n"
    assert entries(run)["a"]["outcome"] == "failed with status 7"
    done = stage(run, "a", "true", ["f"], status=1)
    assert f"a: {run}/f was not written" in done.stderr
    done = stage(run, "a", "kill -9 $$", ["f"], status=137)
    assert "the system has killed it: is the memory full?" in done.stderr
    stage(run, "a", "echo x >f", ["f"])
    assert entries(run)["a"]["outcome"] == "done" and entries(run)["a"]["starts"] == 4


MAIN = """import os, signal, sys
from grath.common.errors import UserError, run_main

def main():
    if sys.argv[1] == "refuse":
        raise UserError("no such thing")
    if sys.argv[1] == "bug":
        raise ZeroDivisionError
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    signal.pause()

run_main(main)"""


@pytest.mark.parametrize(
    ("ends", "status", "hint"),
    [
        (["refuse"], 2, False),
        (["refuse", "SIGTERM"], 2, False),  # torchrun ends the other processes when one has failed
        (["SIGKILL"], 1, True),
        (["bug"], 1, False),
    ],
)
def test_a_stage_below_a_launcher_that_replaces_its_status(run, ends, status, hint):
    (run / "main.py").write_text(MAIN)
    done = stage(
        run, "a", "".join(f"{sys.executable} main.py {end}; " for end in ends) + "exit 1", ["f"], status=status
    )
    assert entries(run)["a"]["outcome"] == f"failed with status {status}"
    assert ("if no error is shown above, the system has killed it" in done.stderr) == hint


def test_an_input_that_was_altered_on_the_way_is_not_used(run):
    stage(run, "a", "echo x >f", ["f"])
    (run / "f").write_text("y\n")
    done = stage(run, "b", "cp f g", ["g"], ["f"], status=2)
    assert f"{run}/f has changed since its stage wrote it: run the same command again" in done.stderr
    assert not (run / "g").exists()
    assert "running again" in stage(run, "a", "echo x >f", ["f"]).stdout
    stage(run, "b", "cp f g", ["g"], ["f"])
    assert (run / "g").read_text() == "x\n"


def test_other_bytes_rerun_every_later_stage_and_the_same_bytes_none(run):
    stage(run, "a", "echo x >f", ["f"])
    stage(run, "b", "cp f g; echo b >>log", ["g"], ["f"])
    for word, times in (("x", 1), ("y", 2)):
        (run / "f").unlink()
        stage(run, "a", f"echo {word} >f", ["f"])
        stage(run, "b", "cp f g; echo b >>log", ["g"], ["f"])
        assert (run / "log").read_text() == "b\n" * times
        assert (run / "g").read_text() == (run / "f").read_text()


def test_a_repair_that_is_killed_is_gone_on_with(run):
    files = [f"m/{name}" for name in ("adapter_model.safetensors", "grath.json")]
    stage(run, "dpo", "mkdir m; echo 1 >m/grath.json; echo 1 >m/adapter_model.safetensors; mkdir m/checkpoint-1", files)
    (run / files[0]).unlink()
    # The repair writes the record anew and is killed before the adapter.
    stage(run, "dpo", "echo 2 >m/grath.json; exit 9", files, status=9)
    done = stage(run, "dpo", "test -d m/checkpoint-1 && echo 1 >m/adapter_model.safetensors", files)
    assert "grath.json has changed" not in done.stdout
    assert (run / "m" / "grath.json").read_text() == "2\n"


def test_an_output_that_is_no_longer_asked_for_is_not_missed(run):
    stage(run, "scores", "echo >f; echo >g; echo >>log", ["f", "g"])
    (run / "g").unlink()
    stage(run, "scores", "echo >>log", ["f"])
    assert (run / "log").read_text() == "\n"
    stage(run, "scores", "echo >>log; echo >h", ["f", "h"])  # one more is made
    assert (run / "log").read_text() == "\n\n"


@pytest.mark.parametrize(("number", "ignored"), [("TERM", False), ("HUP", False), ("HUP", True), ("INT", True)])
def test_signals_end_a_stage_unless_they_are_ignored(number, ignored, run):
    """nohup ignores SIGHUP, and a shell ignores SIGINT for what it starts in the background."""
    script = "trap 'touch cleaned; exit' TERM; touch started; until [[ -e go ]]; do sleep 0.1; done; echo >f"
    inner = command_of(run, "a", script, ["f"])
    trap = f"trap '' {number}; " if ignored else ""
    process = subprocess.Popen(
        ["bash", "-c", trap + 'exec "$@"', "bash", *map(str, inner)],
        cwd=run,
        env=dict(os.environ),
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in SIGNALS],  # tests under nohup
    )
    deadline = time.monotonic() + 600
    while not (run / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.Signals[f"SIG{number}"])
    ends = not ignored
    if not ends:
        (run / "go").touch()
    process.wait(timeout=60)
    assert process.returncode == (128 + signal.Signals[f"SIG{number}"] if ends else 0)
    assert (run / "cleaned").exists() == ends and (run / "f").exists() != ends
    assert entries(run)["a"]["outcome"] == (f"ended by SIG{number}" if ends else "done")


def test_a_stage_whose_loop_is_dead_does_not_begin(run):
    """A loop that is killed right after the start of a stage."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    command = [str(part) for part in command_of(run, "a", "echo >f", ["f"])]
    done = subprocess.run(command, cwd=run, env={**os.environ, "GRATH_LOOP": str(dead.pid)})
    assert done.returncode == 137
    assert not (run / "f").exists() and entries(run) == {}


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("BETA", "0", "BETA must be a number greater than 0, not '0'"),
        ("LEARNING_RATE", "fast", "LEARNING_RATE must be a number greater than 0, not 'fast'"),
        ("MAX_LENGTH", "0", "MAX_LENGTH must be a whole number of at least 1, not '0'"),
        ("MODEL_TYPE", "gpt2", "MODEL_TYPE must be one of auto, llama2, zephyr, smollm2, not 'gpt2'"),
        ("EVAL_PRECISION", "8", "EVAL_PRECISION must be one of auto, fp32, fp16, bf16, int8, nf4, fp4, not '8'"),
        ("DPO_PRECISION", "4", "DPO_PRECISION must be one of auto, fp32, fp16, bf16, int8, nf4, fp4, not '4'"),
    ],
)
def test_a_value_that_a_later_stage_would_refuse_is_refused_at_once(name, value, line, tmp_path):
    done = start(tmp_path / "run_seed_0", status=2, **{name: value})
    assert done.stderr == f"grath.pipeline: error: {line}\n"
    assert not (tmp_path / "run_seed_0").exists()


def test_settings_can_change_until_a_stage_has_used_them(run):
    stage(run, "other", "echo >e", ["e"])
    start(run, USE_GT=0, LIMIT=3)
    start(run, USE_GT=1, LIMIT=3)
    stage(run, "pairs", "echo >f", ["f"])
    assert "USE_GT=1, not 0" in start(run, USE_GT=0, status=2).stderr
    start(run, USE_GT=1, BETA=0.2, LIMIT=4)
    stage(run, "dpo", "echo >g", ["g"])
    assert "BETA=0.2, not 0.1" in start(run, USE_GT=1, BETA=0.1, LIMIT=5, status=2).stderr
    start(run, USE_GT=1, BETA=0.2, LIMIT=5)
    stage(run, "scores", "echo >h", ["h"])
    assert "LIMIT=5, not 6" in start(run, USE_GT=1, BETA=0.2, LIMIT=6, status=2).stderr
    changed = start(run, MODEL_TYPE="zephyr", USE_GT=1, BETA=0.2, LIMIT=5, status=2).stderr
    assert "MODEL_TYPE=auto, not zephyr" in changed
    # A setting that changes no output can always change.
    start(run, USE_GT=1, BETA=0.2, LIMIT=5, SAVE_STEPS=7, ITERATIONS=9, PAIRS_BATCH_SIZE=1)


def test_a_changed_or_lost_input_stops_a_run(run, tmp_path):
    questions = tmp_path / "q.jsonl"
    questions.write_text("a")
    start(run, DATA_PATH=questions)
    stage(run, "pairs", "echo >f", ["f"])
    start(run, DATA_PATH=questions)
    os.utime(questions, (1, 1))  # another time, the same bytes
    start(run, DATA_PATH=questions)
    questions.write_text("b")
    assert "q.jsonl has changed since the run" in start(run, DATA_PATH=questions, status=2).stderr
    questions.unlink()
    assert f"DATA_PATH: there is no file '{questions}'" in start(run, DATA_PATH=questions, status=2).stderr


def values_of(**changes):
    return read_settings(environment={"MODEL_NAME_OR_PATH": "a/b", "NUM_QUERY": "1", **changes})


def test_a_run_does_not_depend_on_where_the_project_is(tmp_path):
    assert list(hashes(tmp_path, [PROJECT / "demos" / "truthfulqa.json"])) == ["demos/truthfulqa.json"]
    normalized = normalize_settings(values_of(DATA_PATH=str(PROJECT / "data" / "questions.jsonl")))
    paths = [normalized[name] for name in ("DATA_PATH", "MODEL_NAME_OR_PATH", "DEMOS")]
    assert paths == ["data/questions.jsonl", "a/b", "truthfulqa"]


def test_auto_is_recorded_as_what_it_means_on_this_machine(monkeypatch):
    import torch

    for gpu, precisions in ((False, ("bf16", "bf16", "fp32")), (True, ("int8", "fp4", "fp16"))):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        normalized = normalize_settings(values_of())
        names = ("PAIRS_PRECISION", "DPO_PRECISION", "EVAL_PRECISION")
        assert tuple(normalized[name] for name in names) == precisions


@pytest.mark.parametrize(
    ("processes", "accumulation", "batch"),
    [("1", "", "16"), ("2", "", "16"), ("3", "", "12"), ("8", "", "32"), ("2", "3", "24")],
)
def test_of_batch_and_gpus_only_the_pairs_of_a_step_matter(processes, accumulation, batch):
    settings = {"DPO_BATCH_SIZE": "4", "NUM_PROCESSES": processes, "GRADIENT_ACCUMULATION_STEPS": accumulation}
    normalized = normalize_settings(values_of(**settings))
    assert normalized["EFFECTIVE_BATCH"] == batch and not settings.keys() & normalized.keys()
    done = call("run_llama2.sh", env={**settings, "DRY_RUN": "1"})
    assert [f"  {name}={value}\n" in done.stdout for name, value in settings.items()] == [True] * 3


@pytest.mark.parametrize(
    ("processes", "batch", "accumulation", "effective"),
    [("1", "", "", "16"), ("4", "", "", "16"), ("8", "", "", "16"), ("3", "", "", "12"), ("1", "", "2", "8")]
    + [("1", "16", "", "16"), ("1", "2", "", "16"), ("8", "4", "", "32")],
)
def test_a_step_has_the_papers_pairs_by_default(processes, batch, accumulation, effective):
    settings = {"DPO_BATCH_SIZE": batch, "NUM_PROCESSES": processes, "GRADIENT_ACCUMULATION_STEPS": accumulation}
    assert normalize_settings(values_of(**settings))["EFFECTIVE_BATCH"] == effective


def test_a_job_that_slurm_starts_again_is_not_fresh(tmp_path):
    run = tmp_path / "llama2_seed_0"
    settings = {"RUNS_DIR": str(tmp_path), "MODEL_NAME_OR_PATH": "nobody/nothing", "TASKS": "", "FRESH": "1"}
    run.mkdir()
    (run / "mine.txt").write_text("")
    done = call("run_llama2.sh", env={**settings, "SLURM_RESTART_COUNT": "1"}, status=2)
    assert "is not empty and contains no manifest.json" in done.stderr and (run / "mine.txt").exists()
    call("run_llama2.sh", env={**settings, "SLURM_RESTART_COUNT": f"x[$(touch {tmp_path}/pwned)]"}, status=2)
    assert not (tmp_path / "pwned").exists()
    assert (tmp_path / "llama2_seed_0.old-1" / "mine.txt").exists()


def test_a_manifest_of_format_1_is_read():
    from grath.common.provenance import read_manifest

    manifest = read_manifest(PROJECT / "results" / "rolling")
    assert manifest["format"] == 2 and "hash_cache" in manifest and "known" not in manifest
    assert {entry["iteration"] for entry in manifest["stages"]} == {0, 1, 2}
    stages = [entry["stage"] for entry in manifest["stages"]]
    assert "combine" in stages and "splice" not in stages
