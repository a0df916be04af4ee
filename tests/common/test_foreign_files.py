"""Files from outside that are not what they should be: one line and status 2 in every command that reads them."""

import fcntl
import json
import shutil
from itertools import cycle

import pytest
from made_runs import put_pairs, put_run
from support import BUNDLED, asking, call_here, pair, rows, stages, write_rows

from grath.common.files import fits

DEEP = "[" * 200_000
OTHERS = (None, True, 7, "x", [1], {"x": [2]})


def variants(content, others):
    """Copies of parsed JSON in which one value, or all of it, is the next of `others`."""
    yield next(others)
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        for other in variants(value, others):
            copy = content.copy()
            copy[key] = other
            yield copy


def broken(content):
    """Texts of damaged files: every value is of another type in two of them."""
    for start in (0, 2):
        yield from map(json.dumps, variants(content, cycle((*OTHERS[start:], *OTHERS[:start]))))
    text = json.dumps(content)
    yield from (text[: len(text) // 2], DEEP, text.replace(":", ': "\\ud800",', 1), "")


def assert_one_line(command, texts, file):
    """Whatever the file contains, the command succeeds, or ends with status 2 and one short line."""
    refused = 0
    for text in texts:
        file.write_text(text, encoding="utf-8")
        done = call_here(*command, status=None)
        assert done.returncode in (0, 2), (text[:200], done.stderr)
        if done.returncode == 2:
            refused += 1
            assert len(done.stderr.strip().splitlines()) == 1 and len(done.stderr) < 800, (text[:200], done.stderr)
    return refused


@pytest.mark.parametrize(
    "name",
    [
        "results/iter_1/settings.json", "results/iter_0/truthfulqa_mc1.json", "results/iter_0/samples.jsonl",
        "models/*/grath.json", "models/*/training_log.jsonl", "data/*.record.json", "data/*True.json", "pairs.json",
        "data/*.distance.json",
    ],
)  # fmt: skip
def test_a_report_on_damaged_files(name, tmp_path, monkeypatch):
    monkeypatch.setattr("grath.report.pages.plot_scores", lambda *args: None)
    run = put_run(tmp_path / "run", {0: [0.0, 1.0], 1: [1.0, 1.0]})
    path = put_pairs(run, 0, [("q", "yes", "no"), ("r", "it", "not it")], data_path=str(BUNDLED))
    path.with_suffix(".distance.json").write_text('{"distance": 0.5, "probe": 0.6}')
    write_rows(run / "results" / "iter_0" / "samples.jsonl", [{"question": "q", "answer": "a"}])
    call_here("grath.report", run)
    for record in [run / "results" / "iter_0" / "settings.json", path.with_name(f"{path.name}.record.json")]:
        if name != record.relative_to(run).as_posix() and "record" not in name:
            record.unlink()  # it would refuse every other file
    (file,) = run.glob(name)
    content = rows(file)[0] if file.suffix == ".jsonl" or name == "data/*True.json" else json.loads(file.read_text())
    assert assert_one_line(("grath.report", run), broken(content), file) > 4


def test_a_combination_and_a_training_of_damaged_files(pair_file, tiny_llama, tmp_path):
    file = tmp_path / "new.json"
    command = ("combine_new_correct_ori_wrong.py", "--new_data_path", file, "--ori_data_path", pair_file)
    shutil.copy(pair_file, file)
    (tmp_path / "new_combined.json").mkdir()  # a folder in the place of the output
    assert "a file and a folder have the same name" in call_here(*command, status=2).stderr
    (tmp_path / "new_combined.json").rmdir()
    assert assert_one_line(command, broken(rows(pair_file)[0]), file) > 4
    config = tmp_path / "dpo.yaml"
    flags = ("--model_name_or_path", "none", "--dataset_path", pair_file, "--output_dir", tmp_path / "d")
    texts = [DEEP, "learning_rate: {a: 1}", "max_steps: [1, 2]", "beta: true", "x: &a [*a]", "seed: \ud7ff", "1: 2"]
    assert assert_one_line(("dpo.py", "--config", config, *flags), texts, config) == len(texts)


def test_questions_and_few_shot_examples_of_other_types(tmp_path):
    file = tmp_path / "questions.jsonl"
    ask = asking("none", tmp_path / "p")
    question = rows(BUNDLED)[0]
    assert assert_one_line((*ask, "--data_path", file), broken(question), file) > 4
    string = {"question": "q", "choices": {"text": ["yes", "no"], "label": "AB"}, "answerKey": "AB"}
    write_rows(file, [string])
    assert "not in the ARC schema" in call_here(*ask, "--data_path", file, status=2).stderr
    demo = dict.fromkeys(("question", "candidate_correct", "candidate_incorrect", "correct", "incorrect"), "text")
    demos = tmp_path / "demos.json"
    command = (*ask, "--useFS", "--demos", demos)
    assert assert_one_line(command, broken([demo]), demos) > 4


@pytest.mark.parametrize("name", ["~nobody-here/model", "a" * 300, "a/" * 2500 + "a"])
def test_names_that_no_file_system_takes(name, pair_file, tmp_path):
    for command in [
        *stages(name, pair_file, tmp_path).values(),
        asking(tmp_path, tmp_path / "p", "--tokenizer_name", name),
        asking(tmp_path, tmp_path / "p", "--data_path", "", "--data_name", name),
        ("dpo.py", "--model_name_or_path", "none", "--dataset_path", name, "--output_dir", tmp_path / "d"),
        ("dpo.py", "--model_name_or_path", "none", "--dataset_path", pair_file, "--output_dir", name),
        ("grath.export", name, tmp_path / "x"),
        ("grath.report", name),
    ]:
        done = call_here(*command, status=2)
        assert len(done.stderr.strip().splitlines()) == 1 and len(done.stderr) < 1600, (command, done.stderr)
    assert not list(tmp_path.iterdir())


def test_answers_in_a_report_are_text(tmp_path):
    run = put_run(tmp_path / "<b>x<", {0: [0.0, 1.0], 1: [0.0, 1.0]}, dataset_name="<i>x ![y](http://z)")
    answer = "<script>x</script> [a](http://b) ![c](//d) | `e` <!-- \\ &lt; **f**\n# g me@h"
    (run / "results" / "iter_0" / "settings.json").unlink()
    write_rows(run / "results" / "iter_0" / "samples.jsonl", [{"question": "<b>q", "answer": answer}])
    call_here("grath.report", run)
    page = (run / "report.md").read_text()
    (line,) = (line for line in page.splitlines() if line.startswith("- M_0: "))
    assert line == (
        r"- M_0: &lt;script&gt;x&lt;/script&gt; \[a\](http&#58;//b) !\[c\](//d) \| \`e\` &lt;!-- \\ &amp;lt; "
        r"\*\*f\*\* # g me&#64;h"
    )
    assert "# &lt;b&gt;x&lt;\n" in page and "**&lt;b&gt;q**" in page
    assert r"| &lt;i&gt;x ![y]\(http&#58;//z) " in page  # a setting, escaped once


FOREIGN = "<img src=x> ![](http://evil) \x1b[2J"


def test_names_and_versions_in_result_files_are_no_markup(tmp_path):
    run = put_run(tmp_path / "a$^$", {0: [0.0, 1.0], 1: [0.0, 1.0]})
    call_here("grath.report", run)
    assert (run / "iterations.png").is_file()  # its legend has the name
    (file,) = (run / "results" / "iter_1").glob("t*.json")
    good = json.loads(file.read_text())
    file.with_name("settings.json").unlink()
    (task,) = good["results"]
    for bad in (
        {"results": {FOREIGN: good["results"][task]}},
        {"lm_eval_version": FOREIGN},
        {"versions": {task: FOREIGN}},
        {"results": {task: {"acc,none": float("inf")}}},
        {"questions": {"sha256": "x", "scores": [float("nan")]}},
    ):
        file.write_text(json.dumps({**good, **bad}))
        done = call_here("grath.report", run, status=2)
        assert "is damaged" in done.stderr and len(done.stderr.strip().splitlines()) == 1, bad


def test_an_output_has_one_writer(pair_file, tiny_llama, tmp_path):
    records = ("p_num_2_useGT_False_useFS_False.json.record.json", "d/grath.json", "s/settings.json")
    for record, command in zip(records, stages(tiny_llama, pair_file, tmp_path).values(), strict=True):
        path = tmp_path / record
        path.parent.mkdir(exist_ok=True)
        with path.with_name(f".{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert "another process is writing" in call_here(*command, status=2).stderr
            assert not path.exists()
        call_here(*command)
        assert path.exists() and not list(path.parent.glob("*.lock"))


def test_shapes():
    assert fits({"a": 1, "c": [{}]}, {"a": int | float, "b?": str, "c": [dict]})
    assert not fits({"a": True}, {"a": int}) and not fits({}, {"a": int}) and not fits({"b": 1}, {"b?": str})
    assert fits(None, (type(None), [str])) and fits(["x"], (type(None), [str])) and not fits([1], (type(None), [str]))
    assert fits({"x": 1}, {str: int}) and not fits({"x": "1"}, {str: int}) and fits(pair("q", "a", "b"), {str: str})
