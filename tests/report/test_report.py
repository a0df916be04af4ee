"""The report of a run, and of several runs."""

import json
import re
import shutil

import pytest
from made_runs import put_model, put_pairs, put_record, put_run, put_scores, result
from support import BUNDLED, call_here, cells_of, change_json, rows, write_rows

from grath.common.files import sha256
from grath.pairs.questions import load_questions
from grath.report.pages import made_with
from grath.report.tables import best_iteration, table


@pytest.fixture
def made_run(tmp_path):
    """A run of three iterations without scores of single questions: M_1 is best, M_3 lacks MC2."""
    run = put_run(tmp_path / "a run", dict(enumerate([0.30, 0.40, 0.35, 0.20])))
    for number, mc2 in enumerate([0.45, 0.50, 0.49]):
        put_scores(run, number, "truthfulqa_mc2", mc2)
    for number in range(4):
        samples = run / "results" / f"iter_{number}" / "samples.jsonl"
        write_rows(samples, [{"question": "Is ice cold?", "answer": f"Answer\n{number}"}])
    put_pairs(run, 0, [("Is it q?", "a", "a"), ("r", "a", "b"), ("Why s?", "Why s.", "not b")], demos="halueval")
    return run


def page(run):
    return (run / "report.md").read_text(encoding="utf-8")


def comparison(*runs):
    """The cells of the comparison of runs, and what is printed."""
    printed = call_here("grath.report", *runs).stdout
    return cells_of((runs[0].parent / "comparison.md").read_text(encoding="utf-8")), printed


def test_what_is_printed_equal_is_not_called_lower():
    scores = {"M_0": 40.241, "M_1": 40.239}
    of = {"version": 2.0, "questions": None}
    scored = [
        (name, {"grath_mc1": {"score": 33.0, **of}, "grath_mc2": {"score": score, **of}})
        for name, score in scores.items()
    ]
    assert best_iteration(scored) == ["Best by MC1 (bundled) + MC2 (bundled): M_0 (73.24)."]
    # Nor what was not scored.
    lacking = [scored[0], ("M_1", {name: {"score": 1.0, **of} for name in scored[1][1]}), ("M_2", {})]
    assert best_iteration(lacking) == best_iteration(scored)
    # Nor what has other questions, or is of another version of the task.
    for other in ({"version": 1.0}, {"questions": {"sha256": "x", "scores": [1.0]}}):
        scored_otherwise = ("M_2", {name: {"score": 99.0, **of, **other} for name in scored[1][1]})
        assert best_iteration([*scored, scored_otherwise]) == best_iteration(scored)
    assert best_iteration(lacking[:2])[0].endswith(": M_0 (73.24); every later iteration is lower (the last: 2.00).")


