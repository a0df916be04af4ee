"""The loop and its presets: their commands, and whole runs on a tiny model."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from accelerate.commands import launch
from accelerate.commands.config import config_args
from fault_injection import records
from support import BUNDLED, CORRECT, PROJECT, call, put_program, rows, score_values

from grath.common.files import sha256
from grath.run.settings import SETTINGS

PRESETS = {
    "run_llama2.sh": ("meta-llama/Llama-2-7b-chat-hf", "llama2", "rolling", 2, 1000, 1119),
    "run_llama2_fix_ref.sh": ("meta-llama/Llama-2-7b-chat-hf", "llama2", "fixed", 10, 1000, 1119),
    "run_zephyr.sh": ("HuggingFaceH4/zephyr-7b-beta", "zephyr", "rolling", 2, 500, 1119),
    "run_zephyr_fix_ref.sh": ("HuggingFaceH4/zephyr-7b-beta", "zephyr", "fixed", 10, 1000, 1119),
    "run_smollm2.sh": (str(PROJECT / "models" / "smollm2"), "smollm2", "rolling", 2, 10, 160),
    "run_smollm2_fix_ref.sh": (str(PROJECT / "models" / "smollm2"), "smollm2", "fixed", 4, 10, 160),
}


def value_of(line, flag):
    """The value of a flag in a printed command."""
    words = shlex.split(line)
    return words[words.index(flag) + 1]


@pytest.mark.parametrize("preset", PRESETS)
def test_dry_run_prints_every_command_and_runs_none(preset, tmp_path):
    model, model_type, reference, count, steps, questions = PRESETS[preset]
    done = call(preset, env={"DRY_RUN": "1", "RUNS_DIR": str(tmp_path / "runs")})
    assert not (tmp_path / "runs").exists()
    lines = done.stdout.splitlines()
    asks = [line for line in lines if "create_pair_responses.py" in line]
    combines = [line for line in lines if "combine_new_correct_ori_wrong.py" in line]
    trainings = [line for line in lines if re.match(r"accelerate launch .*dpo\.py", line)]
    scores = [line for line in lines if "evaluation.sh" in line]
    assert (len(asks), len(combines), len(trainings), len(scores)) == (count, count - 1, count, count + 1)
    run = value_of(trainings[0], "--dataset_path").partition("/data/")[0]
    assert run.startswith(f"{tmp_path}/runs/")
    tail = f"arcc_num_{questions}_useGT_False_useFS_True"
    models = [model, *(f"{run}/models/iter_{i}_{tail}" for i in range(1, count + 1))]
    assert [value_of(line, "--model_name_or_path") for line in asks] == models[:-1]
    assert [value_of(line, "--model_name_or_path") for line in trainings] == models[:-1]
    assert [value_of(line, "--output_dir") for line in trainings] == models[1:]
    assert [name in line for name, line in zip(models, scores, strict=True)] == [True] * (count + 1)
    pairs = [f"{run}/data/iter{i}_{tail}{'_combined' if i else ''}.json" for i in range(count)]
    assert [value_of(line, "--dataset_path") for line in trainings] == pairs
    assert {value_of(line, "--ori_data_path") for line in combines} == {pairs[0]}
    same = {"--reference": reference, "--max_steps": str(steps), "--model_type": model_type, "--report_to": "none"}
    same |= {} if "smollm2" in preset else {"--learning_rate": "5e-4", "--warmup_steps": "100"}
    assert all(value_of(line, flag) == value for line in trainings for flag, value in same.items())
    other = call(preset, env={"DRY_RUN": "1", "MODEL_NAME_OR_PATH": "another", "ITERATIONS": "1"}).stdout.splitlines()
    assert {value_of(line, "--model_type") for line in other if "create_pair" in line} == {"auto"}
    assert "--batch_size" not in done.stdout
    exported = re.findall(r"export (.*)", (PROJECT / preset).read_text(encoding="utf-8"))
    assert {name for line in exported for name in re.findall(r"(\w+)=", line)} <= SETTINGS.keys()


@pytest.mark.slow
def test_the_demo_on_smollm2_with_reduced_sizes(tmp_path):
    env = {"NUM_QUERY": "4", "SAMPLES": "0", "MAX_STEPS": "1", "DPO_BATCH_SIZE": "2", "WARMUP_STEPS": "0"}
    env |= {"GRADIENT_ACCUMULATION_STEPS": "1", "ITERATIONS": "1", "LIMIT": "2", "RUNS_DIR": str(tmp_path)}
    # `make` itself, where the tests run in the environment that it makes.
    made = Path(sys.prefix) == PROJECT / ".venv" and (PROJECT / ".venv" / "run.stamp").exists()
    done = call("make", "demo", env=env) if made else call("run_smollm2.sh", env=env)
    table = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("M_")]
    assert table == ["M_0", "M_1"]
    record = json.loads(next((tmp_path / "smollm2_seed_0" / "models").glob("iter_1*/grath.json")).read_text())
    assert record["settings"]["precision"] in ("bf16", "fp4")


def test_settings_reach_their_commands():
    config = "accelerate_configs/fsdp.yaml"
    env = {"DRY_RUN": "1", "REPORT_TO": "wandb", "PAIRS_BATCH_SIZE": "7", "ACCELERATE_CONFIG": config}
    env |= {"DPO_BATCH_SIZE": "2", "GRADIENT_ACCUMULATION_STEPS": "3"}
    done = call("run_llama2.sh", env=env).stdout
    ask = f"\npython {PROJECT}/create_pair_responses.py "  # which accelerate does not start
    sizes = ("--batch_size 7 ", "--per_device_train_batch_size 2 ", "--gradient_accumulation_steps 3 ")
    for text in (f"--config_file {config} {PROJECT}/dpo.py", "--report_to wandb ", *sizes, ask):
        assert done.count(text) == 2


def test_a_run_has_its_folder(llama_run, tiny_llama):
    run, _, done = llama_run
    tail = "arcc_num_6_useGT_False_useFS_True"
    for name in (f"iter0_{tail}", f"iter1_{tail}", f"iter1_{tail}_combined"):
        assert [row["correct"] for row in rows(run / "data" / f"{name}.json")] == [CORRECT] * 6
    for i in (1, 2):
        config = json.loads((run / "models" / f"iter_{i}_{tail}" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tiny_llama)
    for i in (0, 1, 2):
        assert score_values(run / "results" / f"iter_{i}").keys() == {"grath_mc1", "grath_mc2"}
        assert len(rows(run / "results" / f"iter_{i}" / "samples.jsonl")) == 5
    lines = done.stdout.splitlines()
    model = f"{run}/models/iter_2_{tail}"
    assert lines[-1] == f"Done: see {run}/report.md; M_2 is the LoRA adapter in {model}"
    assert "== iteration 2: combine with the incorrect answers of iteration 1" in lines


@pytest.fixture
def copied(llama_run, tmp_path):
    """A copy of the run at another place, and its settings."""
    run, settings, _ = llama_run
    shutil.copytree(run, tmp_path / run.name)
    return tmp_path / run.name, {**settings, "RUNS_DIR": str(tmp_path)}


def test_a_run_shows_one_bar_for_each_long_task_and_a_table(llama_run):
    done = llama_run[2]
    assert "were not passed to `accelerate launch`" not in done.stderr
    bars = {name.strip(" :") for name in re.findall(r"([^\r\n|]*)\b ?\d+%\|", done.stderr)}
    assert bars == {"Scoring", "Pairs", "Reference log-probabilities", "DPO"}
    lines = done.stdout.splitlines()
    table = max(at for at, line in enumerate(lines) if line.startswith("model "))
    assert [line.split()[0] for line in lines[table : table + 5]] == ["model", "M_0", "M_1", "M_2", "Best"]
    assert "WARNING" not in done.stderr and len(lines) < 70


def test_the_records_tell_what_was_made_from_what(llama_run, tiny_llama):
    run, _, _ = llama_run
    made = {path.relative_to(run).as_posix(): record for path, record in records(run).items()}
    weights, bases = sha256(tiny_llama / "model.safetensors"), [one["inputs"]["model"]["base"] for one in made.values()]
    assert [base["model.safetensors"] for base in bases] == [weights] * (2 + 2 + 3)
    pairs, dpo, scores = ([made[name] for name in sorted(made) if name.startswith(part)] for part in "dmr")
    adapter = dpo[0]["files"]
    assert pairs[1]["inputs"]["model"]["adapter"] == dpo[1]["inputs"]["model"]["adapter"] == adapter
    assert scores[1]["inputs"]["model"]["adapter"] == adapter and "adapter" not in scores[0]["inputs"]["model"]
    assert sha256(next(run.glob("data/*_combined.json"))) in json.dumps(dpo[1]["inputs"])


def test_the_same_command_does_nothing_twice(copied):
    run, settings = copied
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.*") if path.parent != run}
    done = call("run_llama2.sh", env=settings)
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*.*") if path.parent != run}
    assert {path for path in after if after[path] != before.get(path)} == set(run.glob("data/*_combined.json"))
    assert done.stdout.count(", finished") == 4 and done.stdout.count("Wrote") <= 4


def test_other_settings_do_not_mix_into_a_run(copied):
    run, settings = copied
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    done = call("run_llama2.sh", env={**settings, "MAX_STEPS": "3"}, status=1)  # accelerate's, for the script's 2
    errors = [line for line in done.stderr.splitlines() if " error: " in line]
    assert len(errors) == 2 and "max_steps 4, not 3" in errors[0] and "Traceback" not in done.stderr
    assert "set another RUN_NAME, or FRESH=1 to move the run aside" in errors[1]
    done = call("run_llama2.sh", env={**settings, "NUM_QUERY": "5", "TASKS": ""}, status=2)
    assert "useFS_True.json has another NUM_QUERY, USE_GT or USE_FS: set another RUN_NAME" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_fresh_moves_the_old_run_aside_and_makes_the_same_bytes(copied, llama_run):
    """Pairs and adapter of iteration 1, in another folder, from other processes; then a job that Slurm starts again."""
    run, settings = copied
    env = {**settings, "FRESH": "1", "ITERATIONS": "1", "TASKS": ""}
    done = call("run_llama2.sh", env=env)
    aside = run.with_name(f"{run.name}.old-1")
    assert f"FRESH=1: moved the old run in {run} to {aside}" in done.stdout
    old = {path.relative_to(aside) for path in aside.rglob("*")}
    assert old == {path.relative_to(llama_run[0]) for path in llama_run[0].rglob("*")}
    made = [*run.glob("data/*True.json"), *run.glob("models/*/adapter_model.safetensors")]
    assert len(made) == 2
    assert [file.name for file in made if file.read_bytes() != (aside / file.relative_to(run)).read_bytes()] == []
    again = call("run_llama2.sh", env={**env, "SLURM_RESTART_COUNT": "1"})
    assert "moved the old run" not in again.stdout
    call("run_llama2.sh", env={**env, "DRY_RUN": "1", "SLURM_RESTART_COUNT": f"x[$(touch {run}/pwned)]"})
    assert not (run / "pwned").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_users_own_accelerate_configuration_changes_nothing(processes, monkeypatch):
    for module in (launch, config_args):
        own = str(PROJECT / "accelerate_configs" / "deepspeed_zero2.yaml")
        monkeypatch.setattr(module, "default_config_file", own)
    env = {"DRY_RUN": "1", "NUM_PROCESSES": str(processes), "OMP_NUM_THREADS": "8"}
    printed = call("run_llama2.sh", env=env).stdout
    command = next(line for line in printed.splitlines() if "dpo.py" in line)
    args, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(shlex.split(command)[2:]))
    assert not args.use_deepspeed and not args.use_fsdp
    assert (args.multi_gpu, args.num_processes, args.num_machines) == (processes > 1, processes, 1)
    assert args.num_cpu_threads_per_process == 8 // processes
    assert (args.mixed_precision, args.dynamo_backend, args.use_cpu) == ("no", "no", False)


def test_presets_can_be_given_to_slurm(tmp_path):
    """Slurm runs a copy of the script from a folder of its own."""
    copied = f'#!/bin/bash\ncp "$1" "{tmp_path}/slurm_script"\ncd "{tmp_path}"\nexec ./slurm_script\n'
    put_program(tmp_path / "bin" / "sbatch", copied)
    env = {"SLURM_SUBMIT_DIR": str(PROJECT), "DRY_RUN": "1", "SLURM_JOB_ID": "1"}
    env["PATH"] = f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    for preset in PRESETS:
        header = (PROJECT / preset).read_text().split("\nset -euo")[0]
        for option in ("requeue", "open-mode=append", "signal=B:USR1@"):
            assert f"\n#SBATCH --{option}" in header
        assert f"{PROJECT}/dpo.py" in call("sbatch", f"./{preset}", env=env).stdout


def test_evaluation_scores_what_is_left_of_the_newest_run(copied):
    run, settings = copied
    (run / "results" / "iter_1" / "grath_mc2.json").unlink()
    record = run / "results" / "iter_2" / "settings.json"  # a kill between the file and the record
    content = json.loads(record.read_text())
    del content["files"]["samples.jsonl"]
    record.write_text(json.dumps(content))
    kept = (run / "results" / "iter_1" / "grath_mc1.json").stat().st_mtime_ns
    env = {"RUNS_DIR": settings["RUNS_DIR"]}
    asked = call("evaluation.sh", env={**env, "TASKS": "hellaswag", "DRY_RUN": "1", "EVAL_PRECISION": "fp32"})
    assert f"newest run: {run}, 3 model(s)" in asked.stdout and asked.stdout.count("hellaswag, 10-shot") == 3
    lock = run.with_name(f".{run.name}.lock")
    lock.write_text("process 1 on elsewhere since 2020-01-01\n")  # without an owner
    # What is not set is as in the run, the tasks too.
    done = call("evaluation.sh", env=env)
    assert "elsewhere" not in lock.read_text()
    limited = json.loads((run / "results" / "iter_1" / "grath_mc2.json").read_text())["n-samples"]["grath_mc2"]
    assert limited["effective"] == int(settings["LIMIT"])
    assert done.stdout.count("is up to date (") == 1 and done.stdout.count("Wrote the results to ") == 2
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("M_")] == ["M_0", "M_1", "M_2"]
    assert (run / "results" / "iter_1" / "grath_mc1.json").stat().st_mtime_ns == kept


def test_a_failed_stage_ends_the_loop_with_its_line_and_status(tiny_llama, tmp_path):
    env = {"MODEL_NAME_OR_PATH": str(tiny_llama), "NUM_QUERY": "500", "DATA_PATH": str(BUNDLED), "TASKS": ""}
    done = call("run_llama2.sh", env={**env, "RUNS_DIR": str(tmp_path)}, status=2)
    assert "there are only 160 questions" in done.stderr
    assert " NUM_QUERY=500 " in done.stdout and "on the CPU (DEVICE=cpu)" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("run_grath.sh: error: iteration 1: M_0 writes pairs failed")
