"""Stage 4 at the command line: result files, their record, and what a second start does."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import HUB, PROJECT, call, call_here, change_weights, put_program, rows, score_values, script_env, wait_for

from grath.common.errors import UserError
from grath.evaluation.results import check_numbers, read_scores
from grath.modeling.chat import TEMPLATES

MC = ("--tasks", "grath_mc1", "grath_mc2", "--limit", 3)


def score(model, folder, *flags, status=0, **options):
    return call_here("grath.evaluation", model, folder, *flags, status=status, **options)


def content(folder):
    """The files of a folder: name -> content."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()} if Path(folder).is_dir() else {}


def record_of(folder):
    return json.loads((folder / "settings.json").read_text())


@pytest.fixture
def scored(scored_once, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(scored_once, tmp_path / "scores")


def test_a_finished_command_answers_in_one_line_without_torch(scored, tiny_llama):
    before = content(scored)
    command = (sys.executable, "-X", "importtime", "-m", "grath.evaluation", tiny_llama, scored, *MC, "--samples")
    done = call(*command)
    assert done.stdout == f"{scored} is up to date (grath_mc1 grath_mc2); next: python -m grath.report {scored}\n"
    assert not re.findall(r"\| +(torch|transformers|lm_eval)$", done.stderr, re.MULTILINE)
    assert content(scored) == before
    record = record_of(scored)
    assert record["model"] == str(tiny_llama) and record["starts"] == 1 and record["seconds"] > 0
    assert record["batch_tokens"] == 4096 and record["versions"]["lm-eval"] == record["inputs"]["lm_eval"]
    samples = {"samples.jsonl", "samples_grath_mc1.jsonl", "samples_grath_mc2.jsonl"}
    assert set(record["files"]) == set(before) - {"settings.json"} == {"grath_mc1.json", "grath_mc2.json", *samples}
    assert len(rows(scored / "samples_grath_mc1.jsonl")) == 3
    assert [set(row) for row in rows(scored / "samples.jsonl")] == [{"question", "answer"}] * 5


def test_other_settings_are_refused(scored, tiny_llama, tmp_path):
    """For a copy of the model they are not; for edited weights they are, also if a score is missing."""
    copy = shutil.copytree(tiny_llama, tmp_path / "copy", copy_function=shutil.copy)
    assert "is up to date" in score(copy, scored, *MC).stdout
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    for missing in ("", "grath_mc1.json"):
        (scored / missing).unlink() if missing else None
        before = content(scored)
        for model, flags, said in (
            (tiny_llama, ("--limit", 2), "limit 3, not 2"),
            (tiny_llama, ("--precision", "bf16"), "precision fp32, not bf16"),
            (tiny_llama, ("--backend", "hf"), "backend hf-shared, not hf"),
            (tiny_llama, ("--chat_template",), "chat_template false, not auto"),
            (copy, (), "model base model.safetensors "),
        ):
            done = score(model, scored, *MC, *flags, status=2)
            assert f"{scored} was made with {said}" in done.stderr and done.stderr.count("\n") == 1
            assert done.stderr.endswith(": choose another folder, or remove it\n")
        assert content(scored) == before


def test_an_edited_result_is_refused_and_one_that_is_missing_or_not_recorded_is_made_again(
    scored, scored_once, tiny_llama
):
    """Results of the harness itself have no record: they are only read."""
    result, record = scored / "grath_mc1.json", record_of(scored)
    result.write_text(result.read_text().replace("0.", "0.1", 1))
    before = content(scored)
    assert f"{result} is not the file that was written" in score(tiny_llama, scored, *MC, status=2).stderr
    with pytest.raises(UserError, match=r"grath_mc1\.json is not the file that was written"):
        read_scores(scored)
    assert content(scored) == before
    del record["files"]["grath_mc1.json"]  # as after a kill between the two files
    (scored / "settings.json").write_text(json.dumps(record))
    assert score_values(scored).keys() == {"grath_mc2"}
    done = score(tiny_llama, scored, *MC)
    assert f"{scored / 'grath_mc2'}.json is up to date" in done.stdout and "grath_mc1, 0-shot, fp32" in done.stdout
    assert score_values(scored) == score_values(scored_once) and record_of(scored)["starts"] == 2
    result.unlink()
    for name in ("samples.jsonl", "samples_grath_mc2.jsonl"):
        (scored / name).unlink()
    done = score(tiny_llama, scored, *MC, "--samples", "--log_samples")
    assert content(scored).keys() == content(scored_once).keys()
    expected = read_scores(scored_once)["grath_mc2"]
    error = f"{expected['score']:6.2f} ± {expected['stderr']:.2f}"
    assert f"grath_mc2       {error} (version {expected['version']})\n" in done.stdout
    assert done.stdout.endswith(f"Wrote the results to {scored}; next: python -m grath.report {scored}\n")
    (scored / "settings.json").unlink()
    before = content(scored)
    assert score_values(scored) == score_values(scored_once)
    assert "grath_mc1.json has no settings.json next to it" in score(tiny_llama, scored, *MC, status=2).stderr
    assert content(scored) == before


@pytest.mark.slow
def test_two_processes_share_the_questions(hub, tiny_llama, tmp_path, monkeypatch):
    """Each scores its own. The few-shot examples are those of one process, and so are the scores."""
    env = {"DATASETS_ROOT": str(hub), "TASKS": "grath_mc2 arc_challenge", "LIMIT": "3", "NUM_PROCESSES": "2"}
    monkeypatch.setattr("grath.common.layout.DATASETS_ROOT", str(hub))
    done = call("evaluation.sh", tiny_llama, tmp_path / "two", "--log_samples", env=env)
    alone = score(tiny_llama, tmp_path / "one", "--tasks", *env["TASKS"].split(), "--limit", 3, "--log_samples")
    # The first process shows its tokens: those of the first and the third of three questions.
    shown = (re.findall(r"Scoring: 100%.* ([\d.]+)(k?)/\1\2 ", run.stderr) for run in (done, alone))
    own, whole = ([float(number) * (1000 if kilo else 1) for number, kilo in bars] for bars in shown)
    assert len(own) == len(whole) == 2
    assert all(0.4 < part / of_all < 0.9 for part, of_all in zip(own, whole, strict=True))
    two, one = (rows(tmp_path / name / "samples_arc_challenge.jsonl") for name in ("two", "one"))
    assert [row["arguments"] for row in two] == [row["arguments"] for row in one]
    assert len({row["arguments"][0][0].rpartition("Question:")[0] for row in one}) == 3
    assert score_values(tmp_path / "two") == pytest.approx(score_values(tmp_path / "one"), abs=1e-3)


def test_all_tasks_of_the_leaderboard_offline(hub, tiny_llama, tmp_path):
    """Killed after the first, it resumes with the next. With the real ARC and TruthfulQA where available."""
    root, folder = tmp_path / "root", tmp_path / "scores"
    root.mkdir()
    for name in ("Rowan", "cais", "allenai", "truthfulqa"):
        (root / name).symlink_to((HUB if (HUB / name).is_dir() else hub) / name)
    env = {"LIMIT": "1", "DATASETS_ROOT": str(root)}
    command = [PROJECT / "evaluation.sh", tiny_llama, folder, "--log_samples"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, start_new_session=True, cwd=tmp_path, env=script_env(env), **quiet) as process:
        wait_for(lambda: (folder / "settings.json").exists() and record_of(folder)["files"], process)
        os.killpg(process.pid, signal.SIGKILL)
    assert content(folder).keys() & {"mmlu.json", "samples.jsonl"} == set()
    done = call(*command, env=env, cwd=tmp_path)
    assert "truthfulqa_mc1 truthfulqa_mc2, 0-shot" in done.stdout
    assert f"{folder / 'arc_challenge'}.json is up to date" in done.stdout and record_of(folder)["starts"] == 2
    shots = {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc1": 0, "truthfulqa_mc2": 0}
    for task, number in shots.items():
        result = json.loads((folder / f"{task}.json").read_text())
        assert result["n-shot"]["mmlu_anatomy" if task == "mmlu" else task] == number
        assert len(result["results"]) > 57 if task == "mmlu" else list(result["results"]) == [task]
        assert len(result["questions"]["scores"]) == (57 if task == "mmlu" else 1)
    assert len(rows(folder / "samples_mmlu.jsonl")) == 57 and len(rows(folder / "samples_hellaswag.jsonl")) == 1
    assert set(record_of(folder)["inputs"]["data"]) == {
        "Rowan/hellaswag", "allenai/ai2_arc", "cais/mmlu", "truthfulqa/truthful_qa"
    }  # fmt: skip


def test_log_likelihoods_that_are_no_numbers_are_no_score(model, tmp_path):
    """The harness would count the first choice of every question, the right one: MC1 100."""
    change_weights(model, lambda weights: weights | {"model.norm.weight": weights["model.norm.weight"] * torch.nan})
    done = score(model, tmp_path / "s", *MC, status=2)
    assert "computes NaN instead of log-likelihoods" in done.stderr and not score_values(tmp_path / "s")


def test_other_metrics_may_be_no_numbers():
    """Some tasks of the harness give NaN for the questions that a metric does not apply to."""
    row = {"filtered_resps": [(-1.5, False), (-2.0, False)], "acc": 1.0, "bias": (1, torch.nan)}
    check_numbers({"a": [row], "text": [{"filtered_resps": ["yes"], "exact_match": 1.0}]})
    with pytest.raises(UserError, match="a: the model computes NaN"):
        check_numbers({"a": [row | {"acc": torch.nan}]})


def test_the_chat_template_is_that_of_the_model_type(tiny_llama, tmp_path):
    flags = ("--tasks", "grath_mc1", "--limit", 2, "--chat_template", "--model_type")
    assert "hf-shared, chat template" in score(tiny_llama, tmp_path / "s", *flags, "zephyr").stdout
    assert json.loads((tmp_path / "s" / "grath_mc1.json").read_text())["chat_template"] == TEMPLATES["zephyr"]
    done = score(tiny_llama, tmp_path / "s", *flags, "auto", status=2)
    assert "chat_template zephyr, not auto: choose another folder" in done.stderr
    bare = shutil.copytree(tiny_llama, tmp_path / "bare", ignore=shutil.ignore_patterns("chat_template.jinja"))
    done = score(bare, tmp_path / "bare scores", *flags, "auto", "--dry_run", status=2)
    assert "the tokenizer has no chat template" in done.stderr
    assert not (tmp_path / "bare scores").exists()


def test_processes_share_the_processors(tiny_llama, tmp_path):
    """What evaluation.sh launches, after its check in one process of a `python` that does nothing."""
    put_program(tmp_path / "python", "#!/bin/sh\n")
    env = {"NUM_PROCESSES": "2", "DRY_RUN": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    launch = ["accelerate", "launch", "--quiet", "--config_file", f"{PROJECT}/accelerate_configs/data_parallel.yaml"]
    for threads, share in (("6", "3"), ("1", "1")):
        done = call("evaluation.sh", "m", env={**env, "OMP_NUM_THREADS": threads})
        launch[5:] = ["--num_processes", "2", "--num_cpu_threads_per_process", share]
        assert shlex.split(done.stdout)[:12] == [*launch, "-m", "grath.evaluation", "m"]
    assert call("evaluation.sh", "m", env=env | {"NUM_PROCESSES": "1"}).stdout.startswith(
        "python -m grath.evaluation m"
    )
    assert "--dry_run" not in done.stdout
    server = ("--tasks", "grath_mc1", "--server_url", "http://127.0.0.1:9")
    done = score(tiny_llama, tmp_path / "s", *server, env={"WORLD_SIZE": "2"}, status=2)
    assert "set NUM_PROCESSES=1" in done.stderr and not (tmp_path / "s").exists()


def test_the_scripts_use_their_own_project(tiny_llama, tmp_path):
    """Where the caller's folder has another one, and where the project is a link."""
    (tmp_path / "grath").mkdir()
    (tmp_path / "grath" / "__init__.py").write_text("raise SystemExit('another project')")
    env = {"TASKS": "grath_mc1", "DRY_RUN": "1", "RUNS_DIR": str(tmp_path)}
    assert "grath_mc1, 0-shot" in call("evaluation.sh", tiny_llama, tmp_path / "s", env=env, cwd=tmp_path).stdout
    (tmp_path / "link").symlink_to(PROJECT)
    done = call("bash", tmp_path / "link" / "run_smollm2.sh", env=env | {"CDPATH": str(tmp_path)})
    assert f"--model_name_or_path {PROJECT}/models/smollm2 " in done.stdout


def test_prefetch_names_what_it_fetches(tmp_path):
    log = tmp_path / "log"
    put_program(tmp_path / "hf", f'#!/bin/sh\nprintf "%s\\n" "$*" >>"{log}"\n')
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    folder = tmp_path / "the hub"
    assert "DRY_RUN must be 0 or 1" in call("prefetch.sh", folder, env=env | {"DRY_RUN": "true"}, status=2).stderr
    call("prefetch.sh", folder, "me/model", env=env)
    fetched = log.read_text().splitlines()
    assert len(fetched) == 5
    assert fetched[0] == f"download allenai/ai2_arc --repo-type dataset --local-dir {folder}/allenai/ai2_arc"
    assert fetched[4].startswith(f"download me/model --repo-type model --local-dir {folder}/me/model --include")
    assert call("prefetch.sh", status=2).stderr.startswith("prefetch.sh: error: name a folder")
