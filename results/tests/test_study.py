"""The report and the comparison of the study: controls, folds, correlations, figures, and its commands."""

import json
import shutil
from pathlib import Path

from made_runs import put_pairs, put_run
from study import figure_groups
from support import HUB, PROJECT, call, call_here, cells_of, make_tokenizer, needs_hub, tiny

BASE = [0.0] * 8
# Each fold gains all questions that it trained on and one of the others.
FOLDS = {"[:4]": [1.0] * 5 + [0.0] * 3, "[4:]": [1.0] + [0.0] * 3 + [1.0] * 4}


def put_fold(folder, rows, after, seed=0):
    return put_run(folder, {0: BASE, 1: after}, seed, dataset_name=f"truthful_qa{rows}")


def labels(page):
    """The names of the groups of runs that have an M_1."""
    return [row[0].removesuffix(": M_1") for row in cells_of(page.read_text()) if len(row) == 2 and ": M_1" in row[0]]


def test_a_control_is_scored_on_what_it_has_not_trained_on(tmp_path):
    runs = [put_fold(tmp_path / f"control_{at}_seed_0", *fold) for at, fold in enumerate(FOLDS.items())]
    assert "25.00 (+25.00 [" in call_here("study", runs[0]).stdout
    text = (runs[0] / "report.md").read_text(encoding="utf-8")
    assert "TruthfulQA: the 4 questions that the run has not trained on." in text
    done = call_here("study", *runs)
    assert "control: M_1" in done.stdout and "25.00 (+25.00 [" in done.stdout
    assert ["control", "truthful_qa[:4], truthful_qa[4:]"] in cells_of((tmp_path / "comparison.md").read_text())
    shutil.rmtree(runs[1] / "results" / "iter_1")
    assert "25.00 (+25.00 [" in call_here("study", *runs).stdout
    every = put_fold(tmp_path / "every", "", [1.0] * 8)
    assert "has trained on all questions of truthfulqa_mc1" in call_here("study", every, status=2).stderr


def test_only_seeds_and_disjoint_folds_are_pooled(tmp_path):
    runs = [
        put_fold(tmp_path / f"c_{at}_seed_{seed}", rows, FOLDS["[:4]"], seed)
        for seed in (0, 1)
        for at, rows in enumerate(("[:4]", "[4:]"))
    ]
    runs.append(put_fold(tmp_path / "c_overlap_seed_0", "[:6]", FOLDS["[:4]"]))
    runs.append(put_run(tmp_path / "x_seed_0", {0: BASE, 1: FOLDS["[:4]"]}))
    call_here("study", *runs)
    assert labels(tmp_path / "comparison.md") == ["c", "c_overlap", "x"]


def test_own_pairs_about_truthfulqa_are_folds_too(tmp_path):
    """The rows are in the name of the question file, or of the pair file; pairs of another kind are another run."""
    runs = []
    for at, (rows, after) in enumerate(FOLDS.items()):
        run = put_run(tmp_path / f"own_{at}_seed_0", {0: BASE, 1: after})
        put_pairs(run, 0, [("q", "a", "b")], data_path=f"runs/truthful_qa{rows}.jsonl")
        runs.append(run)
        for kind in ("x", "y"):
            run = put_run(tmp_path / f"{kind}_{at}_seed_0", {0: BASE, 1: after})
            record = next(run.glob("models/*/grath.json"))
            content = {"pair_file": f"runs/without_{kind}_truthful_qa{rows}.json"}
            record.write_text(json.dumps(json.loads(record.read_text()) | content))
            runs.append(run)
    assert "TruthfulQA: the 4 questions that the run has not trained on." in call_here("study", runs[0]).stdout
    call_here("study", *sorted(runs))
    cells = cells_of((tmp_path / "comparison.md").read_text())
    found = [row for row in cells if len(row) == 2 and ": M_1" in row[0]]
    assert [name for name, _ in found] == ["own: M_1", "x: M_1", "y: M_1"]
    assert all(score.startswith("25.00 (+25.00 [") for _, score in found)
    assert len([row for row in cells if row[:2] == ["own", "M_0"]]) == 2  # the pairs of both


