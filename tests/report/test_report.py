"""The report of a run and of several runs, and the distance between correct and incorrect answers."""

import json
import re
import shutil

import pytest
from made_runs import put_model, put_pairs, put_record, put_run, put_scores, result
from support import BUNDLED, call_here, cells_of, write_rows

from grath.pairs.questions import load_questions


@pytest.fixture
def made_run(tmp_path):
    """A run of three iterations without scores of single questions: M_1 is best, M_3 lacks MC2."""
    run = tmp_path / "a run"
    for number, (mc1, mc2) in enumerate([(0.30, 0.45), (0.40, 0.50), (0.35, 0.49), (0.2, None)]):
        put_scores(run, number, "truthfulqa_mc1", mc1)
        if mc2:
            put_scores(run, number, "truthfulqa_mc2", mc2)
        samples = run / "results" / f"iter_{number}" / "samples.jsonl"
        write_rows(samples, [{"question": "Is ice cold?", "answer": f"Answer\n{number}"}])
        if number:
            put_model(run, number, base_model="me/Llama-2-7b-chat-hf", warnings=["too many steps"], commit="def5678+")
            log = [{"step": 9, "loss": 0.5, "rewards/margins": 0.125 * number}, {"train_runtime": 5}]
            write_rows(next(run.glob(f"models/iter_{number}_*")) / "training_log.jsonl", log)
    put_pairs(run, 0, [("Is it q?", "a", "a"), ("r", "a", "b"), ("Why s?", "Why s.", "not b")], demos="halueval")
    return run


def page(run):
    return (run / "report.md").read_text(encoding="utf-8")


def comparison(run):
    return cells_of((run.parent / "comparison.md").read_text(encoding="utf-8"))


def test_what_is_printed_equal_is_not_called_lower():
    from grath.report.tables import best_iteration

    rows = [
        (name, {"grath_mc1": {"score": 33.0}, "grath_mc2": {"score": score}})
        for name, score in [("M_0", 40.241), ("M_1", 40.239)]
    ]
    assert best_iteration(rows) == ["Best by MC1 (bundled) + MC2 (bundled): M_0 (73.24)."]


