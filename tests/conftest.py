"""Fixtures: tiny models, made data sets, and one whole run; the order of the tests."""

import json
import os
import shutil
import signal
import subprocess
import sys
from unittest import mock

import pytest
from filelock import FileLock
from made_data import put, put_arc, put_truthful
from support import BUNDLED, PROJECT, RESPONSE, call, call_here, make_llama, make_tokenizer, pair, rows, write_rows

# A job in the background of a script ignores Ctrl-C, and so would every program that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Order the tests so that two processes end together and wait little for each other's files.

    One makes the whole run, whose readers come later. The other begins with slow tests that need no tiny model.
    """
    readers = [item for item in items if "llama_run" in item.fixturenames]

    def place(item):
        fast = not item.get_closest_marker("slow")
        return item not in readers[:1], fast, item in readers, "tiny_llama" in item.fixturenames

    items.sort(key=place)


@pytest.fixture(autouse=True)
def environment():
    """A test keeps what it sets in the environment, as a training does its precision, from the tests after it."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def made_once(tmp_path_factory, request):
    """A function (name, make) that gives the folder `name`, made by `make(folder)` in the first process to ask."""
    root = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        root = root.parent  # the folder of all processes

    def give(name, make):
        folder, made = root / name, root / f"{name}.made"
        with FileLock(root / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # what a process that failed left
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return give


@pytest.fixture(scope="session")
def smollm2():
    """The model folder of SmolLM2-135M-Instruct."""
    call(sys.executable, "-m", "grath.modeling.smollm2")
    return PROJECT / "models" / "smollm2"


@pytest.fixture(scope="session")
def llama_tokenizer():
    return make_tokenizer("<s>", "</s>", add_bos=True)


@pytest.fixture(scope="session")
def smollm_tokenizer():
    return make_tokenizer("<|im_start|>", "<|im_end|>", add_bos=False)


@pytest.fixture(scope="session")
def tiny_llama(made_once, llama_tokenizer):
    """Folder of a two-layer Llama that answers every request for a pair, of every kind, with `RESPONSE`."""

    def save(folder):
        from grath.modeling.chat import TEMPLATES

        llama_tokenizer.chat_template = TEMPLATES["llama2"]
        llama_tokenizer.save_pretrained(folder)
        make_llama(llama_tokenizer).save_pretrained(folder)

    return made_once("tiny llama", save)


@pytest.fixture
def model(tiny_llama, tmp_path):
    """A copy of the tiny model, to be changed."""
    return shutil.copytree(tiny_llama, tmp_path / "model")


@pytest.fixture
def server(tiny_llama):
    """An inference server of the tiny model."""
    from stand_in.inference_server import InferenceServer

    with InferenceServer(tiny_llama, answer=lambda ids: RESPONSE) as server:
        yield server


@pytest.fixture(scope="session")
def pair_file(tmp_path_factory):
    """A pair file of twelve different pairs."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.json"
    questions = [row["question"] for row in rows(BUNDLED)[:12]]
    return write_rows(path, [pair(q, f"It is number {i}.", "Nobody knows.") for i, q in enumerate(questions)])


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A folder in the hub's layout with tiny made sets for HellaSwag and MMLU, and ARC's and TruthfulQA's schema."""
    from lm_eval.tasks.mmlu._generate_configs import SUBJECTS

    root = tmp_path_factory.mktemp("hub")
    put_arc(root, range(30))
    put_truthful(root, range(4))
    swag = [
        {"ind": i, "activity_label": "Cooking", "ctx_a": "A man cooks.", "ctx_b": "he", "ctx": "A man cooks. he",
         "endings": ["eats.", "flies.", "sings.", "melts."], "source_id": "1", "split": "val", "split_type": "x",
         "label": "0"} for i in range(12)
    ]  # fmt: skip
    for split in ("train", "validation"):
        put(root, "Rowan/hellaswag", split, swag, ["default"], ("train", "validation"))
    mmlu = [
        {"question": f"Is it {i}?", "subject": "x", "choices": ["yes", "no", "both", "none"], "answer": i % 4}
        for i in range(6)
    ]
    for subject in SUBJECTS:
        for split in ("test", "dev"):
            put(root, "cais/mmlu", split, mmlu, SUBJECTS, ("test", "dev"), config=subject)
    return root


@pytest.fixture(scope="session")
def scored_once(tiny_llama, made_once):
    """A folder of scores of three questions, with sample answers and logged questions. Never changed."""
    flags = ("--tasks", "grath_mc1", "grath_mc2", "--limit", 3, "--samples", "--log_samples")
    return made_once("scores", lambda folder: call_here("grath.evaluation", tiny_llama, folder, *flags))


@pytest.fixture(scope="session")
def llama_run(tiny_llama, made_once):
    """A real `run_llama2.sh`, two iterations on a tiny model: (folder, settings, finished process). Never changed."""
    settings = {
        "MODEL_NAME_OR_PATH": str(tiny_llama), "ITERATIONS": "2", "MAX_STEPS": "4", "SAVE_STEPS": "2",
        "WARMUP_STEPS": "0", "NUM_QUERY": "6", "DATA_PATH": str(BUNDLED), "TASKS": "grath_mc1 grath_mc2",
        "LIMIT": "3", "DPO_PRECISION": "fp32", "PAIRS_PRECISION": "fp32",
    }  # fmt: skip

    def start(runs):
        done = call("run_llama2.sh", env={**settings, "RUNS_DIR": str(runs)})
        (runs / "done.json").write_text(json.dumps([done.stdout, done.stderr]))

    runs = made_once("a run", start)
    done = subprocess.CompletedProcess(["run_llama2.sh"], 0, *json.loads((runs / "done.json").read_text()))
    return runs / "llama2_seed_0", {**settings, "RUNS_DIR": str(runs)}, done
