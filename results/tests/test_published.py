"""What is published: the comparison, the pages, and copies of runs."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from made_runs import put_pairs, put_record, put_run
from study import hold_out, merge_folds
from subsets import restrict
from support import PROJECT, call, call_here, cells_of

from grath.evaluation.results import QUESTIONS
from grath.report.paired import paired_difference
from grath.report.runs import read_run

RECORDS = ("data/*.record.json", "models/*/grath.json")
SCORES = "results/*/settings.json"


def test_the_published_comparison_is_made_from_the_published_runs(tmp_path):
    page = PROJECT / "results" / "comparison.md"
    commands = (PROJECT / "results" / "README.md").read_text(encoding="utf-8")
    report = re.search(r"^python results/study\.py (.*_seed_0)$", commands, re.MULTILINE)[1]
    names = [Path(run).name for run in report.split()]
    for name in names:
        shutil.copytree(PROJECT / "results" / name, tmp_path / name)
    call_here("study", *(tmp_path / name for name in names))
    assert (tmp_path / "comparison.md").read_text(encoding="utf-8") == page.read_text(encoding="utf-8")


# The rows of the tables of results: (model, trained on) -> (run, i of M_i).
GOLD, ARC, DOMAIN = "gold answers, TruthfulQA", "own pairs, ARC", "own pairs, TruthfulQA"
ROWS = {
    ("135M", GOLD): ("control_135m", 1),
    ("0.5B", GOLD): ("control_0.5b", 1),
    ("1.5B", GOLD): ("control_1.5b", 1),
    ("135M", ARC): ("rolling_135m", 1),
    ("0.5B", ARC): ("rolling_0.5b", 1),
    ("0.5B", f"{ARC}, 160 steps"): ("rolling_0.5b_160_steps", 1),
    ("1.5B", ARC): ("rolling_1.5b", 1),
    ("1.5B", f"{ARC}, iteration 2"): ("rolling_1.5b", 2),
    ("1.5B", f"{ARC}, 160 steps"): ("rolling_1.5b_160_steps", 1),
    ("0.5B", f"{ARC}, candidates"): ("useGT_0.5b", 1),
    ("0.5B", f"{ARC}, candidates, 160 steps"): ("useGT_0.5b_160_steps", 1),
    ("1.5B", f"{ARC}, candidates"): ("useGT_1.5b", 1),
    ("1.5B", f"{ARC}, candidates, 160 steps"): ("useGT_1.5b_160_steps", 1),
    ("0.5B", DOMAIN): ("domain_0.5b", 1),
    ("0.5B", f"{DOMAIN}, without those in which only the incorrect answer denies"): ("form_incorrect_0.5b", 1),
    ("0.5B", f"{DOMAIN}, without those in which only the correct answer denies"): ("form_correct_0.5b", 1),
}


@pytest.mark.parametrize(("page", "most"), [("README.md", 6), ("results/README.md", len(ROWS))])
def test_the_tables_of_results_are_those_of_the_comparison(page, most):
    compared = cells_of((PROJECT / "results" / "comparison.md").read_text(encoding="utf-8"))
    table = (PROJECT / page).read_text(encoding="utf-8").split("| model | trained on |")[1]
    shown = cells_of(table.split("\n\n")[0])[1:]
    assert 4 < len(shown) <= most
    for model, trained_on, signal, base, *changes in shown:
        name, number = ROWS[model, trained_on]
        # The first table has the scores of all questions.
        scores = {row[0].split(" (")[0]: row for row in reversed(compared) if row[0].startswith(f"{name}: M_")}
        expected = [re.match(r"[\d.]+ \((.*\])", cell)[1] for cell in scores[f"{name}: M_{number}"][1:3]]
        assert changes == expected
        if f"{name}: M_0" in scores:  # a base with the same scores is shown once
            assert base.split(", ") == scores[f"{name}: M_0"][1:3]
        signals = [row[6] for row in compared if row[:2] == [name, f"M_{number - 1}"]]
        assert [part.partition("] (")[0] for part in re.split(r" and (?=[-+])", signal)] == (
            [one.removesuffix("]") for one in signals] or ["1" if trained_on == GOLD else "as above"]
        )


def test_the_doses_of_the_page_are_those_of_the_runs():
    kinds = ("rolling_0.5b", "useGT_0.5b", "rolling_1.5b", "useGT_1.5b")
    runs = [run for kind in kinds for run in sorted((PROJECT / "results").glob(f"{kind}_160_steps_seed_?"))]
    page = (PROJECT / "results" / "README.md").read_text(encoding="utf-8")
    printed = cells_of(call_here("dose", *runs).stdout)
    shown = cells_of(page)
    assert len(printed) == 15 and all(row in shown for row in printed)


def test_the_intervals_in_the_text_are_those_of_the_runs():
    """A change, or the fall that it is: of the comparison, or of one model against another."""
    compared = (PROJECT / "results" / "comparison.md").read_text(encoding="utf-8")
    number = r"([-+]?\d+\.\d+)"
    found = [tuple(map(float, one)) for one in re.findall(rf"\({number} \[{number}, {number}\]", compared)]
    runs = {path.parent.name: read_run(path.parent) for path in (PROJECT / "results").glob("*_seed_*/report.md")}
    for run in runs.values():
        hold_out(run)
    folds = {run["name"]: run for run in merge_folds([run for name, run in runs.items() if "0.5b" in name])}
    against = [
        (runs["rolling_135m_seed_0"], 1, runs["rolling_135m_seed_0"], 2),
        (runs["rolling_1.5b_seed_0"], 1, runs["rolling_1.5b_seed_0"], 2),
        (runs["rolling_1.5b_seed_0"], 2, runs["fixed_1.5b_seed_0"], 2),
        (folds["domain_0.5b"], 1, folds["form_incorrect_0.5b"], 1),
        (folds["domain_0.5b"], 1, folds["form_correct_0.5b"], 1),
    ]
    for first, i, second, j in against:
        before, after = first["models"][i]["scores"], second["models"][j]["scores"]
        for task in ("truthfulqa_mc1", "truthfulqa_mc2"):
            found.append(paired_difference(before[task], after[task]))
            for wanted in (0, 1):
                kept = [negated == wanted for negated in before[task][QUESTIONS]["negated"]]
                found.append(paired_difference(*(restrict(scores[task], kept) for scores in (before, after))))
    found += [(-middle, -high, -low) for middle, low, high in found]
    for page in ("README.md", "results/README.md"):
        text = (PROJECT / page).read_text(encoding="utf-8")
        text = "\n".join(line for line in text.split("## Results")[1].splitlines() if not line.startswith("|"))
        words = r"(?: points?)?(?: of MC[12])?"
        stated = [tuple(map(float, one)) for one in re.findall(rf"{number}{words} \[{number}, {number}\]", text)]
        assert len(stated) >= 2
        unknown = [
            one
            for one in stated
            if not any(all(abs(a - b) < 0.0501 for a, b in zip(one, other, strict=True)) for other in found)
        ]
        assert unknown == []


def test_no_place_of_a_machine_stands_in_the_results():
    texts = [path for path in (PROJECT / "results").rglob("*") if path.suffix in (".json", ".jsonl", ".txt", ".md")]
    assert len(texts) > 50
    places = re.compile(r"(?<![\w.$/])/(?:tmp|work|root|home|mnt|Users)/")
    assert [path.name for path in texts if places.search(path.read_text(encoding="utf-8"))] == []


def test_every_published_run_has_a_report_of_its_records(tmp_path):
    """Of all, the commit and the versions; of two, the whole page."""
    folders = sorted(path.parent for path in (PROJECT / "results").glob("*/report.md"))
    assert len(folders) == 35
    for folder in folders:
        records = [json.loads(path.read_text()) for pattern in (*RECORDS, SCORES) for path in folder.glob(pattern)]
        text = (folder / "report.md").read_text(encoding="utf-8")
        assert len(records) > 2 and all(record["commit"] in text for record in records)
    for name in ("fixed", "control_135m_first_seed_1"):
        shutil.copytree(PROJECT / "results" / name, tmp_path / name)
        call_here("study", tmp_path / name)
        for page in ("report.md", "pairs.json"):
            assert (tmp_path / name / page).read_bytes() == (PROJECT / "results" / name / page).read_bytes()


def test_a_published_copy_has_no_weights_no_pairs_and_no_places(tmp_path):
    made_run, root = tmp_path / "a run", tmp_path / "hub"
    put_run(made_run, {0: [0.0, 1.0], 1: [1.0, 1.0]}, dataset_path=f"{made_run}/x")
    settings = {"demos": "/a/clone/demos.json", "data_name": f"{root}/arc"}
    put_pairs(made_run, 0, [("q", "a", "b")], **settings)
    (made_run / "models" / "adapter_model.safetensors").touch()
    call_here("grath.report", made_run)
    scores = made_run / "results" / "iter_1" / "truthfulqa_mc1.json"
    scores.write_text(scores.read_text().replace("{", '{"model": "/a/clone/m", ', 1))
    put_record(scores.with_name("settings.json"), [scores])
    out = tmp_path / "out"
    (out / made_run.name / "old").mkdir(parents=True)
    # As a path from the project, what DATASETS_ROOT may be.
    env = {"DATASETS_ROOT": os.path.relpath(root, PROJECT)}
    call("results/publish.py", made_run, "--folder", out, "--place", "/a/clone=.", env=env)
    names = {path.name for path in out.rglob("*") if path.is_file()}
    assert {"report.md", "pairs.json", "grath.json", "truthfulqa_mc1.json", "iterations.png"} <= names
    assert not any(name.endswith((".safetensors", "_True.json")) for name in names)
    assert not (out / made_run.name / "old").exists()
    pairs, training = (json.loads(next((out / made_run.name).glob(name)).read_text()) for name in RECORDS)
    assert pairs["settings"]["demos"] == "./demos.json" and pairs["settings"]["data_name"] == "$folder/arc"
    assert training["settings"]["dataset_path"] == f"runs/{made_run.name}/x"
    call_here("grath.report", out / made_run.name)  # with the hashes of the copies
    done = call("results/publish.py", out / made_run.name, "--folder", out, status=2)
    assert "choose another --folder" in done.stderr and (out / made_run.name / "report.md").is_file()
