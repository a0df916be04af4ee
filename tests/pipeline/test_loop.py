"""The loop and its presets: their commands, and whole runs on a tiny model."""

import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from support import BUNDLED, CORRECT, PROJECT, call, call_here, check_here, evaluate_here, rows, start_here

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
    assert f"--model_name_or_path {model} " in asks[0]
    assert f"--model_name_or_path {model} " in trainings[0]
    for i, line in enumerate(trainings):
        assert f"--reference {reference} " in line
        assert f"--max_steps {steps} " in line
        assert f"--model_type {model_type} " in line
        combined = "_combined" if i else ""
        assert f"data/iter{i}_arcc_num_{questions}_useGT_False_useFS_True{combined}.json" in line
        assert value_of(line, "--output_dir").startswith(f"{tmp_path}/runs/")
        assert f"models/iter_{i + 1}_arcc_num_{questions}_useGT_False_useFS_True " in line
        if i:
            assert f"models/iter_{i}_arcc" in value_of(line, "--model_name_or_path")
            assert f"models/iter_{i}_arcc" in value_of(asks[i], "--model_name_or_path")
    assert all(f"models/iter_{i}_arcc" in line for i, line in enumerate(scores) if i)
    first = f"data/iter0_arcc_num_{questions}_useGT_False_useFS_True.json"
    assert all(first in line.split("--ori_data_path")[1] for line in combines)
    assert all(line.endswith("--report_to none ") for line in trainings)
    assert "--batch_size" not in done.stdout
    if "smollm2" not in preset:
        assert all("--learning_rate 5e-4" in line and "--warmup_steps 100 " in line for line in trainings)


def test_a_control_on_gold_answers_asks_no_model_for_pairs(hub, tiny_llama, tmp_path):
    settings = {
        "MODEL_NAME_OR_PATH": str(tiny_llama),
        "GOLD_PAIRS": "truthful_qa[1:3]",
        "ITERATIONS": "1",
        "MAX_STEPS": "1",
        "WARMUP_STEPS": "0",
        "NUM_QUERY": "6",
        "DATASETS_ROOT": str(hub),
        "TASKS": "truthfulqa_mc1",
        "SAMPLES": "0",
        "DPO_PRECISION": "fp32",
        "RUNS_DIR": str(tmp_path),
    }
    done = call("run_llama2.sh", env=settings)
    run = tmp_path / "llama2_seed_0"
    manifest = json.loads((run / "manifest.json").read_text())
    assert [entry["stage"] for entry in manifest["stages"]] == ["scores", "dpo", "scores"]
    assert "multiple_choice/validation-0.parquet" in manifest["stages"][1]["inputs"]
    (record,) = run.glob("models/*/grath.json")
    assert json.loads(record.read_text())["pairs"]["read"] == 2
    # Of the four questions, the report scores the two that were not trained on.
    scores = json.loads((run / "results" / "iter_1" / "truthfulqa_mc1.json").read_text())["questions"]["scores"]
    shown = next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("M_1 "))
    assert len(scores) == 4 and float(shown) == 50 * (scores[0] + scores[3])
    done = call("run_llama2.sh", env=settings)
    assert done.stdout.count("is up to date") == 3
    assert (
        "ok    data: 2 questions" in call("run_llama2.sh", env={**settings, "CHECK": "1", "NUM_QUERY": "9999"}).stdout
    )
    done = call("run_llama2.sh", env={**settings, "GOLD_PAIRS": "truthful_qa[:1]"}, status=2)
    assert "contains a run with GOLD_PAIRS=truthful_qa[1:3], not truthful_qa[:1]" in done.stderr
    done = call("run_llama2.sh", env={**settings, "GOLD_PAIRS": "my_own"}, status=2)
    assert "GOLD_PAIRS must be empty, or one of" in done.stderr


def test_the_same_command_elsewhere_gives_the_same_bytes(llama_run, tmp_path):
    """Pairs and adapter of iteration 1, in another folder, from other processes."""
    run, settings, _ = llama_run
    call("run_llama2.sh", env={**settings, "RUNS_DIR": str(tmp_path), "ITERATIONS": "1", "TASKS": ""})
    again = tmp_path / run.name
    made = [*again.glob("data/*.json"), *again.glob("models/*/adapter_model.safetensors")]
    assert len(made) == 2
    assert [file.name for file in made if file.read_bytes() != (run / file.relative_to(again)).read_bytes()] == []


