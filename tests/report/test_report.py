"""The report of a run and of several runs, and the distance between correct and incorrect answers."""

import json
import os
import re
import shutil

import pytest
from support import HUB, PROJECT, call, call_here, cells_of, needs_hub, pair, write_rows

from grath.pairs.questions import load_questions


def result(task, score, stderr=1.0, chat=None):
    return {
        "results": {task: {"acc,none": score, "acc_stderr,none": stderr / 100}},
        "versions": {task: 2.0},
        "lm_eval_version": "0.4.13",
        "chat_template": chat,
    }


@pytest.fixture
def made_run(tmp_path):
    """A handmade run folder of three iterations: M_1 is best, M_3 lacks MC2."""
    run = tmp_path / "a run"
    values = {0: (0.30, 0.45), 1: (0.40, 0.50), 2: (0.35, 0.49), 3: (0.2, None)}
    for number, scores in values.items():
        folder = run / "results" / f"iter_{number}"
        folder.mkdir(parents=True)
        for task, value in zip(("truthfulqa_mc1", "truthfulqa_mc2"), scores, strict=True):
            if value is not None:
                (folder / f"{task}.json").write_text(json.dumps(result(task, value)))
        write_rows(folder / "samples.jsonl", [{"question": "Is ice cold?", "answer": f"Answer {number}"}])
        if number:
            model = run / "models" / f"iter_{number}_arcc"
            model.mkdir(parents=True)
            (model / "adapter_model.safetensors").write_bytes(b"")
            (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "me/Llama-2-7b-chat-hf"}))
            write_rows(model / "training_log.jsonl", [{"step": 9, "loss": 0.5, "rewards/margins": 0.125 * number}])
            record = {"pairs": {"kept": 2}, "warnings": ["too many steps"], "adapter_sha256": "0"}
            (model / "grath.json").write_text(json.dumps(record))
    (run / "data").mkdir()
    pairs = [("Is it q?", "a", "a"), ("r", "a", "b"), ("Why s?", "Why s.", "not b")]
    write_rows(
        run / "data" / "iter0_arcc_num_5_useGT_False_useFS_True.json",
        [{"question": q, "correct": c, "incorrect": i} for q, c, i in pairs],
    )
    return run


def test_what_is_printed_equal_is_not_called_lower():
    from grath.report.tables import best_iteration

    rows = [
        (name, {"grath_mc1": {"score": 33.0}, "grath_mc2": {"score": score}})
        for name, score in [("M_0", 40.241), ("M_1", 40.239)]
    ]
    assert best_iteration(rows) == ["Best by MC1 (bundled) + MC2 (bundled): M_0 (73.24)."]


