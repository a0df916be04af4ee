"""The schema of settings, and what is derived from it."""

import re
import subprocess

import pytest
from support import PROJECT, call

from grath.common.errors import UserError
from grath.pipeline.configuration import configuration_page
from grath.pipeline.settings import EVERY_STAGE, SETTINGS, normalize_settings, read_settings
from grath.pipeline.shell import shell_lines

REQUIRED = {"MODEL_NAME_OR_PATH": "a/b", "NUM_QUERY": "7"}


def test_a_shell_gets_every_value_as_it_is():
    value = "a 'b' \"c\" $(touch pwned) `touch pwned` \\ * ;\nend"
    values = read_settings(environment={**REQUIRED, "MODEL_NAME_OR_PATH": value, "RUN_NAME": "r", "USE_FS": "0"})
    script = f'{shell_lines(values)}printf "%s|" "$MODEL_NAME_OR_PATH" "$RUN" "$SUFFIX" "$ITERATIONS"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == f"{value}|runs/r_seed_0|arcc_num_7_useGT_False_useFS_False|2|"


def test_the_command_prints_the_lines_and_refuses_with_one_line():
    done = call("python", "-m", "grath.pipeline", "settings", env={**REQUIRED, "MAX_STEPS": "12"})
    assert "export MAX_STEPS=12\n" in done.stdout and "export NUM_QUERY=7\n" in done.stdout
    done = call("python", "-m", "grath.pipeline", "settings", env={**REQUIRED, "MAX_STEPS": "many"}, status=2)
    assert done.stdout == ""
    assert done.stderr == "grath.pipeline: error: MAX_STEPS must be a whole number of at least 1, not 'many'\n"


def test_an_empty_value_is_the_default_except_for_tasks():
    values = read_settings(environment={**REQUIRED, "BETA": "", "TASKS": "", "MODEL_TYPE": ""})
    assert (values["BETA"], values["MODEL_TYPE"], values["TASKS"]) == ("0.1", "auto", "")
    assert read_settings(environment=REQUIRED)["TASKS"].split()[0] == "arc_challenge"
    assert read_settings(environment={**REQUIRED, "TASKS": " a\n b "})["TASKS"] == "a b"


def test_a_path_does_not_look_like_an_option():
    values = read_settings(environment={**REQUIRED, "RUNS_DIR": "-x", "DATA_PATH": "--y"})
    assert (values["RUNS_DIR"], values["DATA_PATH"]) == ("./-x", "./--y")


def test_every_default_is_valid_and_every_setting_has_its_help():
    for setting in SETTINGS.values():
        assert setting.name in REQUIRED or setting.check(setting.default) is None
        assert setting.help and setting.stage in (None, EVERY_STAGE, "pairs", "dpo", "scores")


def test_the_papers_values_are_the_defaults():
    """Where the paper's value is one number, it is the default, except for batch sizes, which change no result."""
    others = {"PAIRS_BATCH_SIZE", "DPO_BATCH_SIZE", "EVAL_BATCH_SIZE", "NUM_QUERY", "GRADIENT_ACCUMULATION_STEPS"}
    papers = {s.name: s.paper for s in SETTINGS.values() if re.fullmatch(r"[\d.e-]+", s.paper)}
    assert len(papers) > 10
    assert {
        name: value for name, value in papers.items() if SETTINGS[name].default != value and name not in others
    } == {}


@pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if setting.stage is None])
def test_what_changes_no_output_is_not_compared(name):
    assert name not in normalize_settings(read_settings(environment=REQUIRED))


def test_a_missing_folder_of_data_sets_is_refused(monkeypatch):
    monkeypatch.setattr("grath.pipeline.settings.DATASETS_ROOT", "nowhere")
    with pytest.raises(UserError, match="DATASETS_ROOT: there is no folder 'nowhere'"):
        read_settings(environment=REQUIRED)


def test_the_page_is_generated():
    assert (PROJECT / "docs" / "configuration.md").read_text(encoding="utf-8") == configuration_page()


def test_the_shell_uses_no_setting_that_has_no_entry():
    scripts = [PROJECT / "run_grath.sh", *PROJECT.glob("run_*.sh")]
    used = {
        name for path in scripts for name in re.findall(r"\$\{?([A-Z][A-Z_]{3,})", path.read_text(encoding="utf-8"))
    }
    derived = {
        "HERE",
        "PATH",
        "PPID",
        "BASH_SOURCE",
        "VIRTUAL_ENV",
        "GRATH_LOOP",
        "SLURM_SUBMIT_DIR",
        "SUFFIX",
        "THREADS",
    }
    assert used - derived - set(SETTINGS) == set()
    assert {"ITERATIONS", "MAX_STEPS", "DATA_PATH"} <= used


def test_the_old_name_of_iterations_is_refused():
    with pytest.raises(UserError, match="ROUNDS is called ITERATIONS now"):
        read_settings(environment={**REQUIRED, "ROUNDS": "10"})


@pytest.mark.parametrize(("threads", "processes", "expected"), [("8", "2", "4"), ("6,2", "1", "6"), ("1", "4", "1")])
def test_threads_of_a_training(threads, processes, expected, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    values = read_settings(environment={**REQUIRED, "NUM_PROCESSES": processes})
    assert f"export THREADS={expected}\n" in shell_lines(values)