def test_a_training_can_be_watched_elsewhere_and_the_rows_of_pairs_set():
    done = call("run_llama2.sh", env={"DRY_RUN": "1", "REPORT_TO": "wandb", "PAIRS_BATCH_SIZE": "7"})
    assert done.stdout.count("--report_to wandb ") == done.stdout.count("--batch_size 7 ") == 2


def test_a_tracker_that_is_not_there_is_refused_at_the_start(tiny_llama, tmp_path):
    env = {"REPORT_TO": "nobody", "MODEL_NAME_OR_PATH": str(tiny_llama), "RUNS_DIR": str(tmp_path), "NUM_QUERY": "2"}
    for check in ("1", "0"):
        done = call_here("grath.pipeline", "start", env={**env, "CHECK": check}, status=2)
        assert done.stderr.count("\n") == 1 and "there is no tracker nobody" in done.stderr
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_a_run_has_its_folder(llama_run, tiny_llama):
    run, _, done = llama_run
    tail = "arcc_num_6_useGT_False_useFS_True"
    for name in (f"iter0_{tail}", f"iter1_{tail}", f"iter1_{tail}_combined"):
        assert [row["correct"] for row in rows(run / "data" / f"{name}.json")] == [CORRECT] * 6
    for i in (1, 2):
        config = json.loads((run / "models" / f"iter_{i}_{tail}" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tiny_llama)
    for i in (0, 1, 2):
        for task in ("grath_mc1", "grath_mc2"):
            assert set(json.loads((run / "results" / f"iter_{i}" / f"{task}.json").read_text())["results"]) == {task}
        assert len(rows(run / "results" / f"iter_{i}" / "samples.jsonl")) == 5
    second = json.loads((run / "models" / f"iter_2_{tail}" / "grath.json").read_text())
    assert f"models/iter_1_{tail}" in second["policy_starts_from"]
    lines = done.stdout.splitlines()
    model = f"{run}/models/iter_2_{tail}"
    assert lines[-1] == f"Done: see {run}/report.md; M_2 is the LoRA adapter in {model}"
    assert re.search(r"^== iteration 2: M_1 writes pairs \(about \d+ s\)$", done.stdout, re.MULTILINE)
    assert [line.split()[0] for line in lines if line.startswith("M_")] == ["M_0", "M_1", "M_0", "M_1", "M_2"]
    assert "were not passed to `accelerate launch`" not in done.stderr


@pytest.fixture
def copied(llama_run, tmp_path):
    """A copy of the run at another place, its settings, and its manifest."""
    run, settings, _ = llama_run
    shutil.copytree(run, tmp_path / run.name)
    manifest = json.loads((run / "manifest.json").read_text())
    return tmp_path / run.name, {**settings, "RUNS_DIR": str(tmp_path)}, manifest


def test_the_manifest_tells_what_was_made_from_what(llama_run, tiny_llama):
    run, settings, _ = llama_run
    manifest = json.loads((run / "manifest.json").read_text())
    stages = {(entry["iteration"], entry["stage"]): entry for entry in manifest["stages"]}
    assert list(stages) == [
        (0, "scores"), (1, "pairs"), (1, "dpo"), (1, "scores"), (2, "pairs"), (2, "combine"), (2, "dpo"), (2, "scores"),
    ]  # fmt: skip
    for entry in stages.values():
        assert entry["outcome"] == "done" and entry["seed"] == "0" and entry["starts"] == 1 and entry["seconds"] >= 0
        assert entry["versions"]["trl"] and entry["command"] and entry["start"] > 1.7e9
        assert entry["settings"] == manifest["settings"]
        assert entry["settings"]["MAX_STEPS"] == "4" and entry["settings"]["MODEL_NAME_OR_PATH"] == str(tiny_llama)
        for name, value in entry["outputs"].items():
            assert hashlib.sha256((run / name).read_bytes()).hexdigest() == value
    pairs, combine, dpo = stages[2, "pairs"], stages[2, "combine"], stages[2, "dpo"]
    assert pairs["outputs"].items() <= combine["inputs"].items()
    assert combine["outputs"].items() <= dpo["inputs"].items()
    adapter = {name: value for name, value in stages[1, "dpo"]["outputs"].items() if "adapter" in name}
    assert len(adapter) == 2 and adapter.items() <= dpo["inputs"].items()
    assert adapter.items() <= pairs["inputs"].items() and adapter.items() <= stages[1, "scores"]["inputs"].items()
    weights = hashlib.sha256((tiny_llama / "model.safetensors").read_bytes()).hexdigest()
    assert stages[1, "pairs"]["inputs"][f"{tiny_llama.name}/model.safetensors"] == weights


def test_the_same_command_does_nothing_twice(copied):
    run, settings, _ = copied
    with (run / "results" / "iter_0" / "settings.txt").open("a") as opened:
        opened.write("allenai/ai2_arc=0123\n")  # as evaluation.sh does for a task of its own
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.*") if path.parent != run}
    done = call("run_llama2.sh", env=settings)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.*") if path.parent != run} == before
    assert done.stdout.count("is up to date") == 8


def test_other_settings_do_not_mix_into_a_run(copied):
    run, settings, _ = copied
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    changes = [("MAX_STEPS", "4", "3"), ("LIMIT", "3", ""), ("DEMOS", "truthfulqa", "halueval")]
    for name, was, value in (*changes, ("ACCELERATE_CONFIG", "", "accelerate_configs/fsdp.yaml")):
        done = start_here({**settings, name: value}, status=2)
        assert done.stderr == (
            f"grath.pipeline: error: {run} contains a run with {name}={was}, not {value}: set another RUN_NAME, "
            "or FRESH=1 to move the old run aside and start again\n"
        ).replace("  ", " ")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_fresh_moves_the_old_run_aside(copied, llama_run):
    run, settings, _ = copied
    done = call(
        "run_llama2.sh", env={**settings, "FRESH": "1", "MAX_STEPS": "3", "NUM_QUERY": "500", "TASKS": ""}, status=2
    )
    aside = run.with_name(f"{run.name}.old-1")
    assert f"FRESH=1: moved the old run in {run} to {aside}" in done.stdout
    old = {path.relative_to(aside) for path in aside.rglob("*")}
    assert old == {path.relative_to(llama_run[0]) for path in llama_run[0].rglob("*")}
    assert json.loads((run / "manifest.json").read_text())["settings"]["MAX_STEPS"] == "3"


@pytest.mark.parametrize("content", [None, "", '{"stages": [}', "[]"])
def test_a_folder_without_its_manifest_is_not_touched(content, copied):
    run, settings, _ = copied
    (run / "manifest.json").unlink()
    if content is not None:
        (run / "manifest.json").write_text(content)
    done = start_here(settings, status=2)
    what = (
        "is not empty and contains no manifest.json"
        if content is None
        else "is damaged, or was written by another version"
    )
    assert what in done.stderr and "set another RUN_NAME, or FRESH=1" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_wrong_first_setting_can_be_put_right(copied):
    run, settings, _ = copied
    shutil.rmtree(run)
    call("run_llama2.sh", env={**settings, "TASKS": "", "NUM_QUERY": "500"}, status=2)
    done = call("run_llama2.sh", env={**settings, "TASKS": "", "NUM_QUERY": "501"}, status=2)
    assert "--num_query 501: there are only 160 questions" in done.stderr


@pytest.mark.parametrize(("outcome", "accepted"), [("failed with status 2", True), ("failed with status 1", False)])
def test_a_setting_that_a_later_stage_refused_can_be_put_right(outcome, accepted, tmp_path):
    from grath.common.errors import UserError
    from grath.pipeline.manifest import start_manifest, write_manifest

    (tmp_path / "scores.json").write_text("{}")
    stages = [
        {"stage": "scores", "outputs": {"scores.json": "0"}, "outcome": "done"},
        {"stage": "pairs", "outputs": {}, "outcome": outcome},
    ]
    settings = {"NUM_QUERY": "5000"}
    write_manifest(tmp_path, {"format": 2, "settings": settings, "inputs": {}, "hash_cache": {}, "stages": stages})
    if accepted:
        assert start_manifest(tmp_path, {"NUM_QUERY": "160"}, [])["settings"] == {"NUM_QUERY": "160"}
        return
    with pytest.raises(UserError, match="NUM_QUERY=5000, not 160"):
        start_manifest(tmp_path, {"NUM_QUERY": "160"}, [])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_users_own_accelerate_configuration_changes_nothing(processes, monkeypatch):
    from accelerate.commands import launch
    from accelerate.commands.config import config_args

    for module in (launch, config_args):
        own = str(PROJECT / "accelerate_configs" / "deepspeed_zero2.yaml")
        monkeypatch.setattr(module, "default_config_file", own)
    printed = call("run_llama2.sh", env={"DRY_RUN": "1", "NUM_PROCESSES": str(processes)}).stdout
    command = next(line for line in printed.splitlines() if "dpo.py" in line)
    args, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(shlex.split(command)[2:]))
    assert not args.use_deepspeed and not args.use_fsdp
    assert (args.multi_gpu, args.num_processes, args.num_machines) == (processes > 1, processes, 1)
    assert (args.mixed_precision, args.dynamo_backend, args.use_cpu) == ("no", "no", False)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_can_be_given_to_slurm(preset, tmp_path):
    lines = (PROJECT / preset).read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line for line in lines[:first_command] if line.startswith("#SBATCH ")]
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(options)
    assert any(line.startswith("#SBATCH --signal=B:USR1@") for line in options)
    # Slurm runs a copy of the script from a folder of its own.
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/bash\ncp "$1" "{tmp_path}/slurm_script"\ncd "{tmp_path}"\nexec ./slurm_script\n')
    sbatch.chmod(0o755)
    env = {"SLURM_SUBMIT_DIR": str(PROJECT), "DRY_RUN": "1", "SLURM_JOB_ID": "1"}
    env["PATH"] = f"{sbatch.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    assert f"{PROJECT}/dpo.py" in call("sbatch", f"./{preset}", env=env).stdout


