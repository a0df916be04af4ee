"""The loop and its presets: the commands that they mean, and whole runs on a tiny model."""

import json
import re

import pytest
from conftest import BUNDLED, CORRECT, HUB, PROJECT, call, needs_hub, rows

PRESETS = {
    "run_llama2.sh": ("meta-llama/Llama-2-7b-chat-hf", "llama2", "rolling", 2, 1000, 1119),
    "run_llama2_fix_ref.sh": ("meta-llama/Llama-2-7b-chat-hf", "llama2", "fixed", 10, 1000, 1119),
    "run_zephyr.sh": ("HuggingFaceH4/zephyr-7b-beta", "zephyr", "rolling", 2, 500, 1119),
    "run_zephyr_fix_ref.sh": ("HuggingFaceH4/zephyr-7b-beta", "zephyr", "fixed", 10, 1000, 1119),
    "run_smollm2.sh": (str(PROJECT / "models" / "smollm2"), "smollm2", "rolling", 2, 10, 160),
    "run_smollm2_fix_ref.sh": (str(PROJECT / "models" / "smollm2"), "smollm2", "fixed", 4, 10, 160),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_dry_run_prints_every_command_and_runs_none(preset, tmp_path):
    model, model_type, reference, count, steps, questions = PRESETS[preset]
    done = call(preset, env={"DRY_RUN": "1", "RUNS_DIR": str(tmp_path / "runs")})
    assert not (tmp_path / "runs").exists()
    lines = done.stdout.splitlines()
    asks = [line for line in lines if "create_pair_responses.py" in line]
    splices = [line for line in lines if "combine_new_correct_ori_wrong.py" in line]
    trainings = [line for line in lines if re.match(r"accelerate launch .*dpo\.py", line)]
    scores = [line for line in lines if "evaluation.sh" in line]
    assert (len(asks), len(splices), len(trainings), len(scores)) == (count, count - 1, count, count + 1)
    assert f"--model_name_or_path {model} " in asks[0]
    assert f"--model_name_or_path {model} " in trainings[0]
    for i, line in enumerate(trainings):
        assert f"--reference {reference} " in line
        assert f"--max_steps {steps} " in line
        assert f"--model_type {model_type} " in line
        combined = "_combined" if i else ""
        assert f"data/iter{i}_arcc_num_{questions}_useGT_False_useFS_True{combined}.json" in line
        assert f"--output_dir {tmp_path}/runs/" in line
        assert f"models/iter_{i + 1}_arcc_num_{questions}_useGT_False_useFS_True " in line
        if i:
            assert f"models/iter_{i}_arcc" in line.split("--model_name_or_path")[1].split()[0]
    first = f"data/iter0_arcc_num_{questions}_useGT_False_useFS_True.json"
    assert all(first in line.split("--ori_data_path")[1] for line in splices)
    if "smollm2" not in preset:
        assert all("--learning_rate 5e-4" in line and "--warmup_steps 100 " in line for line in trainings)


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
    assert lines[-1] == f"The run's folder: {run}"
    assert [line.split()[0] for line in lines if line.startswith("M_")] == ["M_0", "M_1", "M_0", "M_1", "M_2"]
    assert "were not passed to `accelerate launch`" not in done.stderr


def test_the_same_command_does_nothing_twice(llama_run):
    run, settings, _ = llama_run
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    done = call("run_llama2.sh", env=settings)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before
    assert done.stdout.count("is there") == 5 + 3 * 3


def test_other_settings_do_not_mix_into_a_run(llama_run):
    _, settings, _ = llama_run
    done = call("run_llama2.sh", env={**settings, "MAX_STEPS": "3"}, status=2)
    assert "holds a run with other settings (MAX_STEPS=2): set another RUN_NAME" in done.stderr
    done = call("run_llama2.sh", env={**settings, "LIMIT": "2"}, status=2)
    assert "results/iter_0 holds scores of" in done.stderr
    assert "limit=3 backend=hf-shared chat_template=0: choose another folder" in done.stderr


def test_evaluation_scores_what_is_left_of_the_newest_run(llama_run):
    run, settings, _ = llama_run
    (run / "results" / "iter_1" / "grath_mc2.json").unlink()
    kept = (run / "results" / "iter_1" / "grath_mc1.json").stat().st_mtime_ns
    done = call("evaluation.sh", env={name: settings[name] for name in ("TASKS", "LIMIT", "RUNS_DIR")})
    assert f"newest run: {run}, 1 round(s) without scores" in done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("M_")] == ["M_0", "M_1", "M_2"]
    assert (run / "results" / "iter_1" / "grath_mc2.json").is_file()
    assert (run / "results" / "iter_1" / "grath_mc1.json").stat().st_mtime_ns == kept