def test_report_of_a_run(made_run):
    done = call_here("grath.report", made_run)
    text = (made_run / "report.md").read_text(encoding="utf-8")
    assert "| M_1        | 40.00 ± 1.00 (+10.00) | 50.00 ± 1.00 (+5.00) |" in text
    assert "| M_3        | 20.00 ± 1.00 (-10.00) | -                    |" in text
    assert "Best by MC1 + MC2: M_1 (90.00); every later iteration is lower (the last: 84.00)." in text
    assert "No score of M_3 yet: MC2." in text
    assert "MC1 30.23 -> 54.71" in text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "->" in line]
    assert cells[1][:5] == ["M_0 -> M_1", "5", "3", "1", "1"] and "0.125" in cells[1]
    assert "- M_2: too many steps" in text
    assert "- M_3: Answer 3" in text
    assert "truthfulqa_mc1 2.0; truthfulqa_mc2 2.0; chat template off" in text
    assert (made_run / "iterations.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (made_run / "iterations.svg").read_text(encoding="utf-8")
    assert "Best by MC1 + MC2: M_1" in done.stdout


def test_report_of_a_run_with_one_iteration_and_no_scores(made_run):
    shutil.rmtree(made_run / "results")
    for number in (2, 3):
        shutil.rmtree(made_run / "models" / f"iter_{number}_arcc")
    done = call_here("grath.report", made_run)
    assert "No score of M_0 (base) yet." in done.stdout and "No score of M_1 yet." in done.stdout
    assert "Best by" not in done.stdout
    assert not (made_run / "iterations.png").exists()


def test_report_names_commits_and_versions_of_the_run(made_run):
    """The report does not name the commit and versions at the time of writing."""
    entry = {"title": "t", "iteration": 0, "seconds": 1, "starts": 1, "outcome": "done"}
    stages = [
        {**entry, "stage": "pairs", "commit": "abc1234", "versions": {"torch": "2.0", "bitsandbytes": None}},
        {**entry, "stage": "dpo", "commit": "def5678+", "versions": {"torch": "2.1", "bitsandbytes": None}},
    ]
    manifest = {"format": 2, "settings": {"SEED": "0"}, "inputs": {}, "hash_cache": {}, "stages": stages}
    (made_run / "manifest.json").write_text(json.dumps(manifest))
    call_here("grath.report", made_run)
    lines = (made_run / "report.md").read_text(encoding="utf-8").splitlines()
    assert "Commit: abc1234, def5678+" in lines and "Versions: torch 2.0 and 2.1, bitsandbytes none" in lines


@pytest.mark.parametrize("name", ["rolling", "fixed", "useGT", "halueval"])
def test_published_report_names_commits_and_versions_of_its_manifest(name):
    from grath.report.run import made_with

    folder = PROJECT / "results" / name
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert (folder / "report.md").read_text(encoding="utf-8").endswith(f"\n{made_with(manifest['stages'])}\n")


@pytest.mark.parametrize("content", ["[]", '{"results": {'])
def test_damaged_result_file_gives_one_line(content, tmp_path):
    (tmp_path / "arc_challenge.json").write_text(content)
    done = call_here("grath.report", tmp_path, status=2)
    assert done.stderr.endswith("arc_challenge.json is damaged, or not a result file of lm-evaluation-harness\n")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def two_runs(made_run):
    """Two runs that differ in their few-shot examples and in the score of M_1."""
    other = made_run.with_name("another run")
    shutil.copytree(made_run, other)
    (other / "results" / "iter_1" / "truthfulqa_mc1.json").write_text(json.dumps(result("truthfulqa_mc1", 0.38)))
    for folder, demos in ((made_run, "truthfulqa"), (other, "halueval")):
        settings = {"DEMOS": demos, "SEED": "0"}
        manifest = {"format": 2, "settings": settings, "inputs": {}, "hash_cache": {}, "stages": []}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    found = {"distance": 0.25, "probe": 0.875, "pairs": 2, "model": "m"}
    (other / "data" / "iter0_arcc_num_5_useGT_False_useFS_True.distance.json").write_text(json.dumps(found))
    return made_run, other


def test_comparison_of_two_runs(two_runs):
    done = call_here("grath.report", *two_runs)
    text = (two_runs[0].parent / "comparison.md").read_text(encoding="utf-8")
    lines = cells_of(text)
    assert ["run", "DEMOS"] in lines  # not SEED, which is the same in both
    assert ["a run", "truthfulqa"] in lines and ["another run", "halueval"] in lines
    assert ["a run: M_1", "40.00 ± 1.00 (+10.00)", "50.00 ± 1.00 (+5.00)"] in lines
    assert ["another run: M_1", "38.00 ± 1.00 (+8.00)", "50.00 ± 1.00 (+5.00)"] in lines
    assert sum("M_0" in line[0] for line in lines) == 1  # the shared base appears once
    assert ["another run", "M_0", "5", "3", "1", "1", "-", "0.250", "0.875", "0.000 / 0.500", "1.5 / 1.5"] in lines
    assert ["a run", "M_0", "5", "3", "1", "1", "-", "-", "-", "0.000 / 0.500", "1.5 / 1.5"] in lines
    for name in ("comparison.png", "summary.png"):
        assert (two_runs[0].parent / name).read_bytes().startswith(b"\x89PNG")
    assert "Wrote comparison.md, comparison.png, summary.png in" in done.stdout
    # With different bases, each has its own row, and the differences are from a run's own base.
    base = two_runs[1] / "results" / "iter_0" / "truthfulqa_mc1.json"
    base.write_text(json.dumps(result("truthfulqa_mc1", 0.25)))
    done = call_here("grath.report", *two_runs)
    assert sum(": M_0" in line for line in done.stdout.splitlines()) == 2
    assert "40.00 ± 1.00 (+10.00)" in done.stdout and "38.00 ± 1.00 (+13.00)" in done.stdout
    done = call_here("grath.report", *two_runs, two_runs[0].parent, status=2)
    assert "is not a run folder: it contains no manifest.json" in done.stderr


def make_scored_run(run, settings, scores):
    """Make a run folder whose M_i has these MC1 scores of single questions (i -> list)."""
    for number, of_questions in scores.items():
        folder = run / "results" / f"iter_{number}"
        folder.mkdir(parents=True)
        made = result("truthfulqa_mc1", sum(of_questions) / len(of_questions))
        negated = [i % 2 for i in range(len(of_questions))]
        made["questions"] = {"sha256": "0", "scores": of_questions, "negated": negated}
        (folder / "truthfulqa_mc1.json").write_text(json.dumps(made))
        if number:
            model = run / "models" / f"iter_{number}_arcc"
            model.mkdir(parents=True)
            (model / "adapter_model.safetensors").write_bytes(b"")
            (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base"}))
            (model / "grath.json").write_text(json.dumps({"adapter_sha256": "0"}))
    manifest = {"format": 2, "settings": settings, "inputs": {}, "hash_cache": {}, "stages": []}
    (run / "manifest.json").write_text(json.dumps(manifest))
    return run


def test_a_run_that_starts_from_an_adapter_has_it_as_its_base(tmp_path):
    from grath.report.runs import iterations

    run = make_scored_run(tmp_path / "run", {}, {0: [1.0, 0.0], 1: [1.0, 1.0]})
    assert iterations(run)[0]["model"] == "base"
    (run / "models" / "iter_1_arcc" / "grath.json").write_text(json.dumps({"incoming_adapter": "first"}))
    assert iterations(run)[0]["model"] == "first"


def test_a_run_whose_base_is_being_scored_has_a_report(tmp_path):
    """It has neither models nor data yet."""
    run = make_scored_run(tmp_path / "run", {}, {0: [1.0, 0.0]})
    assert "50.00" in call_here("grath.report", run).stdout and (run / "report.md").is_file()


def test_a_perplexity_is_not_shown_in_percent(tmp_path):
    made = result("wikitext", 0.5) | {"results": {"wikitext": {"word_perplexity,none": 25.25}}}
    (tmp_path / "wikitext.json").write_text(json.dumps(made))
    made = result("ifeval", 0.5) | {"results": {"ifeval": {"prompt_level_strict_acc,none": 0.3125}}}
    (tmp_path / "ifeval.json").write_text(json.dumps(made))
    shown = call_here("grath.report", tmp_path).stdout
    assert "25.25" in shown and "31.25" in shown


def test_an_interval_of_equal_values_can_be_plotted(tmp_path):
    """The bootstrap's ends may miss the mean by a rounding error; matplotlib refuses a negative length."""
    from matplotlib.figure import Figure

    from grath.report.plots import _lengths

    mean = 0.1 + 0.2
    Figure().subplots().errorbar(mean, 0, xerr=_lengths(mean, mean + 1e-12, mean - 1e-12))


def test_a_model_that_not_all_seeds_have_says_so(tmp_path):
    """Also in the figure, which shows the first and the last model of each group."""
    from grath.report.groups import group_runs
    from grath.report.plots import _first_and_last

    scores = [[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]
    runs = [
        make_scored_run(tmp_path / f"both_seed_{seed}", {"SEED": str(seed)}, dict(enumerate(scores[:models])))
        for seed, models in enumerate((4, 2))
    ]
    call_here("grath.report", *runs)
    names = [line[0] for line in cells_of((tmp_path / "comparison.md").read_text(encoding="utf-8")) if len(line) == 2]
    shown = ["both: M_1", "both: M_2 (1 of 2 runs)", "both: M_3 (1 of 2 runs)"]
    assert [name for name in names if name.startswith("both: M")] == ["both: M_0 (base)", *shown]
    # A task that one seed lacks is that of the other.
    for number, of_questions in enumerate(([0.0, 0.0], [1.0, 0.0])):
        mc2 = result("truthfulqa_mc2", sum(of_questions) / 2)
        mc2["questions"] = {"sha256": "2", "scores": of_questions}
        (runs[0] / "results" / f"iter_{number}" / "truthfulqa_mc2.json").write_text(json.dumps(mc2))
    call_here("grath.report", *runs)
    lines = [line for line in cells_of((tmp_path / "comparison.md").read_text(encoding="utf-8")) if len(line) == 3]
    mc2 = {line[0]: line[2] for line in reversed(lines)}  # of the first table
    assert mc2["both: M_0 (base)"] == "0.00 (1 of 2 runs)"
    assert re.fullmatch(r"50\.00 \(\+50\.00 \[.*\]; 1 of 2 runs\)", mc2["both: M_1"])
    (group,) = group_runs(runs)
    assert [name for _, name, _ in _first_and_last(group, ["truthfulqa_mc1"])] == [shown[0], shown[2]]
    (alone,) = group_runs(runs[1:])
    assert [name for _, name, _ in _first_and_last(alone, ["truthfulqa_mc1"])] == ["both: M_1"]


def test_seeds_are_pooled_question_by_question(tmp_path):
    """Both seeds gain the same question, and one seed each another: 0.25 + 0.125 of the eight questions."""
    base = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    after = ([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    runs = [
        make_scored_run(tmp_path / f"both_seed_{seed}", {"SEED": str(seed)}, {0: base, 1: after[seed]})
        for seed in (0, 1)
    ]
    call_here("grath.report", *runs)
    lines = cells_of((tmp_path / "comparison.md").read_text(encoding="utf-8"))
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
    done = call_here("grath.report", runs[0])
    assert "37.50 (other questions than the base's)" in done.stdout and "[" not in done.stdout.split("Wrote")[
        0
    ].replace("in brackets", "")


def test_a_control_is_scored_on_what_it_has_not_trained_on(tmp_path):
    """Each fold gains all questions that it trained on and one of the others; only these others count."""
    base = [0.0] * 8
    folds = {"[:4]": [1.0] * 4 + [1.0, 0.0, 0.0, 0.0], "[4:]": [1.0, 0.0, 0.0, 0.0] + [1.0] * 4}
    runs = [
        make_scored_run(
            tmp_path / f"control_{at}_seed_0", {"SEED": "0", "GOLD_PAIRS": f"truthful_qa{rows}"}, {0: base, 1: after}
        )
        for at, (rows, after) in enumerate(folds.items())
    ]
    assert "25.00 (+25.00 [" in call_here("grath.report", runs[0]).stdout
    done = call_here("grath.report", *runs)
    assert "control: M_1" in done.stdout and "25.00 (+25.00 [" in done.stdout
    assert "TruthfulQA: the 4 questions that the run has not trained on." in (runs[0] / "report.md").read_text(
        encoding="utf-8"
    )
    for run in runs:  # as it is published
        call_here("grath.report", run)
        (run / "models" / "iter_1_arcc" / "adapter_model.safetensors").unlink()
    assert "25.00 (+25.00 [" in call_here("grath.report", *runs).stdout
    shutil.rmtree(runs[1] / "results" / "iter_1")
    assert "25.00 (+25.00 [" in call_here("grath.report", *runs).stdout
    # Trained on all: nothing is held out, and no score is shown.
    every = make_scored_run(tmp_path / "every", {"GOLD_PAIRS": "truthful_qa"}, {0: base, 1: [1.0] * 8})
    done = call_here("grath.report", every)
    assert "100.00" not in done.stdout and "TruthfulQA is left out" in done.stdout and "No score" not in done.stdout


def test_only_seeds_and_disjoint_folds_are_pooled(tmp_path):
    def names(*settings):
        from grath.report.groups import group_runs

        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        scores = {0: [0.0] * 8, 1: [1.0] * 8}
        made = [make_scored_run(tmp_path / "runs" / name, values, scores) for name, values in settings]
        return [group["name"] for group in group_runs(made)]

    assert names(("x_seed_0", {"SEED": "0"}), ("x_seed_1", {"SEED": "1"})) == ["x"]
    # The same run twice, another setting, and overlapping rows are not.
    assert names(("x_seed_0", {"SEED": "0"}), ("y_seed_0", {"SEED": "0"})) == ["x", "y"]
    assert names(("x_seed_0", {"SEED": "0"}), ("x_seed_1", {"SEED": "1", "BETA": "9"})) == ["x", "x_seed_1"]
    folds = [(f"c_{n}_seed_0", {"SEED": "0", "GOLD_PAIRS": f"truthful_qa[{n}]"}) for n in (":4", "4:", ":6")]
    assert names(*folds) == ["c", "c_:6"]


def test_an_unfinished_training_is_no_iteration(made_run):
    """DPO writes the record first and the adapter last."""
    call_here("grath.report", made_run)
    model = made_run / "models" / "iter_3_arcc"
    (model / "adapter_model.safetensors").unlink()
    (model / "grath.json").write_text(json.dumps({"pairs": {"kept": 2}}))
    assert "M_3" not in call_here("grath.report", made_run).stdout


def test_a_published_run_needs_no_pairs_and_no_weights(two_runs):
    """What the report wrote is enough for the comparison."""
    for run in two_runs:
        call_here("grath.report", run)
    call_here("grath.report", *two_runs)
    page = two_runs[0].parent / "comparison.md"
    before = page.read_text(encoding="utf-8")
    for run in two_runs:
        for file in (*run.glob("data/*True.json"), *run.glob("models/*/adapter_model.safetensors")):
            file.unlink()
    call_here("grath.report", *two_runs)
    assert page.read_text(encoding="utf-8") == before


def test_a_published_copy_has_no_weights_no_pairs_and_no_places(made_run, tmp_path):
    call_here("grath.report", made_run)
    root = tmp_path / "hub"
    settings = {"DATA_PATH": f"{made_run}/x", "DEMOS": "/a/clone/demos.json", "DATA_NAME": f"{root}/arc"}
    manifest = {"format": 2, "settings": settings, "inputs": {}, "hash_cache": {}, "stages": []}
    (made_run / "manifest.json").write_text(json.dumps(manifest))
    out = tmp_path / "out"
    (out / made_run.name / "old").mkdir(parents=True)
    # As a path from the project, what DATASETS_ROOT may be.
    env = {"DATASETS_ROOT": os.path.relpath(root, PROJECT)}
    call("results/publish.py", made_run, "--folder", out, "--place", "/a/clone=.", env=env)
    names = {path.name for path in out.rglob("*") if path.is_file()}
    assert {"report.md", "pairs.json", "grath.json", "truthfulqa_mc1.json", "iterations.png"} <= names
    assert not any(name.endswith((".safetensors", "_True.json")) for name in names)
    assert not (out / made_run.name / "old").exists()
    copy = json.loads((out / made_run.name / "manifest.json").read_text(encoding="utf-8"))
    assert copy["settings"] == {
        "DATA_PATH": f"runs/{made_run.name}/x",
        "DEMOS": "./demos.json",
        "DATA_NAME": "$folder/arc",
    }
    done = call("results/publish.py", out / made_run.name, "--folder", out, status=2)
    assert "choose another --folder" in done.stderr and (out / made_run.name / "report.md").is_file()
    shutil.rmtree(out)
    (made_run / "pairs.json").unlink()
    assert "has no pairs.json" in call("results/publish.py", made_run, "--folder", out, status=2).stderr
    done = call("results/publish.py", made_run, "--place", "/a/clone", status=2)
    assert "--place /a/clone is not PATH=TEXT" in done.stderr


def test_correlation_and_its_interval():
    import numpy

    from grath.report.groups import correlation

    draw = numpy.random.default_rng(0)
    xs = draw.normal(size=400)
    r, low, high = correlation(list(zip(xs, 3 * xs + 4 * draw.normal(size=400), strict=True)))
    # r is 0.6; the standard error of atanh(r) is 1 / sqrt(397).
    assert abs(r - 0.6) < 0.1 and low < r < high and high - low == pytest.approx(2 * 1.96 * (1 - r**2) / 397**0.5, 0.05)
    assert correlation([(0, 1), (1, 0), (2, 0)]) is None and correlation([(1, y) for y in range(9)]) is None


def test_distance_and_probe_of_synthetic_clusters():
    import numpy

    from grath.distance import distance, probe

    draw = numpy.random.default_rng(0)
    here, there = draw.normal(size=(200, 5)), draw.normal(size=(200, 5))
    assert distance(here, here) == 0
    assert distance(here, there) < 0.15
    assert 0.4 < probe(here, there) < 0.6
    there[:, 0] += 20
    # The standard deviation is 1 in each of five directions; the means are 20 apart.
    assert distance(here, there) == pytest.approx(20 / 5**0.5, rel=0.1)
    assert probe(here, there) > 0.99


def test_distance_of_a_pair_file_in_file_and_report(tiny_llama, made_run):
    import torch

    from grath.distance import distance
    from grath.modeling.chat import answer_ids, template_for
    from grath.modeling.loading import load_model, load_tokenizer

    file = made_run / "data" / "iter0_arcc_num_5_useGT_False_useFS_True.json"
    done = call_here("grath.distance", file, "--model_name_or_path", tiny_llama, status=2)
    assert f"{file} has 2 pairs of different answers: at least 5 are needed" in done.stderr
    rows = [pair(f"Is it {i}?", f"Yes, it is {i} indeed.", "No." if i else "Norwegian wood.") for i in range(7)]
    write_rows(file, [*rows, pair("q", "same", "same")])
    flags = ("--model_name_or_path", tiny_llama, "--precision", "fp32", "--batch_size", "3")
    done = call_here("grath.distance", file, *flags)
    found = json.loads(file.with_suffix(".distance.json").read_text(encoding="utf-8"))
    assert found["precision"] == "fp32" and found["negated"] == [0, 6 / 7] and "negated 0.0% and 85.7%" in done.stdout
    assert found["pairs"] == 7 and f"distance {found['distance']:.3f}" in done.stdout

    tokenizer = load_tokenizer(tiny_llama)
    template = template_for(tokenizer, "auto")
    model = load_model(tiny_llama, "fp32")

    def mean_hidden_state(question, answer):
        prompt, ids = answer_ids(tokenizer, [{"role": "user", "content": question}], answer, template)
        with torch.inference_mode():
            hidden = model(torch.tensor([[*prompt, *ids]]), output_hidden_states=True).hidden_states[-1]
        return hidden[0, len(prompt) :].mean(0)

    sides = [
        torch.stack([mean_hidden_state(row["question"], row[side]) for row in rows])
        for side in ("correct", "incorrect")
    ]
    assert found["distance"] == pytest.approx(distance(*(side.numpy() for side in sides)), rel=1e-4)
    call_here("grath.report", made_run)
    assert f"{found['distance']:.3f}" in (made_run / "report.md").read_text(encoding="utf-8")


def test_what_two_models_choose(tmp_path):
    keys = ["No, it is not.", "Nothing happens.", "It rains.", "It can\u2019t.", "Snow."]
    # The other choice is the shorter one.
    for name, chosen in (("before", [1, 1, 0, 1, 0]), ("after", [0, 1, 1, 0, 0])):
        (tmp_path / name).mkdir()
        docs = [
            {
                "question": f"q{i}",
                "mc1_targets": {"choices": [key, "x"], "labels": [1, 0]},
                "mc2_targets": {"choices": [key, "x", "y"], "labels": [1, 1, 0]},
            }
            for i, key in enumerate(keys)
        ]
        likelihoods = [[["-1.5", "True"], ["-12.5", "False"]][:: 1 if right else -1] for right in chosen]
        samples = [
            {"doc": doc, "acc": float(right), "filtered_resps": answers}
            for doc, right, answers in zip(docs, chosen, likelihoods, strict=True)
        ]
        write_rows(tmp_path / name / "samples_truthfulqa_mc1_1.jsonl", samples)
    done = call("results/choices.py", tmp_path / "before", tmp_path / "after")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    assert cells[2:4] == [
        ["with a negation", "3", "50.00", "100.00", "33.33", "0", "2"],
        ["without", "2", "50.00", "0.00", "50.00", "1", "0"],
    ]
    # Only the last gold answer is as short as the other choices.
    assert cells[6:] == [
        ["the shortest, in words", "60.00", "40.00", "60.00", "10.00", "53.33"],
        ["with a negation", "30.00", "60.00", "20.00", "80.00", "86.67"],
        ["without a negation", "70.00", "40.00", "80.00", "20.00", "56.67"],
        ["any", "100.00", "100.00", "100.00", "50.00", "66.67"],
    ]
    assert "score with --log_samples" in call("results/choices.py", tmp_path, tmp_path / "no", status=2).stderr


@needs_hub
def test_gold_answers_in_a_pair_file(tmp_path):
    questions = load_questions(data_name=str(HUB / "allenai" / "ai2_arc"), subdata_name="ARC-Challenge")[:4]
    keys = [question["choices"][question["answer"]] for question in questions]
    answers = [(f"{keys[0].upper()}.", "no"), ("a", f" {keys[1]}"), ("b", "c"), ("same", "same")]
    asked = [question["question"] for question in questions]
    file = tmp_path / "pairs.json"
    write_rows(file, [pair(question, *sides) for question, sides in zip(asked, answers, strict=True)])
    printed = call("results/pairs.py", file, "--sample", "9", cwd=HUB).stdout
    assert re.findall(r"^(\w+): the gold answer in 1, any choice in \d of 3 ", printed, re.MULTILINE) == [
        "correct",
        "incorrect",
    ]
    drawn = re.findall(r"^line (\d): (.*)$", printed, re.MULTILINE)
    assert sorted(drawn) == [(str(line), question) for line, question in enumerate(asked[:3], 1)]
    write_rows(file, [pair("Whose question?", "a", "b")])
    assert "not in the train split of ARC-Challenge" in call("results/pairs.py", file, cwd=HUB, status=2).stderr
