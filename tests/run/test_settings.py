"""The schema of settings, and what is derived from it."""

import re

import pytest
from support import PROJECT, call, patch_gpus

from grath.common.errors import UserError
from grath.run.settings import SETTINGS, check_start, configuration_page, read_settings

REQUIRED = {"MODEL_NAME_OR_PATH": "a/b", "NUM_QUERY": "7"}


def read(**changes):
    return read_settings({**REQUIRED, **changes})


def test_another_project_than_this_one_is_refused(tmp_path):
    done = call("python", "-m", "grath.run", "settings", tmp_path, env=REQUIRED, status=2)
    assert f"python has the project in {PROJECT}: run `pip install -e . -c constraints.txt` here first" in done.stderr
    assert done.stdout == ""


def test_an_empty_value_is_the_default_except_for_tasks():
    values = read(BETA="", TASKS="", MODEL_TYPE="")
    assert (values["BETA"], values["MODEL_TYPE"], values["TASKS"]) == ("0.1", "auto", "")
    assert read()["TASKS"].split()[0] == "arc_challenge"
    assert read(TASKS=" a\n b ")["TASKS"] == "a b"


def test_the_papers_values_are_the_defaults():
    """Where the paper's value is one number, it is the default, except for batch sizes, which change no result."""
    others = {"PAIRS_BATCH_SIZE", "DPO_BATCH_SIZE", "EVAL_BATCH_SIZE", "NUM_QUERY", "GRADIENT_ACCUMULATION_STEPS"}
    papers = {s.name: float(s.paper) for s in SETTINGS.values() if re.fullmatch(r"[\d.e-]+", s.paper)}
    assert len(papers) > 10
    assert {name for name in papers.keys() - others if float(SETTINGS[name].default) != papers[name]} == set()


def test_a_missing_folder_of_data_sets_is_refused(monkeypatch):
    monkeypatch.setattr("grath.common.layout.DATASETS_ROOT", "nowhere")
    with pytest.raises(UserError, match="DATASETS_ROOT: there is no folder 'nowhere'"):
        read()


def test_the_page_is_generated():
    assert (PROJECT / "docs" / "configuration.md").read_text(encoding="utf-8") == configuration_page()


def test_auto_is_what_it_means_on_this_machine(monkeypatch):
    names = ("PAIRS_PRECISION", "DPO_PRECISION", "EVAL_PRECISION")
    for gpu, precisions in ((False, ("bf16", "bf16", "fp32")), (True, ("int8", "fp4", "fp16"))):
        patch_gpus(monkeypatch, int(gpu))
        values = check_start(read())
        assert tuple(values[name] for name in names) == precisions and values["MACHINE"] == "the CPU (DEVICE=cpu)"


def test_a_tracker_that_is_not_there_is_refused_at_the_start():
    with pytest.raises(UserError, match="there is no tracker nobody"):
        check_start(read(REPORT_TO="nobody"))


@pytest.mark.parametrize("content", ["num_processes: [", "[1, 2]", "42", "", "processes: 2", "\x00", "a: !!python/x y"])
def test_a_file_that_accelerate_cannot_read_is_refused_at_the_start(content, tmp_path):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match="config.yaml is not for accelerate launch: ."):
        check_start(read(ACCELERATE_CONFIG=str(tmp_path / "config.yaml")))


def test_our_own_configurations_of_accelerate_are_taken(monkeypatch):
    monkeypatch.setattr("accelerate.utils.is_deepspeed_available", lambda: False)
    with pytest.raises(UserError, match="needs the package deepspeed, which is not installed"):
        check_start(read(ACCELERATE_CONFIG=str(PROJECT / "accelerate_configs" / "deepspeed_zero2.yaml")))
    monkeypatch.setattr("accelerate.utils.is_deepspeed_available", lambda: True)
    for file in (PROJECT / "accelerate_configs").glob("*.yaml"):
        assert check_start(read(ACCELERATE_CONFIG=str(file)))


def test_servers_decide_the_precision_of_what_they_do():
    given = {"PAIRS_PRECISION": "bf16", "EVAL_PRECISION": "bf16"}
    assert read(**given)["BACKEND"] == "hf-shared"
    there = read(**given, SERVER_URL="http://a:1 http://b:2")
    assert (there["BACKEND"], there["PAIRS_PRECISION"], there["EVAL_PRECISION"]) == ("server", "auto", "auto")
    pairs_only = read(**given, SERVER_URL="http://a:1", BACKEND="hf")
    assert (pairs_only["PAIRS_PRECISION"], pairs_only["EVAL_PRECISION"]) == ("auto", "bf16")
    with pytest.raises(UserError, match="is not a server's address"):
        read(SERVER_URL="host:8000")


def test_a_run_of_other_questions_is_refused_by_its_models_too(tmp_path):
    (tmp_path / "grath_seed_0" / "models" / "iter_1_arcc_num_6_useGT_False_useFS_True").mkdir(parents=True)
    with pytest.raises(UserError, match="iter_1_.*has another NUM_QUERY, USE_GT or USE_FS"):
        check_start(read(RUNS_DIR=str(tmp_path)))


def test_what_a_fresh_start_would_move_is_refused(tmp_path):
    old = tmp_path / "grath_seed_0" / "models"
    old.mkdir(parents=True)
    for name in ("MODEL_NAME_OR_PATH", "DATA_PATH", "DEMOS"):
        (old / name).touch()
        values = read(RUNS_DIR=str(tmp_path), **{name: str(old / name)})
        assert name == "MODEL_NAME_OR_PATH" or check_start(values)
        with pytest.raises(UserError, match=f"{name}: FRESH=1 would move {old / name}: set another RUN_NAME"):
            check_start(values | {"FRESH": "1"})


def test_the_home_folder_is_expanded_in_the_folder_of_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read(RUNS_DIR="~/runs")["RUNS_DIR"] == f"{tmp_path}/runs"
