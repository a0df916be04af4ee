"""What is published: the comparison, the pages, and copies of runs."""

import json
import os
import re
import shutil
from pathlib import Path

from made_runs import put_pairs, put_record, put_run
from support import PROJECT, call, call_here, cells_of

from grath.evaluation.results import read_scores

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


def test_results_in_the_readme_are_those_of_the_comparison():
    compared = cells_of((PROJECT / "results" / "comparison.md").read_text(encoding="utf-8"))
    table = (PROJECT / "README.md").read_text(encoding="utf-8").split("| run | pairs | truth signal |")[1]
    shown = cells_of(table.split("\n\n")[0])[1:]
    assert 2 < len(shown) <= 8
    for name, _, signal, *scores in shown:
        assert [name, *scores] in compared
        run, number = re.match(r"(.*): M_(\d)", name).groups()
        signals = [row[6] for row in compared if row[:2] == [run, f"M_{int(number) - 1}"]]
        assert signal == (" and ".join(signals) or "1")


def test_the_table_of_the_earlier_runs_equals_the_published_scores():
    table = (
        (PROJECT / "results" / "earlier.md").read_text(encoding="utf-8").split("| run | model |")[1].split("\n\n")[0]
    )
    found = re.findall(r"^\| (\w+) \| M_(\d)[^|]*\| (.*) \|$", table, re.MULTILINE)
    assert len(found) == 11
    for run, number, cells in found:
        scores = read_scores(PROJECT / "results" / run / "results" / f"iter_{number}")
        tasks = ("truthfulqa_mc1", "truthfulqa_mc2", "arc_challenge")
        expected = [
            f"{scores[task]['score']:.2f} ± {scores[task]['stderr']:.2f}" if task in scores else "-" for task in tasks
        ]
        pairs = [
            json.loads(path.read_text())
            for path in (PROJECT / "results" / run).glob(f"models/iter_{number}_*/grath.json")
        ]
        assert cells.split(" | ") == [*([str(pairs[0]["pairs"]["kept"])] if pairs else [""]), *expected]


def test_no_place_of_a_machine_stands_in_the_results():
    texts = [path for path in (PROJECT / "results").rglob("*") if path.suffix in (".json", ".jsonl", ".txt", ".md")]
    assert len(texts) > 50
    places = re.compile(r"(?<![\w.$/])/(?:tmp|work|root|home|mnt|Users)/")
    assert [path.name for path in texts if places.search(path.read_text(encoding="utf-8"))] == []


def test_every_published_run_has_a_report_of_its_records(tmp_path):
    """Of all, the commit and the versions; of two, the whole page."""
    folders = sorted(path.parent for path in (PROJECT / "results").glob("*/report.md"))
    assert len(folders) == 24
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
    shutil.rmtree(out)
    (made_run / "pairs.json").unlink()
    assert "has no pairs.json" in call("results/publish.py", made_run, "--folder", out, status=2).stderr
    done = call("results/publish.py", made_run, "--place", "/a/clone", status=2)
    assert "--place /a/clone is not PATH=TEXT" in done.stderr