def test_the_figure_has_a_group_for_each_kind_of_pairs(tmp_path):
    usual = {"pairs demos": "truthfulqa", "pairs useGT": "False", "dpo reference": "rolling", "dpo max_steps": "40"}
    usual["base model"] = "models/qwen2.5-coder-1.5b"
    gold, about = "dpo dataset_name", "pairs data_path"
    kinds = [usual | {about: "runs/truthful_qa[:4].jsonl"}, usual, usual | {"pairs useGT": "True"}]
    kinds += [{**usual, "dpo max_steps": "160"}, {**usual, "pairs demos": "halueval"}]
    kinds += [{**usual, "dpo reference": "fixed"}, {gold: "truthful_qa", **usual, "base model": "models/smollm2"}]
    model = {"scores": {}, "base": {}}
    groups = [{"settings": settings, "models": {0: model, 1: model, 2: model}} for settings in kinds]
    found = {title: [label for label, _ in changes] for title, changes in figure_groups(groups, ()).items()}
    assert found == {
        "gold answers of TruthfulQA": ["135M", "135M, iteration 2"],
        "pairs of their own": [
            f"1.5B{what}{iteration}"
            for what in (", about TruthfulQA", "", ", 160 steps")
            for iteration in ("", ", iteration 2")
        ],
        "pairs of their own, with ground-truth candidates": ["1.5B", "1.5B, iteration 2"],
    }
    runs = [put_fold(tmp_path / f"control_{at}", *fold) for at, fold in enumerate(FOLDS.items())]
    assert "Wrote summary.png in" in call_here("study", *runs).stdout
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_the_comparison_shows_negated_gold_answers_apart(tmp_path):
    """Every second gold answer has a negation: of these, both seeds gain one, and one seed another."""
    base = [1.0, *[0.0] * 7]
    after = ([1.0, 1.0, 1.0, *[0.0] * 5], [1.0, 1.0, 0.0, 1.0, *[0.0] * 4])
    runs = [put_run(tmp_path / f"both_seed_{seed}", {0: base, 1: after[seed]}, seed) for seed in (0, 1)]
    call_here("study", *runs)
    (row,) = [
        line for line in cells_of((tmp_path / "comparison.md").read_text()) if line[0] == "both: M_1" and len(line) == 3
    ]
    assert row[1].startswith("37.50 (+37.50 [") and row[2].startswith("37.50 (+12.50 [")
    call_here("study", runs[0])
    assert "negation" not in (runs[0] / "report.md").read_text()


def commands():
    """The commands of the page: the settings (a line), those of the controls, of the runs, and of the comparison."""
    text = (PROJECT / "results" / "README.md").read_text(encoding="utf-8")
    block = next(part for part in text.split("```") if "RUN_NAME=rolling" in part)
    settings, *lines = block.strip().splitlines()
    controls = [line for line in lines if "results/control.sh" in line]
    return settings, controls, [line for line in lines if line.startswith("RUN_NAME")], lines[-1]


@needs_hub
def test_a_control_on_a_tiny_model(tmp_path):
    """The first command of the page, with one step and two questions."""
    settings, controls, _, _ = commands()
    tokenizer, model = make_tokenizer("<s>", "</s>", add_bos=True), tmp_path / "model"
    tiny("llama", vocab_size=len(tokenizer)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    run = tmp_path / "control_seed_0"
    command = controls[0].replace("models/smollm2", str(model)).replace("runs/control_135m_first_seed_0", str(run))
    reduced = "export MAX_STEPS=1 WARMUP_STEPS=0 LIMIT=202 SAMPLES=0"
    done = call("bash", "-ec", f"{settings}\n{reduced}\n{command}", env={"folder": str(HUB)})
    record = json.loads(next(run.glob("models/iter_1_gold/grath.json")).read_text())
    assert record["pairs"]["read"] == 200 and record["settings"]["dataset_name"] == "truthful_qa[:200]"
    assert "TruthfulQA: the 2 questions that the run has not trained on." in done.stdout


def test_the_commands_of_the_page(tmp_path):
    """Dry runs of all, and the comparison names the runs that they make."""
    settings, controls, others, comparison = commands()
    script = "\n".join([settings, "export DRY_RUN=1", *controls, *others])
    done = call("bash", "-ec", script, env={"folder": str(tmp_path), "RUNS_DIR": "runs"})
    trained = [line for line in done.stdout.splitlines() if line.startswith("accelerate launch") and "dpo.py" in line]
    assert ["--dataset_name truthful_qa" in line for line in trained] == [True] * 6 + [False] * 21
    folders = {Path(line.split("--output_dir ")[1].split()[0]).parent.parent.name for line in trained}
    program, *compared = comparison.removeprefix("python ").split()
    assert program == "results/study.py"
    assert {Path(run).name for run in compared if run.endswith("_seed_0")} == folders
