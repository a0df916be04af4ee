"""Every command line: quick help, and one line for bad input."""

import json
import re
import shutil
import sys

import pytest
import torch
from support import BUNDLED, PROJECT, call, call_here, change_json, pair, save_adapter, write_rows
from torch import distributed

from grath.common.errors import UserError, run_main
from grath.pairs.questions import load_questions
from grath.run.settings import read_settings

ASK = ["create_pair_responses.py", "--save_prefix", "x", "--save_dir", "OUT", "--data_path", BUNDLED]
MODEL = [*ASK, "--model_name_or_path", "MODEL"]
COMBINE = ["combine_new_correct_ori_wrong.py", "--new_data_path"]
DPO = ["dpo.py", "--output_dir", "OUT", "--dataset_path", "PAIRS", "--model_name_or_path"]
TRAIN = [*DPO, "MODEL"]


HEAVY = ["torch", "transformers", "datasets", "peft", "trl.trainer.dpo_trainer", "lm_eval", "sklearn", "matplotlib"]


@pytest.mark.parametrize(
    ("script", "needed"),
    [
        ("create_pair_responses.py", []),
        ("combine_new_correct_ori_wrong.py", []),
        # TRL's own arguments are shown, and TRL's configuration needs these.
        ("dpo.py", ["torch", "transformers", "datasets", "peft"]),
    ],
)
def test_help_loads_little_and_shows_defaults(script, needed):
    done = call(sys.executable, "-X", "importtime", PROJECT / script, "--help", env={"PYTHONPATH": ""})
    loaded = set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE))
    assert "argparse" in loaded
    assert [name for name in HEAVY if name in loaded and name not in needed] == []
    if script != "combine_new_correct_ori_wrong.py":
        assert "(default: " in done.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_llama):
    """Names that stand for files in the tables below: name -> path."""
    folder = tmp_path_factory.mktemp("bad input")
    question = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
    good = json.dumps(question)
    contents = {
        "EMPTY": b"",
        "TEXT": b"no JSON at all\n",
        "UTF16": good.encode("utf-16"),
        "SURROGATE": good.replace('"q"', '"\\ud800"').encode(),
        "SCHEMA": b'{"question": "a", "correct": "b"}\n',
        "BLANK": b'{"question": "a", "correct": " ", "incorrect": "c"}\n',
        "OTHER": b'{"question": "z", "correct": "b", "incorrect": "c"}\n',
        "SAME": b'{"question": "a", "correct": "b", "incorrect": "b"}\n',
        "ONE": json.dumps({**question, "choices": {"text": ["a"], "label": ["A"]}}).encode(),
        "KEY": json.dumps({**question, "answerKey": "C"}).encode(),
        "TWICE": json.dumps({**question, "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "A"]}}).encode(),
        "NO_TEXT": json.dumps({**question, "question": "  "}).encode(),
        "DEMOS": b'[{"question": "q"}]',
    }
    names = {name: folder / f"{name.lower()}.json" for name in contents}
    for name, content in contents.items():
        names[name].write_bytes(content)
    names["PAIRS"] = write_rows(folder / "pairs.json", [pair("a", "b", "c")])
    names["COMBINED"] = write_rows(folder / "pairs_combined.json", [pair("a", "b", "c")])
    names |= {"MISSING": folder / "missing.json", "OUT": folder / "out", "HERE": folder, "MODEL": tiny_llama}
    names |= {"NO_JSON": write_rows(folder / "pairs.txt", [pair("a", "b", "c")]), "FOLDER": folder / "folder"}
    names["FOLDER"].mkdir()
    return names | make_models(folder, tiny_llama)


def make_models(folder, model):
    """Copies of a model that each lack something, and adapters that do not fit it: name -> folder."""

    def copy(name, without=(), **changes):
        path = folder / name
        shutil.copytree(model, path, ignore=shutil.ignore_patterns(*without))
        for file, change in changes.items():
            change_json(path / f"{file}.json", **change)
        return path

    adapter = save_adapter(model, folder / "adapter of another rank", target_modules=["q_proj"])
    change_json(adapter / "adapter_config.json", r=3)
    half = folder / "half an adapter"
    half.mkdir()
    shutil.copy(adapter / "adapter_config.json", half)
    pickled = copy("pickled", without=("model.safetensors",))
    torch.save({}, pickled / "pytorch_model.bin")
    cut = copy("cut")
    (cut / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:1000])
    return {
        "NO_TEMPLATE": copy("no template", without=("chat_template.jinja",)),
        "NO_EOS": copy("no eos", tokenizer_config={"eos_token": None}),
        "OWN_CODE": copy("own code", config={"model_type": "mine", "auto_map": {"AutoConfig": "c.C"}}),
        "PICKLED": pickled,
        "CUT": cut,
        "ADAPTER": adapter,
        "HALF": half,
    }


SCORE = ["grath.evaluation", "--tasks", "grath_mc1", "--limit", "1"]
SCORED = [*SCORE, "MODEL", "OUT"]
# The lines, without the script's name: {NAME} is a path of `files`, and * is what a library says.
# fmt: off
SCRIPTS = [
    ([*MODEL, "--nonsense"], "unrecognized arguments: --nonsense (see --help)"),
    ([*ASK, "--model_name", "m"], "the following arguments are required: --model_name_or_path (see --help)"),
    ([*MODEL, "--num_query", "many"], "argument --num_query: must be a whole number of at least 1, not 'many' (see --help)"),
    ([*MODEL, "--num_query", "9999"], "--num_query 9999: there are only 160 questions"),
    ([*MODEL, "--max_new_tokens", "100000"], "--max_new_tokens 100000: a prompt has * tokens, and both together exceed the model's context window of 4096"),
    ([*MODEL, "--engine", "server"], "--engine server needs --server_url http://host:port, and --server_url needs --engine server"),
    ([*MODEL, "--server_url", "http://x:1"], "--engine server needs --server_url http://host:port, and --server_url needs --engine server"),
    ([*MODEL, "--engine", "server", "--server_url", "http://x:1", "--precision", "fp32"], "--precision: with --engine server, the server decides it"),
    ([*MODEL, "--save_prefix", "a/b"], "--save_prefix 'a/b' must be a plain file name: use --save_dir for the folder"),
    ([*MODEL, "--save_dir", "PAIRS"], "{PAIRS} is a file, not a folder: choose another output folder"),
    ([*MODEL, "--useFS", "--demos", "none"], "--demos none: neither a known set (halueval, misconceptions, truthfulqa) nor a readable file"),
    ([*MODEL, "--useFS", "--demos", "DEMOS"], "--demos {DEMOS}: must be a list of objects with the strings question, candidate_correct, candidate_incorrect, correct, incorrect"),
    ([*MODEL, "--useFS", "--demos", "UTF16"], "--demos {UTF16}: not a JSON file in UTF-8"),
    ([*MODEL, "--data_path", "MISSING"], "the question file {MISSING} cannot be read: No such file or directory"),
    ([*MODEL, "--data_path", "EMPTY"], "the question file {EMPTY} is empty"),
    ([*MODEL, "--data_path", "TEXT"], "the question file {TEXT}, line 1: not JSON (*)"),
    ([*MODEL, "--data_path", "UTF16"], "the question file {UTF16} is not UTF-8 text"),
    ([*MODEL, "--data_path", "SURROGATE"], "the question file {SURROGATE}, line 1: not JSON (*)"),
    ([*MODEL, "--data_path", "SCHEMA"], "{SCHEMA}, row 1: not in the ARC schema (question, choices with text and label, answerKey)"),
    ([*MODEL, "--data_path", "ONE"], "{ONE}, row 1: has only one choice"),
    ([*MODEL, "--data_path", "KEY"], "{KEY}, row 1: answerKey 'C' must be one of the labels ['A', 'B'], and only once"),
    ([*MODEL, "--data_path", "TWICE"], "{TWICE}, row 1: answerKey 'A' must be one of the labels ['A', 'B', 'A'], and only once"),
    ([*MODEL, "--data_path", "NO_TEXT"], "{NO_TEXT}, row 1: not in the ARC schema (question, choices with text and label, answerKey)"),
    ([*ASK, "--model_name_or_path", "FOLDER"], "{FOLDER} is a folder without a tokenizer (no tokenizer_config.json)"),
    ([*ASK, "--model_name_or_path", "nobody/nothing"], "cannot load the model nobody/nothing: *"),
    ([*ASK, "--model_name_or_path", "HALF"], "{HALF} has no adapter_model.safetensors: the adapter is incomplete, or pickled, which is never loaded"),
    ([*ASK, "--model_name_or_path", "NO_TEMPLATE"], "the tokenizer has no chat template: set --model_type (MODEL_TYPE) to llama2, zephyr, smollm2, or choose another --tokenizer_name"),
    ([*ASK, "--model_name_or_path", "NO_EOS"], "the tokenizer has no EOS token, so no response could end: choose another --tokenizer_name"),
    ([*ASK, "--model_name_or_path", "OWN_CODE"], "{OWN_CODE} needs its own model code, which is never run: choose another model"),
    ([*ASK, "--model_name_or_path", "PICKLED"], "{PICKLED} has no safetensors weights: convert its weights first (pickled ones are never loaded)"),
    ([*ASK, "--model_name_or_path", "CUT"], "cannot load the model {CUT}: * (are all its files complete?)"),
    ([*ASK, "--model_name_or_path", "ADAPTER"], "the adapter {ADAPTER} does not fit its base {MODEL}: *"),
    ([*COMBINE, "MISSING", "--ori_data_path", "PAIRS"], "the new pair file {MISSING} cannot be read: No such file or directory"),
    ([*COMBINE, "PAIRS", "--ori_data_path", "SCHEMA"], "the original pair file {SCHEMA}, row 1: 'incorrect' must be a non-empty string"),
    ([*COMBINE, "PAIRS", "--ori_data_path", "PAIRS"], "--new_data_path and --ori_data_path are the same file, {PAIRS}"),
    ([*COMBINE, "PAIRS", "--ori_data_path", "COMBINED"], "{COMBINED} is already a combined file: pass the files that the models wrote"),
    ([*COMBINE, "PAIRS", "--ori_data_path", "OTHER"], "the two pair files have no question in common: were they written for the same data set?"),
    ([*COMBINE, "NO_JSON", "--ori_data_path", "PAIRS"], "--new_data_path {NO_JSON} must end with .json"),
    (["dpo.py", "--output_dir", "OUT", "--model_name_or_path", "MODEL"], "give either --dataset_path (a pair file) or --dataset_name"),
    ([*TRAIN, "--dataset_name", "truthful_qa"], "give either --dataset_path (a pair file) or --dataset_name"),
    (["dpo.py", "--dataset_path", "PAIRS", "--model_name_or_path", "MODEL"], "--output_dir is required: the folder to save the adapter in"),
    (["dpo.py", "--output_dir", "OUT", "--model_name_or_path", "MODEL", "--dataset_name", "nobody/nothing"], "cannot load the split train of nobody/nothing: * (pass a hub name, or set DATASETS_ROOT to a folder that prefetch.sh has filled)"),
    ([*TRAIN, "--learnin_rate", "1"], "unrecognized arguments: --learnin_rate 1 (see --help)"),
    ([*TRAIN, "--output_dir", "MODEL"], "--output_dir {MODEL} is the model that the training starts from: choose another folder"),
    ([*TRAIN, "--output_dir", "PAIRS"], "{PAIRS} is a file, not a folder: choose another output folder"),
    ([*TRAIN, "--learning_rate", "nan"], "--learning_rate must be greater than 0, not nan"),
    ([*TRAIN, "--seed", "-1"], "--seed must not be negative, not -1"),
    ([*TRAIN, "--dataset_path", "BLANK"], "the pair file {BLANK}, row 1: 'correct' must be a non-empty string"),
    ([*TRAIN, "--dataset_path", "SAME"], "no pair is left to train on: all have identical answers or are too long"),
    ([*DPO, "HALF"], "{HALF} has no adapter_model.safetensors: the adapter is incomplete, or pickled, which is never loaded"),
    ([*SCORE, "FOLDER", "OUT"], "{FOLDER} is a folder without a model (no config.json)"),
    ([*SCORED, "--tasks", "nonsense"], "nonsense is not a task of lm-evaluation-harness: see `lm-eval ls tasks`"),
    ([*SCORED, "--tasks", "grath_mc"], "grath_mc is not a task with a score of its own: name its members in TASKS*"),
    ([*SCORED, "--batch_size", "auto:x"], "argument --batch_size: must be a whole number of at least 1, or auto, not 'auto:x' (see --help)"),
    ([*SCORED, "--backend", "hf", "--server_url", "http://127.0.0.1:9"], "--server_url needs --backend server"),
    ([*SCORED, "--backend", "server"], "BACKEND=server (--backend server) needs SERVER_URL=http://host:port (--server_url)*"),
    ([*SCORED, "--server_url", "localhost:8000"], "*is not a server's address*"),
]
# fmt: on


@pytest.mark.parametrize(("command", "line"), SCRIPTS)
def test_bad_input_is_one_line_and_touches_nothing(command, line, files):
    before = [sorted(place.rglob("*")) for place in (PROJECT / "data", files["HERE"])]
    done = call_here(*(files.get(part, part) for part in command), status=2)
    said = [line for line in done.stderr.splitlines() if line and not re.search(r"\[\d\d:\d\d", line)]  # no bars
    expected = re.escape(f"{command[0]}: error: {line}".format(**files)).replace(r"\*", ".*")
    assert len(said) == 1 and re.fullmatch(expected, said[0])
    assert [sorted(place.rglob("*")) for place in (PROJECT / "data", files["HERE"])] == before


@pytest.mark.parametrize(
    ("command", "env", "line"),
    [
        ([*TRAIN, "--dataset_path", "EMPTY"], {}, "dpo.py: error: the pair file {EMPTY} is empty"),
        (["evaluation.sh"], {}, "grath.run: error: nothing to score in {FOLDER}; usage: ./evaluation.sh MODEL_OR_ADAPTER [OUTPUT_DIR]"),
        (["evaluation.sh", ""], {}, "evaluation.sh: error: the model's name is empty; usage: ./evaluation.sh MODEL_OR_ADAPTER [OUTPUT_DIR]"),
        (["evaluation.sh", "FOLDER"], {"TASKS": " \n"}, "evaluation.sh: error: TASKS names no task"),
        (["evaluation.sh", "FOLDER"], {"NUM_PROCESSES": "0"}, "evaluation.sh: error: NUM_PROCESSES must be a whole number of at least 1, not '0'"),
        (["evaluation.sh", "HALF"], {"NUM_PROCESSES": "2"}, "grath.evaluation: error: {HALF} has no adapter_model.safetensors: the adapter is incomplete, or pickled, which is never loaded"),
        (["evaluation.sh", "MODEL", "a", "b"], {}, "grath.evaluation: error: unrecognized arguments: b (see --help)"),
        (["run_llama2.sh", "SEED=1"], {}, "run_grath.sh: error: unknown argument 'SEED=1': settings are environment variables (SEED=1 ./run_llama2.sh), see docs/configuration.md"),
        (["run_llama2.sh"], {"DEMOS": "halueva"}, "grath.run: error: DEMOS: there is no set or file 'halueva'"),
        (["run_llama2.sh"], {"DATA_PATH": "no.jsonl"}, "grath.run: error: DATA_PATH: there is no file 'no.jsonl'"),
        (["run_llama2.sh"], {"RUNS_DIR": "{PAIRS}/runs"}, "run_grath.sh: error: cannot write to {PAIRS}/runs: set RUNS_DIR to a folder that can be written to"),
    ],
)  # fmt: skip
def test_bad_input_as_a_process_of_its_own(command, env, line, files):
    before = sorted(files["HERE"].rglob("*"))
    env = {name: value.format(**files) for name, value in {"RUNS_DIR": "{FOLDER}", **env}.items()}
    done = call(*(files.get(part, part) for part in command), cwd=files["HERE"], env=env, status=2)
    assert done.stderr == f"{line.format(**files)}\n"
    assert sorted(files["HERE"].rglob("*")) == before


LOOP = [
    ("ITERATIONS", "0", "ITERATIONS must be a whole number from 1 to 999, not '0'"),
    ("ITERATIONS", "1\u0663", "ITERATIONS must be a whole number from 1 to 999, not '1\u0663'"),
    ("NUM_QUERY", "1e3", "NUM_QUERY must be a whole number of at least 1, not '1e3'"),
    ("BETA", "0", "BETA must be a number greater than 0, not '0'"),
    ("LIMIT", ".0", "LIMIT must be a number of questions or a share below 1, not '.0'"),
    ("REFERENCE", "base", "REFERENCE must be one of rolling, fixed, not 'base'"),
    ("RUN_NAME", "../x", "RUN_NAME must be a plain, short name (use RUNS_DIR for the folder), not '../x'"),
    ("RUN_NAME", "x" * 300, f"RUN_NAME must be a plain, short name (use RUNS_DIR for the folder), not '{'x' * 300}'"),
    ("USE_FS", "true", "USE_FS must be 0 or 1, not 'true'"),
    ("TASKS", "a" * 50 + " -", f"TASKS must be names of tasks, not '{'a' * 50} -'"),
    ("SEED", "007", "SEED must be a whole number, not '007'"),
    ("RUNS_DIR", "./-x", "RUNS_DIR: a command would take '-x' for an option"),
    ("MODEL_NAME_OR_PATH", "", "MODEL_NAME_OR_PATH must be set; the presets run_*.sh set it"),
    ("NUM_QUERY", "", "NUM_QUERY must be a whole number of at least 1"),
]


@pytest.mark.parametrize(("name", "value", "line"), LOOP)
def test_bad_settings(name, value, line):
    with pytest.raises(UserError) as refused:
        read_settings({"MODEL_NAME_OR_PATH": "m", "NUM_QUERY": "1", name: value})
    assert str(refused.value) == line


def test_a_file_from_windows_is_taken_as_it_is(tmp_path):
    (tmp_path / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + BUNDLED.read_bytes().replace(b"\n", b"\r\n"))
    assert load_questions(data_path=tmp_path / "q.jsonl") == load_questions(data_path=BUNDLED)


@pytest.mark.parametrize("status", [0, 2])
def test_a_stage_ends_its_process_group(status, tmp_path):
    def stage():
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        if status:
            raise UserError("x")

    with pytest.raises(SystemExit) as ended:
        run_main(stage)
    assert ended.value.code == status
    assert not distributed.is_initialized()