def test_report_of_a_run(made_run):
    """Every byte of published reports is compared in results/tests/test_published.py."""
    (made_run / "report.md").write_text("of later")
    done = call_here("grath.report", made_run)
    text, cells = page(made_run), cells_of(page(made_run))
    assert ["M_1", "40.00 ± 1.00 (+10.00)", "50.00 ± 1.00 (+5.00)"] in cells
    assert ["M_3", "20.00 ± 1.00 (-10.00)", "-"] in cells
    assert "Best by MC1 + MC2: M_1 (90.00)." in text  # M_3 lacks MC2
    (trained,) = [row for row in cells if row[0] == "M_0 -> M_1"]
    assert trained[1:5] == ["5", "3", "1", "1"] and trained[-4:] == ["2", "9", "0.125", "-"]
    assert "- M_2: too many steps" in text and "- M_3: Answer 3" in text
    assert (made_run / "iterations.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (made_run / "iterations.svg").read_text(encoding="utf-8")
    assert "Best by MC1 + MC2: M_1" in done.stdout


def test_names_are_shown_as_they_are(tmp_path):
    """A name that looks like a number; HTML in that of a package. Any folder of data is not a run."""
    assert cells_of(table(["run", "distance"], [["5e-4", 0.5], ["007", None]]))[2:] == [["5e-4", "0.500"], ["007", "-"]]
    assert "<img" not in made_with([{"versions": {"<img src=x>": "1"}}])
    (tmp_path / "data").mkdir()
    assert "contains neither a run" in call_here("grath.report", tmp_path, status=2).stderr


def test_unfinished_stages_are_not_shown(made_run):
    """A record is written when its stage starts, and gets the rest when it ends. M_1 starts from an adapter here."""
    shutil.rmtree(made_run / "results")
    shutil.rmtree(next(made_run.glob("models/iter_3_*")))
    put_model(made_run, 1, adapter="runs/first/models/iter_1")
    next(made_run.glob("data/*True.json")).unlink()
    later = {"models/iter_2_*/grath.json": ["files"], "data/*.record.json": ["files", "settings"]}
    for pattern, names in later.items():
        (path,) = made_run.glob(pattern)
        record = {name: value for name, value in json.loads(path.read_text()).items() if name not in names}
        path.write_text(json.dumps(record))
    printed = call_here("grath.report", made_run).stdout
    assert "M_1" in printed and "M_2" not in printed and "Best by" not in printed
    assert not (made_run / "iterations.png").exists()
    assert "Base model: runs/first/models/iter_1" in page(made_run)
    assert [row[1] for row in cells_of(page(made_run)) if row[0] == "M_0 -> M_1"] == ["-"]
    # A run whose base is being scored has neither models nor data yet.
    run = put_run(made_run.with_name("run"), {0: [1.0, 0.0]})
    assert "50.00" in call_here("grath.report", run).stdout and "No iteration yet." in page(run)


@pytest.mark.parametrize("edited", ["data/*True.json", "results/iter_1/truthfulqa_mc1.json"])
def test_an_edited_file_is_refused(edited, made_run):
    (file,) = made_run.glob(edited)
    file.write_text(file.read_text().replace("a", "e"))
    done = call_here("grath.report", made_run, status=2)
    assert f"{file} is not the file that was written: " in done.stderr and done.stderr.count("\n") == 1
    assert not (made_run / "report.md").exists()


def test_a_folder_of_result_files(tmp_path):
    """A perplexity is not shown in percent. A group has no version of its own."""
    scores = {"wikitext": ("word_perplexity", 25.25), "ifeval": ("prompt_level_strict_acc", 0.3125), "pisa": ("acc", 1)}
    for task, (metric, value) in scores.items():
        made = result(task, 0.5, results={task: {f"{metric},none": value}}, versions={task: "N/A"})
        (tmp_path / f"{task}.json").write_text(json.dumps(made))
    shown = call_here("grath.report", tmp_path).stdout
    assert "25.25" in shown and "31.25" in shown and "100.00" in shown


def test_comparison_of_two_runs(made_run):
    other = made_run.with_name("another run")
    shutil.copytree(made_run, other)
    put_scores(other, 1, "truthfulqa_mc1", 0.38)
    path = next(other.glob("data/*.record.json"))
    path.write_text(path.read_text().replace("halueval", "misconceptions"))
    pairs = next(other.glob("data/*True.json"))
    found = {"distance": 0.25, "probe": 0.875, "pairs": 2, "model": "m", "pairs_sha256": sha256(pairs)}
    pairs.with_suffix(".distance.json").write_text(json.dumps(found))
    other_pairs = next(made_run.glob("data/*True.json")).with_suffix(".distance.json")
    other_pairs.write_text(json.dumps(found | {"pairs_sha256": "of pairs that are gone"}))
    lines, printed = comparison(made_run, other)
    assert lines[0] == ["run", "pairs demos"]  # not the seed, which is the same in both
    assert ["a run", "halueval"] in lines and ["another run", "misconceptions"] in lines
    assert ["a run: M_1", "40.00 ± 1.00 (+10.00)", "50.00 ± 1.00 (+5.00)"] in lines
    assert ["another run: M_1", "38.00 ± 1.00 (+8.00)", "50.00 ± 1.00 (+5.00)"] in lines
    assert sum("M_0" in line[0] for line in lines) == 1  # the shared base appears once
    assert ["another run", "M_0", "5", "3", "1", "1", "-", "0.250", "0.875", "0.000 / 0.500", "1.5 / 1.5"] in lines
    assert ["a run", "M_0", "5", "3", "1", "1", "-", "-", "-", "0.000 / 0.500", "1.5 / 1.5"] in lines
    assert (made_run.parent / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "Wrote comparison.md, comparison.png in" in printed
    # A published run has no pairs and no weights: what the report wrote is enough.
    for run in (made_run, other):
        call_here("grath.report", run)
        next(run.glob("data/*True.json")).unlink()
    assert comparison(made_run, other) == (lines, printed)
    done = call_here("grath.report", made_run, other, made_run.parent, status=2)
    assert "is not a run folder: it contains neither models, data nor scores of M_0" in done.stderr


def test_seeds_are_pooled_question_by_question(tmp_path):
    """Both seeds gain the same question, and one seed each another: 0.25 + 0.125 of the eight questions."""
    base = [1.0, *[0.0] * 7]
    after = ([1.0, 1.0, 1.0, *[0.0] * 5], [1.0, 1.0, 0.0, 1.0, *[0.0] * 4])
    runs = [put_run(tmp_path / f"both_seed_{seed}", {0: base, 1: after[seed]}, seed) for seed in (0, 1)]
    # What one seed lacks is that of the other.
    put_run(runs[0], {2: base})
    for number, scores in enumerate((base, after[0])):
        put_scores(runs[0], number, "truthfulqa_mc2", scores)
    lines, _ = comparison(*runs)
    assert ["run", "seed"] in lines and ["both", "0, 1"] in lines
    first, second, third = [line for line in lines if line[0].startswith("both: M")]
    assert first == ["both: M_0 (base)", "12.50", "12.50 (1 of 2 runs)"]  # no standard error next to a paired interval
    gain, low, high = (float(number) for number in re.findall(r"[-+][\d.]+", second[1]))
    assert second[1].startswith("37.50 (+25.00 [") and gain == 25
    # By hand: eight draws of 100, 50, 50 and five 0; their mean's standard deviation is 12.5.
    assert -1 < low < 12.5 and 37.5 < high < 56.25
    assert re.fullmatch(r"37\.50 \(\+25\.00 \[.*\]; 1 of 2 runs\)", second[2])
    assert third == ["both: M_2 (1 of 2 runs)", "12.50 (+0.00 [+0.00, +0.00])", "-"]
    # Another set of questions cannot be paired.
    file = runs[0] / "results" / "iter_1" / "truthfulqa_mc1.json"
    file.write_text(file.read_text().replace('"sha256": "', '"sha256": "other'))
    put_record(file.with_name("settings.json"), [file])
    call_here("grath.report", runs[0])
    assert ["M_1", "37.50 (other questions than the base's)", "-"] in cells_of(page(runs[0]))
    (second,) = [line for line in comparison(*runs)[0] if line[0] == "both: M_1"]
    assert second[1] == "37.50 (runs with different questions)"


def test_only_runs_that_differ_in_the_seed_are_pooled(tmp_path):
    scores = {0: [0.0, 1.0], 1: [1.0, 1.0]}
    runs = [
        put_run(tmp_path / "x_seed_0", scores, 0),
        put_run(tmp_path / "x_seed_1", scores, 1, output_dir="elsewhere", save_steps=9),
        put_run(tmp_path / "x_seed_2", scores, 2, beta=9),
        put_run(tmp_path / "y_seed_0", scores, 0),  # the same as the first
    ]
    lines, _ = comparison(*runs)
    assert [line[0] for line in lines if ": M_1" in line[0]] == ["x: M_1", "x_seed_2: M_1", "y: M_1"]
    assert [line[1] for line in lines if line[0] == "x"] == ["0, 1"]


def test_the_truth_signal(tmp_path):
    """Also in a moved run; where the questions are not here, or have changed, an earlier report's signal, or a dash."""
    questions = load_questions(data_path=BUNDLED)[:6]
    right = [(row["question"], row["choices"][row["answer"]], row["choices"][row["answer"] - 1]) for row in questions]

    def signals(path):
        put_pairs(tmp_path, 0, right, questions, data_path=path)
        call_here("grath.report", tmp_path)
        return [row[5] for row in cells_of(page(tmp_path)) if row[0] == "M_0 -> M_1"]

    others = write_rows(tmp_path / "others.jsonl", rows(BUNDLED)[::-1])
    for path in ("data/questions.jsonl", "gone.jsonl", str(others)):
        assert signals(path) == ["+1.000 [+1.000, +1.000]"]
    (tmp_path / "pairs.json").unlink()
    assert signals("gone.jsonl") == ["-"]


def test_stages_with_different_bases_are_refused(made_run):
    """The base was replaced during the run."""
    records = [made_run / "results" / "iter_0" / "settings.json", next(made_run.glob("models/iter_1_*/grath.json"))]
    for path, weights in zip(records, ("a" * 64, "b" * 64), strict=True):
        change_json(path, inputs={"model": {"base": {"model.safetensors": weights, "config.json": "c" * 64}}})
    done = call_here("grath.report", made_run, status=2)
    assert "scores of M_0 was made with model.safetensors aaaaaaaaaaaa, not bbbbbbbbbbbb: dpo of M_1" in done.stderr


def test_scores_of_a_model_that_was_trained_again_are_refused(made_run):
    models = [path.parent for path in sorted(made_run.glob("models/iter_*/grath.json"))]
    files = {"adapter_config.json": "c" * 64, "adapter_model.safetensors": "1" * 64}
    change_json(models[0] / "grath.json", files=files)
    for path in (made_run / "results" / "iter_1" / "settings.json", models[1] / "grath.json"):
        change_json(path, inputs={"model": {"adapter": files}})
    call_here("grath.report", made_run)
    path.write_text(path.read_text().replace("1" * 64, "2" * 64))
    done = call_here("grath.report", made_run, status=2)
    assert "dpo of M_2 was made with adapter_model.safetensors 222222222222, not 111111111111" in done.stderr
    shutil.rmtree(models[0])
    assert "contains M_2, but no finished M_1" in call_here("grath.report", made_run, status=2).stderr
    for model in models[1:]:
        shutil.rmtree(model)
    done = call_here("grath.report", made_run)
    assert f"{made_run / 'results' / 'iter_1'} is left out: there is no finished M_1" in done.stderr
    assert "M_0" in done.stdout and "M_1" not in done.stdout


def test_the_end_of_a_training_and_the_record_of_its_own_pairs_are_shown(made_run):
    """The last line of TRL's log has the rewards since the one before. Another start left a record of other pairs."""
    log = next(made_run.glob("models/iter_1_*/training_log.jsonl"))
    write_rows(log, [*rows(log)[:-1], {"step": 15, "train_loss": 0.1, "rewards/margins": 0.25}])
    left = next(made_run.glob("data/iter0_*.record.json")).with_name(
        "iter0_arcc_num_100_useGT_True_useFS_True.json.record.json"
    )
    put_record(left, inputs={"max_new_tokens": 50})
    call_here("grath.report", made_run)
    (trained,) = [row for row in cells_of(page(made_run)) if row[0] == "M_0 -> M_1"]
    assert trained[-3:] == ["15", "0.250", "-"] and ["pairs demos", "halueval"] in cells_of(page(made_run))
    assert not any(row[0] == "pairs max_new_tokens" for row in cells_of(page(made_run)))


def test_other_versions_of_a_task_are_not_compared_and_two_files_of_one_are_refused(made_run):
    file = made_run / "results" / "iter_1" / "truthfulqa_mc1.json"
    file.write_text(file.read_text().replace('"truthfulqa_mc1": 2.0', '"truthfulqa_mc1": 1.0'))
    put_record(file.with_name("settings.json"), file.parent.glob("truth*.json"))
    call_here("grath.report", made_run)
    shown = [row[1] for row in cells_of(page(made_run)) if row[0] == "M_1"]
    assert shown[0] == "40.00 ± 1.00 (another task version than the base's)"
    (made_run / "mine").mkdir()
    for name in ("a.json", "b.json"):
        shutil.copy(file, made_run / "mine" / name)
    assert "both have truthfulqa_mc1: move one away" in call_here("grath.report", made_run / "mine", status=2).stderr