def test_a_failed_stage_ends_the_loop_with_its_line_and_status(tiny_llama, tmp_path):
    env = {"MODEL_NAME_OR_PATH": str(tiny_llama), "NUM_QUERY": "500", "DATA_PATH": str(BUNDLED), "TASKS": ""}
    done = call("run_llama2.sh", env={**env, "RUNS_DIR": str(tmp_path)}, status=2)
    assert "there are only 160 questions" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("run_grath.sh: error: round 1: M_0 writes pairs failed")
    env = {**env, "NUM_QUERY": "2", "LEARNING_RATE": "fast", "RUNS_DIR": str(tmp_path)}
    done = call("run_llama2.sh", env={**env, "PAIRS_PRECISION": "fp32"}, status=2)
    assert "invalid float value: 'fast'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("ROUNDS", "0", "ROUNDS must be a whole number of at least 1, not '0'"),
        ("SEED", "x", "SEED must be a whole number, not 'x'"),
        ("REFERENCE", "base", "REFERENCE must be rolling or fixed, not 'base'"),
        ("RUN_NAME", "../x", "RUN_NAME must be a plain name"),
        ("USE_FS", "true", "USE_FS must be 0 or 1, not 'true'"),
    ],
)
def test_bad_settings(name, value, line, tmp_path):
    done = call("run_llama2.sh", env={name: value, "RUNS_DIR": str(tmp_path / "runs")}, status=2)
    assert done.stderr.startswith(f"run_grath.sh: error: {line}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@needs_hub
def test_leaderboard_tasks_on_real_data(tiny_llama, tmp_path):
    env = {"TASKS": "arc_challenge truthfulqa_mc1 truthfulqa_mc2", "LIMIT": "3"}
    env["DATASETS_ROOT"] = str(HUB)
    done = call("evaluation.sh", tiny_llama, tmp_path / "scores", cwd=tmp_path, env=env)
    arc = json.loads((tmp_path / "scores" / "arc_challenge.json").read_text())
    assert arc["n-shot"]["arc_challenge"] == 25
    for task in ("truthfulqa_mc1", "truthfulqa_mc2"):
        assert set(json.loads((tmp_path / "scores" / f"{task}.json").read_text())["results"]) == {task}
    assert "truthfulqa_mc2 3.0" in done.stdout
    header = next(line for line in done.stdout.splitlines() if line.startswith("model"))
    assert header.split() == ["model", "MC1", "MC2", "ARC"]


@pytest.mark.slow
def test_the_demo_on_smollm2_with_reduced_sizes(tmp_path):
    env = {
        "NUM_QUERY": "6",
        "MAX_STEPS": "1",
        "WARMUP_STEPS": "0",
        "ROUNDS": "1",
        "LIMIT": "2",
        "RUNS_DIR": str(tmp_path),
    }
    done = call("run_smollm2.sh", env=env)
    table = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("M_")]
    assert table == ["M_0", "M_1"]
    record = json.loads(next((tmp_path / "smollm2_seed_0" / "models").glob("iter_1*/grath.json")).read_text())
    assert record["settings"]["precision"] in ("bf16", "fp4")


@needs_hub
def test_smollm2_on_arc_by_its_hub_name(tmp_path):
    """With DATA_NAME set, the SmolLM2 preset asks that set's questions, and the scripts are found from any folder."""
    env = {"DATA_NAME": "allenai/ai2_arc", "NUM_QUERY": "200", "RUNS_DIR": str(tmp_path), "DRY_RUN": "1"}
    done = call("run_smollm2.sh", env={**env, "DATASETS_ROOT": str(HUB)}, cwd=tmp_path)
    ask = next(line for line in done.stdout.splitlines() if "create_pair_responses.py" in line)
    assert f"{PROJECT}/create_pair_responses.py" in ask
    assert "--data_name allenai/ai2_arc --subdata_name ARC-Challenge --split train" in ask
    assert "--data_path" not in ask