def test_evaluation_scores_what_is_left_of_the_newest_run(copied):
    run, settings, _ = copied
    (run / "results" / "iter_1" / "grath_mc2.json").unlink()
    kept = (run / "results" / "iter_1" / "grath_mc1.json").stat().st_mtime_ns
    # What is not set is as in the run, the tasks too.
    done = call("evaluation.sh", env={"RUNS_DIR": settings["RUNS_DIR"]})
    asked = evaluate_here(env={"RUNS_DIR": settings["RUNS_DIR"], "TASKS": "hellaswag", "DRY_RUN": "1"})
    assert f"newest run: {run}, 3 model(s) to score" in asked.stdout and "hellaswag, 10-shot" in asked.stdout
    limited = json.loads((run / "results" / "iter_1" / "grath_mc2.json").read_text())["n-samples"]["grath_mc2"]
    assert limited["effective"] == int(settings["LIMIT"])
    assert f"newest run: {run}, 1 model(s) to score" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("M_")] == ["M_0", "M_1", "M_2"]
    assert (run / "results" / "iter_1" / "grath_mc2.json").is_file()
    assert (run / "results" / "iter_1" / "grath_mc1.json").stat().st_mtime_ns == kept


def test_a_model_without_a_chat_template_is_refused_before_it_is_scored(tiny_llama, tmp_path):
    """A run needs one in every case. By hand, `evaluation.sh` scores such a model without answers."""
    model = shutil.copytree(tiny_llama, tmp_path / "model", ignore=shutil.ignore_patterns("chat_template.jinja"))
    env = {"MODEL_NAME_OR_PATH": str(model), "RUNS_DIR": str(tmp_path), "RUN_NAME": "r", "MODEL_TYPE": "auto"}
    env |= {"NUM_QUERY": "2", "DATA_PATH": str(BUNDLED), "TASKS": "grath_mc1", "SAMPLES": "0"}
    checked = check_here(env, status=2)
    line = "the tokenizer has no chat template: set --model_type (MODEL_TYPE) to llama2, zephyr, smollm2"
    assert f"FAIL  chat template: {line}" in checked.stdout
    done = start_here(env, status=2)
    assert f"grath.pipeline: error: {line}" in done.stderr
    assert not (tmp_path / "r_seed_0").exists()
    call_here("grath.pipeline", "start", env={**env, "MODEL_TYPE": "llama2"})
    done = evaluate_here(model, tmp_path / "scores", env={"TASKS": "grath_mc1", "LIMIT": "2"})
    assert f"no sample answers: {line}" in done.stderr
    assert (tmp_path / "scores" / "grath_mc1.json").is_file() and not (tmp_path / "scores" / "samples.jsonl").exists()


def test_a_failed_stage_ends_the_loop_with_its_line_and_status(tiny_llama, tmp_path):
    env = {"MODEL_NAME_OR_PATH": str(tiny_llama), "NUM_QUERY": "500", "DATA_PATH": str(BUNDLED), "TASKS": ""}
    done = call("run_llama2.sh", env={**env, "RUNS_DIR": str(tmp_path)}, status=2)
    assert "there are only 160 questions" in done.stderr
    assert " EVAL_PRECISION=" in done.stdout and " on the CPU (DEVICE=cpu)" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("run_grath.sh: error: iteration 1: M_0 writes pairs failed")
    env = {**env, "NUM_QUERY": "2", "MAX_LENGTH": "2", "RUNS_DIR": str(tmp_path)}
    done = call("run_llama2.sh", env={**env, "PAIRS_PRECISION": "fp32"}, status=2)
    assert "no pair is left to train on" in done.stderr
    assert "Traceback" not in done.stderr
