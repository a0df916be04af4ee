"""Every stage uses the current content of a local data set."""

import json
import os

import pytest
from support import call, call_here, put_arc, put_truthful, rows

from grath.common.local_data import content_hash


def ask(out):
    """Return the numbers of the ARC questions that stage 1 asks."""
    call_here(
        "create_pair_responses.py", "--model_name_or_path", "me/tiny", "--save_prefix", "x", "--save_dir", out,
        "--tokenizer_name", "me/tiny", "--precision", "fp32", cwd=out.parent,
    )  # fmt: skip
    return [int(row["question"].split()[-1]) for row in rows(next(out.glob("x_*.json")))]


def train(out):
    """Return the number of ARC questions that stage 3 reads."""
    call_here(
        "dpo.py", "--dataset_name", "ai2_arc/ARC-Challenge", "--model_name_or_path", "me/tiny", "--output_dir", out,
        "--max_steps", "1", "--precision", "fp32", cwd=out.parent,
    )  # fmt: skip
    return json.loads((out / "grath.json").read_text())["pairs"]["read"]


def evaluate(out, status=0):
    """Return the number of TruthfulQA questions that stage 4 scores, and the finished process."""
    done = call_here("grath.evaluation", "me/tiny", out, "--tasks", "truthfulqa_mc1", cwd=out.parent, status=status)
    return scored(out), done


def scored(out):
    return json.loads((out / "truthfulqa_mc1.json").read_text())["n-samples"]["truthfulqa_mc1"]["effective"]


@pytest.mark.slow
def test_two_folders_of_one_layout_and_an_edited_one(tiny_llama, tmp_path, monkeypatch):
    """`datasets` would give them one cache entry, by their layout, in one process and in several.

    Every stage finds the hub names of data sets and of the model in DATASETS_ROOT.
    """

    def fill(name, numbers):
        put_arc(tmp_path / name, numbers)
        put_truthful(tmp_path / name, numbers)
        monkeypatch.setattr("grath.common.layout.DATASETS_ROOT", str(tmp_path / name))
        return list(numbers)

    for name, numbers in (("a", range(3)), ("b", range(10, 15))):
        (tmp_path / name / "me").mkdir(parents=True)
        (tmp_path / name / "me" / "tiny").symlink_to(tiny_llama)
        expected = fill(name, numbers)
        assert ask(tmp_path / f"asked {name}") == expected
        assert train(tmp_path / f"trained {name}") == len(expected)
        assert evaluate(tmp_path / f"scores {name}")[0] == len(expected)

    expected = fill("a", range(20, 24))
    assert ask(tmp_path / "asked again") == expected
    assert train(tmp_path / "trained again") == 4
    # Scores of the old questions are not taken for scores of the new ones.
    count, done = evaluate(tmp_path / "scores a", status=2)
    assert count == 3 and done.stderr.count("\n") == 1
    assert "contains scores with truthfulqa/truthful_qa=" in done.stderr
    # In a process of its own, as a user starts it.
    env = {"DATASETS_ROOT": str(tmp_path / "a"), "TASKS": "truthfulqa_mc1"}
    call("evaluation.sh", "me/tiny", tmp_path / "scores again", env=env, cwd=tmp_path)
    assert scored(tmp_path / "scores again") == 4


def test_equal_folders_share_a_cache_entry_and_hidden_files_do_not_count(tmp_path):
    for name in ("a", "b"):
        put_arc(tmp_path / name, range(3))
    folder, other = (tmp_path / name / "allenai/ai2_arc" for name in ("a", "b"))
    notes = other / ".cache" / "huggingface" / "ARC-Challenge.metadata"
    notes.parent.mkdir(parents=True)
    notes.write_text("fetched today")
    assert content_hash(folder) == content_hash(other)
    file = folder / "ARC-Challenge" / "train-0.parquet"
    stat = file.stat()
    file.rename(folder / "ARC-Challenge" / "train-1.parquet")
    assert content_hash(folder) != content_hash(other)
    (folder / "ARC-Challenge" / "train-1.parquet").rename(file)
    assert content_hash(folder) == content_hash(other)
    # An edit that keeps size and time of change.
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert content_hash(folder) != content_hash(other)


@pytest.mark.parametrize("edited", ["truthfulqa/truthful_qa", "allenai/ai2_arc"])
def test_scores_run_again_if_their_data_has_changed(edited, tmp_path, monkeypatch):
    """But not if the data of another task has changed, or a task is added."""
    monkeypatch.setattr("grath.common.layout.DATASETS_ROOT", str(tmp_path / "hub"))
    put_arc(tmp_path / "hub", range(3))
    put_truthful(tmp_path / "hub", range(3))
    run = tmp_path / "run_seed_0"
    hub = {"DATASETS_ROOT": str(tmp_path / "hub")}
    start = {"MODEL_NAME_OR_PATH": "a/b", "NUM_QUERY": "1", "RUNS_DIR": str(tmp_path), "RUN_NAME": "run", **hub}
    call("python", "-m", "grath.run", "start", env=start)

    def score(tasks):
        outputs = [f"{run / task}.json" for task in tasks.split()]
        call(
            "python", "-m", "grath.run", "stage", run, "--iteration", "0", "--stage", "scores",
            "--title", "scores", "--output", *outputs, "--",
            "bash", "-c", f"cd '{run}'; for t in {tasks}; do [[ -f $t.json ]] || echo $RANDOM >$t.json; done",
            env={**hub, "TASKS": tasks},
        )  # fmt: skip
        return {task: (run / f"{task}.json").read_text() for task in tasks.split()}

    first = score("truthfulqa_mc1")
    both = score("truthfulqa_mc1 arc_challenge")
    assert both == score("truthfulqa_mc1 arc_challenge") and first.items() <= both.items()
    put_truthful(tmp_path / "hub", range(5)) if "truthful" in edited else put_arc(tmp_path / "hub", range(5))
    again = score("truthfulqa_mc1")
    assert (again == first) == ("truthful" not in edited)
