"""Every command line: quick help, and one line for bad input."""

import json
import time

import pytest
from conftest import BUNDLED, PROJECT, call, call_here, pair, write_rows

CREATE = ["create_pair_responses.py", "--save_prefix", "x", "--save_dir", "OUT", "--data_path", BUNDLED]
COMBINE = ["combine_new_correct_ori_wrong.py", "--new_data_path", "PAIRS", "--ori_data_path"]
DPO = ["dpo.py", "--output_dir", "OUT", "--model_name_or_path"]


@pytest.mark.parametrize(
    ("script", "seconds"),
    [("create_pair_responses.py", 1), ("combine_new_correct_ori_wrong.py", 1), ("dpo.py", 8)],
)
def test_help_is_quick_and_shows_defaults(script, seconds):
    times = []
    for _ in range(3):  # the best of three, since the machine is shared
        start = time.monotonic()
        done = call(script, "--help")
        times.append(time.monotonic() - start)
        if times[-1] < seconds:
            break
    assert min(times) < seconds
    if script != "combine_new_correct_ori_wrong.py":
        assert "(default: " in done.stdout


@pytest.fixture
def files(tmp_path):
    """Names that stand for files in the table below."""
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "text.json").write_text("no JSON at all\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base"}))
    one_choice = {"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}
    wrong_key = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "C"}
    return {
        "OUT": tmp_path / "out",
        "PAIRS": write_rows(tmp_path / "pairs.json", [pair("a", "b", "c")]),
        "EMPTY": tmp_path / "empty.json",
        "TEXT": tmp_path / "text.json",
        "SCHEMA": write_rows(tmp_path / "schema.json", [{"question": "a", "correct": "b"}]),
        "ONE": write_rows(tmp_path / "one.jsonl", [one_choice]),
        "KEY": write_rows(tmp_path / "key.jsonl", [wrong_key]),
        "FOLDER": tmp_path / "folder",
        "ADAPTER": tmp_path / "adapter",
        "MISSING": tmp_path / "missing.json",
    }


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ([*CREATE, "--model_name_or_path", "FOLDER", "--nonsense"], "unrecognized arguments: --nonsense"),
        ([*CREATE], "the following arguments are required: --model_name_or_path"),
        ([*CREATE, "--model_name", "m"], "the following arguments are required: --model_name_or_path"),
        ([*CREATE, "--model_name_or_path", "FOLDER"], "is a folder without a tokenizer (no config.json)"),
        ([*CREATE, "--model_name_or_path", "ADAPTER"], "the adapter is not complete"),
        ([*CREATE, "--model_name_or_path", "nobody/nothing"], "cannot load the tokenizer nobody/nothing"),
        ([*CREATE, "--model_name_or_path", "m", "--num_query", "0"], "--num_query: must be at least 1, not 0"),
        ([*CREATE, "--model_name_or_path", "m", "--num_query", "9999"], "there are only 160 questions"),
        ([*CREATE, "--model_name_or_path", "m", "--save_prefix", "a/b"], "must be a plain file name"),
        ([*CREATE, "--model_name_or_path", "m", "--data_path", "MISSING"], "missing.json does not exist"),
        ([*CREATE, "--model_name_or_path", "m", "--data_path", "EMPTY"], "is empty"),
        ([*CREATE, "--model_name_or_path", "m", "--data_path", "TEXT"], "line 1: not JSON"),
        ([*CREATE, "--model_name_or_path", "m", "--data_path", "SCHEMA"], "not in ARC's schema"),
        ([*CREATE, "--model_name_or_path", "m", "--data_path", "ONE"], "has one choice only"),
        ([*CREATE, "--model_name_or_path", "m", "--data_path", "KEY"], "the answer key 'C' is none of its labels"),
        ([*CREATE, "--model_name_or_path", "m", "--useFS", "--demos", "none"], "neither a known set"),
        ([*CREATE, "--model_name_or_path", "m", "--save_dir", "PAIRS"], "is a file, not a folder"),
        ([*COMBINE, "MISSING"], "missing.json does not exist"),
        ([*COMBINE, "SCHEMA"], "row 1: 'incorrect' must be a string that is not empty"),
        ([*COMBINE, "FOLDER"], "is a folder, not a file"),
        ([*DPO, "FOLDER"], "give either --dataset_path (a pair file) or --dataset_name"),
        ([*DPO, "FOLDER", "--dataset_path", "PAIRS"], "is a folder without a tokenizer (no config.json)"),
        ([*DPO, "m", "--dataset_path", "PAIRS", "--reference", "none"], "invalid choice: 'none'"),
        ([*DPO, "m", "--dataset_path", "PAIRS", "--learnin_rate", "1"], "unrecognized arguments: --learnin_rate 1"),
        ([*DPO, "m", "--dataset_path", "PAIRS", "--precision", "int4"], "invalid choice: 'int4'"),
        (
            [*DPO, "FOLDER", "--dataset_path", "PAIRS", "--output_dir", "FOLDER"],
            "is the model that the training starts",
        ),
        (["dpo.py", "--model_name_or_path", "m", "--dataset_path", "PAIRS"], "--output_dir is required"),
    ],
)
def test_bad_input_is_one_line_and_touches_nothing(command, line, files):
    places = (PROJECT / "data", files["FOLDER"].parent)
    before = [sorted(PROJECT.glob("*")), *(sorted(place.rglob("*")) for place in places)]
    in_process = command[0] == "dpo.py" and "--dataset_path" in command
    run = call_here if in_process else call  # dpo.py imports TRL first; one of its rows is a process of its own
    done = run(*(files.get(part, part) for part in command), status=2)
    assert line in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"{command[0]}: error: ")
    assert "Traceback" not in done.stderr
    assert [sorted(PROJECT.glob("*")), *(sorted(place.rglob("*")) for place in places)] == before


@pytest.mark.parametrize("name", ["dataset", "model"])
def test_dpo_names_what_is_wrong_with_its_input(tiny_llama, files, name):
    model, path = (tiny_llama, files["EMPTY"]) if name == "dataset" else (files["FOLDER"], files["PAIRS"])
    flags = ("--output_dir", files["OUT"], "--model_name_or_path", model, "--dataset_path", path)
    done = call_here("dpo.py", *flags, status=2)
    assert ("is empty" if name == "dataset" else "is a folder without") in done.stderr
    assert not files["OUT"].exists()


@pytest.mark.parametrize(
    ("arguments", "env", "line"),
    [
        ([], {}, "nothing to score below"),
        (["FOLDER"], {}, "is a folder without a model (no config.json)"),
        (["nobody/nothing"], {}, "cannot load the model nobody/nothing"),
        (["--nonsense"], {}, "'--nonsense' is no model"),
        (["a", "b", "c"], {}, "too many arguments"),
        (["FOLDER"], {"TASKS": " "}, "TASKS names no task"),
        (["FOLDER"], {"DRY_RUN": "yes"}, "DRY_RUN must be 0 or 1, not 'yes'"),
        (["FOLDER"], {"PRECISION": "int8"}, "invalid choice: 'int8'"),
    ],
)
def test_evaluation_with_bad_input(arguments, env, line, files):
    folder = files["FOLDER"].parent
    before = sorted(folder.rglob("*"))
    env = {**env, "RUNS_DIR": str(folder)}
    done = call("evaluation.sh", *(files.get(part, part) for part in arguments), cwd=folder, env=env, status=2)
    assert line in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert sorted(folder.rglob("*")) == before