def test_report_of_a_run(made_run):
    (made_run / "report.md").write_text("of later")
    done = call_here("grath.report", made_run)
    text, cells = page(made_run), cells_of(page(made_run))
    assert ["M_1", "40.00 ± 1.00 (+10.00)", "50.00 ± 1.00 (+5.00)"] in cells
    assert ["M_3", "20.00 ± 1.00 (-10.00)", "-"] in cells
    assert "Best by MC1 + MC2: M_1 (90.00); every later iteration is lower (the last: 84.00)." in text
    assert "No score of M_3 yet: MC2." in text
    assert "Base model: me/Llama-2-7b-chat-hf" in text and "MC1 30.23 -> 54.71" in text
    (trained,) = [row for row in cells if row[0] == "M_0 -> M_1"]
    assert trained[1:5] == ["5", "3", "1", "1"] and trained[-4:] == ["2", "9", "0.125", "-"]
    assert "- M_2: too many steps" in text and "- M_3: Answer 3" in text
    stages = [row for row in cells if row[1:] == ["2", "1"]]
    first = ["scores of M_0", "iteration 1: M_0 writes pairs", "iteration 1: DPO trains M_1", "scores of M_1"]
    assert [row[0] for row in stages[:4]] == first and len(stages) == 8
    assert ["pairs demos", "halueval"] in cells and ["dpo reference", "rolling"] in cells
    assert ["scores precision", "fp32"] in cells and not any("output_dir" in row[0] for row in cells)
    # Not those of the time of writing.
    assert "Commit: abc1234, def5678+\nVersions: torch 2.0\n" in text
    assert "truthfulqa_mc1 2.0; truthfulqa_mc2 2.0; chat template off" in text
    assert (made_run / "iterations.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (made_run / "iterations.svg").read_text(encoding="utf-8")
    assert "Best by MC1 + MC2: M_1" in done.stdout


def test_report_of_a_run_with_one_iteration_and_no_scores(made_run):
    shutil.rmtree(made_run / "results")
    for number in (2, 3):
        shutil.rmtree(next(made_run.glob(f"models/iter_{number}_*")))
    done = call_here("grath.report", made_run)
    assert "No score of M_0 (base) yet." in done.stdout and "No score of M_1 yet." in done.stdout
    assert "Best by" not in done.stdout
    assert not (made_run / "iterations.png").exists()


def test_a_run_whose_base_is_being_scored_has_a_report(tmp_path):
    """It has neither models nor data yet."""
    run = put_run(tmp_path / "run", {0: [1.0, 0.0]})
    assert "50.00" in call_here("grath.report", run).stdout and "No iteration yet." in page(run)


def test_an_unfinished_stage_is_not_shown(made_run):
    """A record is written when its stage starts, and names the finished files when it ends."""
    for path in (next(made_run.glob("models/iter_3_*/grath.json")), next(made_run.glob("data/*.record.json"))):
        record = json.loads(path.read_text())
        del record["files"]
        path.write_text(json.dumps(record))
    next(made_run.glob("data/*True.json")).unlink()
    assert "M_3" not in call_here("grath.report", made_run).stdout
    assert [row[1] for row in cells_of(page(made_run)) if row[0] == "M_0 -> M_1"] == ["-"]


def test_a_run_that_starts_from_an_adapter_has_it_as_its_base(made_run):
    put_model(made_run, 1, incoming_adapter="runs/first/models/iter_1")
    call_here("grath.report", made_run)
    assert "Base model: runs/first/models/iter_1" in page(made_run)


@pytest.mark.parametrize("edited", ["data/*True.json", "results/iter_1/truthfulqa_mc1.json"])
def test_an_edited_file_is_refused(edited, made_run):
    (file,) = made_run.glob(edited)
    file.write_text(file.read_text().replace("a", "e"))
    done = call_here("grath.report", made_run, status=2)
    assert f"{file} is not the file that was written: " in done.stderr and done.stderr.count("\n") == 1
    assert not (made_run / "report.md").exists()


@pytest.mark.parametrize("content", ["[]", '{"results": {'])
def test_damaged_result_file_gives_one_line(content, tmp_path):
    (tmp_path / "arc_challenge.json").write_text(content)
    done = call_here("grath.report", tmp_path, status=2)
    assert done.stderr.endswith("arc_challenge.json is damaged, or not a result file of lm-evaluation-harness\n")
    assert done.stderr.count("\n") == 1


def test_a_perplexity_is_not_shown_in_percent(tmp_path):
    for task, metric, value in (("wikitext", "word_perplexity", 25.25), ("ifeval", "prompt_level_strict_acc", 0.3125)):
        made = result(task, 0.5) | {"results": {task: {f"{metric},none": value}}}
        (tmp_path / f"{task}.json").write_text(json.dumps(made))
    shown = call_here("grath.report", tmp_path).stdout
    assert "25.25" in shown and "31.25" in shown


@pytest.fixture
def two_runs(made_run):
    """Two runs that differ in their few-shot examples and in the score of M_1."""
    other = made_run.with_name("another run")
    shutil.copytree(made_run, other)
    put_scores(other, 1, "truthfulqa_mc1", 0.38)
    path = next(other.glob("data/*.record.json"))
    path.write_text(path.read_text().replace("halueval", "misconceptions"))
    found = {"distance": 0.25, "probe": 0.875, "pairs": 2, "model": "m"}
    next(other.glob("data/*True.json")).with_suffix(".distance.json").write_text(json.dumps(found))
    return made_run, other


def test_comparison_of_two_runs(two_runs):
    done = call_here("grath.report", *two_runs)
    lines = comparison(two_runs[0])
    assert lines[0] == ["run", "pairs demos"]  # not the seed, which is the same in both
    assert ["a run", "halueval"] in lines and ["another run", "misconceptions"] in lines
    assert ["a run: M_1", "40.00 ± 1.00 (+10.00)", "50.00 ± 1.00 (+5.00)"] in lines
    assert ["another run: M_1", "38.00 ± 1.00 (+8.00)", "50.00 ± 1.00 (+5.00)"] in lines
    assert sum("M_0" in line[0] for line in lines) == 1  # the shared base appears once
    assert ["another run", "M_0", "5", "3", "1", "1", "-", "0.250", "0.875", "0.000 / 0.500", "1.5 / 1.5"] in lines
    assert ["a run", "M_0", "5", "3", "1", "1", "-", "-", "-", "0.000 / 0.500", "1.5 / 1.5"] in lines
    assert (two_runs[0].parent / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "Wrote comparison.md, comparison.png in" in done.stdout
    # With different bases, each has its own row, and the differences are from a run's own base.
    put_scores(two_runs[1], 0, "truthfulqa_mc1", 0.25)
    done = call_here("grath.report", *two_runs)
    assert sum(": M_0" in line for line in done.stdout.splitlines()) == 2
    assert "40.00 ± 1.00 (+10.00)" in done.stdout and "38.00 ± 1.00 (+13.00)" in done.stdout
    done = call_here("grath.report", *two_runs, two_runs[0].parent, status=2)
    assert "is not a run folder: it contains neither models, data nor scores of M_0" in done.stderr


def test_a_published_run_needs_no_pairs_and_no_weights(two_runs):
    """What the report wrote is enough for the comparison."""
    for run in two_runs:
        call_here("grath.report", run)
    call_here("grath.report", *two_runs)
    before = comparison(two_runs[0])
    for run in two_runs:
        next(run.glob("data/*True.json")).unlink()
    call_here("grath.report", *two_runs)
    assert comparison(two_runs[0]) == before


def test_a_model_that_not_all_seeds_have_says_so(tmp_path):
    scores = dict(enumerate([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]))
    runs = [put_run(tmp_path / "both_seed_0", scores, 0)]
    runs.append(put_run(tmp_path / "both_seed_1", {number: scores[number] for number in (0, 1)}, 1))
    call_here("grath.report", *runs)
    names = [line[0] for line in comparison(runs[0]) if len(line) == 2 and line[0].startswith("both: M")]
    assert names == ["both: M_0 (base)", "both: M_1", "both: M_2 (1 of 2 runs)", "both: M_3 (1 of 2 runs)"]
    # A task that one seed lacks is that of the other.
    for number, of_questions in enumerate(([0.0, 0.0], [1.0, 0.0])):
        put_scores(runs[0], number, "truthfulqa_mc2", of_questions)
    call_here("grath.report", *runs)
    mc2 = {line[0]: line[2] for line in comparison(runs[0]) if len(line) == 3}
    assert mc2["both: M_0 (base)"] == "0.00 (1 of 2 runs)"
    assert re.fullmatch(r"50\.00 \(\+50\.00 \[.*\]; 1 of 2 runs\)", mc2["both: M_1"])


def test_seeds_are_pooled_question_by_question(tmp_path):
    """Both seeds gain the same question, and one seed each another: 0.25 + 0.125 of the eight questions."""
    base = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    after = ([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    runs = [put_run(tmp_path / f"both_seed_{seed}", {0: base, 1: after[seed]}, seed) for seed in (0, 1)]
    call_here("grath.report", *runs)
    lines = comparison(runs[0])
    assert ["run", "seed"] in lines and ["both", "0, 1"] in lines
    assert ["both: M_0 (base)", "12.50"] in lines  # no standard error beside a paired interval
    (row,) = [line for line in lines if line[0] == "both: M_1" and len(line) == 2]
    gain, low, high = (float(number) for number in re.findall(r"[-+][\d.]+", row[1]))
    assert row[1].startswith("37.50 (+25.00 [") and gain == 25
    # By hand: eight draws of 100, 50, 50 and five 0; their mean's standard deviation is 12.5.
    assert -1 < low < 12.5 and 37.5 < high < 56.25
    # The questions with odd numbers have a negated gold answer: of these, one is gained by both, one by one seed.
    (row,) = [line for line in lines if line[0] == "both: M_1" and len(line) == 3]
    assert row[1].startswith("37.50 (+37.50 [") and row[2].startswith("37.50 (+12.50 [")
    # Another set of questions cannot be paired.
    file = runs[0] / "results" / "iter_1" / "truthfulqa_mc1.json"
    changed = json.loads(file.read_text(encoding="utf-8"))
    changed["questions"]["sha256"] = "1"
    file.write_text(json.dumps(changed))
    put_record(file.with_name("settings.json"), [file])
    done = call_here("grath.report", runs[0])
    assert "37.50 (other questions than the base's)" in done.stdout and "[" not in done.stdout


@pytest.mark.parametrize(
    ("second", "names"),
    [
        (("x_seed_1", 1, {}), ["x"]),
        (("y_seed_0", 0, {}), ["x", "y"]),  # the same run twice
        (("x_seed_1", 1, {"beta": 9}), ["x", "x_seed_1"]),
        (("x_seed_1", 1, {"output_dir": "elsewhere", "save_steps": 9}), ["x"]),
    ],
)
def test_only_runs_that_differ_in_the_seed_are_pooled(second, names, tmp_path):
    name, seed, settings = second
    scores = {0: [0.0, 1.0], 1: [1.0, 1.0]}
    runs = [put_run(tmp_path / "x_seed_0", scores, 0), put_run(tmp_path / name, scores, seed, **settings)]
    call_here("grath.report", *runs)
    labels = [line[0].partition(":")[0] for line in comparison(runs[0]) if line[0].endswith(": M_1")]
    assert list(dict.fromkeys(labels)) == names


def test_the_truth_signal_in_report_and_comparison(tmp_path):
    """Also in a run that was moved; where the questions are not on this machine, a dash."""
    kept, run = "+1.000 [+1.000, +1.000]", put_run(tmp_path / "run", {0: [1.0, 0.0]})
    questions = load_questions(data_path=BUNDLED)[:6]
    right = [(row["question"], row["choices"][row["answer"]], row["choices"][row["answer"] - 1]) for row in questions]
    hub = {"data_name": "x", "subdata_name": "x", "split": "train"}
    for path, shown in (("data/questions.jsonl", kept), ("gone.jsonl", kept), ("gone.jsonl", "-")):
        put_pairs(run, 0, right, data_path=path, **hub)
        call_here("grath.report", run)
        assert [row[5] for row in cells_of(page(run)) if row[0] == "M_0 -> M_1"] == [shown]
        if path != "data/questions.jsonl":  # what an earlier report found was kept
            (run / "pairs.json").unlink()
        call_here("grath.report", run, put_run(tmp_path / "other", {0: [0.0, 0.0]}))
        expected = shown if path == "data/questions.jsonl" else "-"
        assert [row[6] for row in comparison(run) if row[:2] == ["run", "M_0"]] == [expected]
