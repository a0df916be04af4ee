"""Every stage uses the current content of a local data set."""

import json
import os
import re
import shutil

import pytest
from made_data import put_arc, put_truthful
from support import PROJECT, call, call_here

from grath.common.local_data import content_hash

BUNDLED_MC = PROJECT / "data" / "truthfulness_mc.jsonl"
MODEL = ("--model_name_or_path", "me/tiny", "--precision", "fp32")


def ask(out):
    """Return the number of ARC questions that stage 1 asks."""
    flags = (*MODEL, "--tokenizer_name", "me/tiny", "--save_prefix", "x", "--save_dir", out)
    done = call_here("create_pair_responses.py", *flags, cwd=out.parent)
    return int(re.search(r"Asking (\d+) questions", done.stdout)[1])


def train(out):
    """Return the number of ARC questions that stage 3 reads."""
    flags = (*MODEL, "--dataset_name", "ai2_arc/ARC-Challenge", "--output_dir", out, "--max_steps", 1)
    call_here("dpo.py", *flags, cwd=out.parent)
    return json.loads((out / "grath.json").read_text())["pairs"]["read"]


def evaluate(out, *tasks, status=0):
    """Run stage 4, on TruthfulQA if no tasks are named."""
    tasks = tasks or ("truthfulqa_mc1",)
    return call_here("grath.evaluation", "me/tiny", out, "--tasks", *tasks, cwd=out.parent, status=status)


def scored(out):
    """Return the number of TruthfulQA questions in a folder of scores."""
    return json.loads((out / "truthfulqa_mc1.json").read_text())["n-samples"]["truthfulqa_mc1"]["effective"]


@pytest.fixture
def fill(tiny_llama, tmp_path, monkeypatch):
    """A function that fills a folder in the hub's layout with questions of some numbers, and makes it DATASETS_ROOT."""

    def fill(name, numbers):
        put_arc(tmp_path / name, numbers)
        put_truthful(tmp_path / name, numbers)
        monkeypatch.setattr("grath.common.layout.DATASETS_ROOT", str(tmp_path / name))
        if not (tmp_path / name / "me").exists():
            (tmp_path / name / "me").mkdir()
            (tmp_path / name / "me" / "tiny").symlink_to(tiny_llama)

    return fill


@pytest.mark.slow
def test_two_folders_of_one_layout_and_an_edited_one(fill, tmp_path):
    """`datasets` would give them one cache entry, by their layout, in one process and in several."""
    for name, numbers in (("a", range(3)), ("b", range(10, 15))):
        fill(name, numbers)
        assert ask(tmp_path / f"asked {name}") == train(tmp_path / f"trained {name}") == len(numbers)
        evaluate(tmp_path / f"scores {name}")
        assert scored(tmp_path / f"scores {name}") == len(numbers)
    fill("a", range(20, 24))
    assert ask(tmp_path / "asked again") == 4
    # In a process of its own, as a user starts it.
    env = {"DATASETS_ROOT": str(tmp_path / "a"), "TASKS": "truthfulqa_mc1", "SAMPLES": "0"}
    call("evaluation.sh", "me/tiny", tmp_path / "scores again", env=env, cwd=tmp_path)
    assert scored(tmp_path / "scores again") == 4


def test_scores_are_refused_if_their_own_data_has_changed(fill, tmp_path):
    """But not if the data of another task has changed, or a task is added."""
    fill("a", range(3))
    evaluate(tmp_path / "s")
    put_arc(tmp_path / "a", range(30))
    assert "is up to date" in evaluate(tmp_path / "s").stdout
    done = evaluate(tmp_path / "s", "truthfulqa_mc1", "arc_challenge")
    assert "truthfulqa_mc1.json is up to date" in done.stdout and "arc_challenge, 25-shot" in done.stdout
    put_truthful(tmp_path / "a", range(5))
    assert "is up to date" in evaluate(tmp_path / "s", "arc_challenge").stdout
    done = evaluate(tmp_path / "s", status=2)
    assert "was made with data truthfulqa/truthful_qa " in done.stderr and done.stderr.count("\n") == 1
    assert scored(tmp_path / "s") == 3


def test_equal_folders_share_a_cache_entry_and_hidden_files_do_not_count(tmp_path):
    for name in ("a", "b"):
        put_arc(tmp_path / name, range(3))
        (tmp_path / name / "allenai/ai2_arc" / "ARC-Challenge.txt").touch()
    folder, other = (tmp_path / name / "allenai/ai2_arc" for name in ("a", "b"))
    notes = other / ".cache" / "huggingface" / "ARC-Challenge.metadata"
    notes.parent.mkdir(parents=True)
    notes.write_text("fetched today")
    assert content_hash(folder) == content_hash(other)
    file = folder / "ARC-Challenge" / "train-0.parquet"
    stat, renamed = file.stat(), file.rename(file.with_name("train-1.parquet"))
    assert content_hash(folder) != content_hash(other)
    renamed.rename(file)
    assert content_hash(folder) == content_hash(other)
    # A folder that is a link, which `datasets` follows too.
    folder.joinpath("ARC-Challenge").rename(tmp_path / "elsewhere")
    (folder / "ARC-Challenge").symlink_to(tmp_path / "elsewhere")
    assert content_hash(folder) == content_hash(other)
    # An edit that keeps size and time of change.
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert content_hash(folder) != content_hash(other)


def test_the_files_of_tasks_of_ones_own_are_part_of_their_scores(tiny_llama, tmp_path, monkeypatch):
    """The task file, what it includes, its functions, and the local files that it reads."""
    tasks, data = shutil.copytree(PROJECT / "tasks", tmp_path / "tasks"), tmp_path / "mine" / "mine.jsonl"
    (tmp_path / "data").symlink_to(PROJECT / "data")
    monkeypatch.setattr("grath.evaluation.tasks.OWN_TASKS", tasks)
    own = (tasks / "grath_mc1.yaml").read_text().replace("task: grath_mc1", "task: mine")
    data.parent.joinpath("more").mkdir(parents=True)
    dataset = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    validation: [{data.parent}/*]"
    (tasks / "mine.yaml").write_text(own.replace("custom_dataset: !function utils.load", dataset))
    data.write_text("".join(BUNDLED_MC.read_text().splitlines(keepends=True)[:4]))

    def start(*names, status=0):
        return call_here("grath.evaluation", tiny_llama, tmp_path / "s", "--limit", 2, "--tasks", *names, status=status)

    start("grath_mc1", "mine")
    assert "is up to date" in start("grath_mc1", "mine").stdout
    for file, task, name in (
        (data, "mine", str(data)),
        (tasks / "mine.yaml", "mine", "task mine"),
        (tasks / "grath_mc1.yaml", "grath_mc2", "task grath_mc1"),
        (tasks / "utils.py", "grath_mc1", "task grath_mc1"),
    ):
        before = file.read_text()
        file.write_text(before + "\n")
        assert f"was made with data {name} " in start("grath_mc1", task, status=2).stderr
        file.write_text(before)
    start("grath_mc1", "mine", "grath_mc2")
