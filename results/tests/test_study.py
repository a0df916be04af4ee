"""The report and the comparison of the study: controls, folds, correlations, figures, and its commands."""

import json
import shutil
from pathlib import Path

import pytest
from made_runs import put_pairs, put_run
from study import correlation
from support import BUNDLED, HUB, PROJECT, call, call_here, cells_of, make_tokenizer, needs_hub, tiny

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


def test_the_comparison_has_the_figures_and_correlations_of_the_study(tmp_path):
    questions = [json.loads(line) for line in BUNDLED.read_text(encoding="utf-8").splitlines()[:6]]
    runs = []
    for number in range(4):
        run = put_run(
            tmp_path / f"run_{number}", {0: BASE, 1: [1.0] * (2 + number) + [0.0] * (6 - number)}, beta=number
        )
        pairs = []
        for at, row in enumerate(questions):
            texts = row["choices"]["text"]
            gold = row["choices"]["label"].index(row["answerKey"])
            sides = texts[gold], texts[gold - 1]
            pairs.append((row["question"], *(sides if at <= number else sides[::-1])))
        put_pairs(run, 0, pairs, data_path=str(BUNDLED))
        runs.append(run)
    runs += [put_fold(tmp_path / f"control_{at}", *fold) for at, fold in enumerate(FOLDS.items())]
    done = call_here("study", *runs)
    assert "Wrote summary.png, signal.png in" in done.stdout
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert "Over the runs on a model's own pairs (4), the correlation of the truth signal and the change of MC1" in text
    assert "Over these runs and the controls on gold answers (5)" in text
    for name in ("summary.png", "signal.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


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


def test_correlation_and_its_interval():
    import numpy

    draw = numpy.random.default_rng(0)
    xs = draw.normal(size=400)
    r, low, high = correlation(list(zip(xs, 3 * xs + 4 * draw.normal(size=400), strict=True)))
    # r is 0.6; the standard error of atanh(r) is 1 / sqrt(397).
    assert abs(r - 0.6) < 0.1 and low < r < high and high - low == pytest.approx(2 * 1.96 * (1 - r**2) / 397**0.5, 0.05)
    assert correlation([(0, 1), (1, 0), (2, 0)]) is None and correlation([(1, y) for y in range(9)]) is None


def test_an_interval_of_equal_values_can_be_plotted():
    """The bootstrap's ends may miss the mean by a rounding error; matplotlib refuses a negative length."""
    from figures import lengths
    from matplotlib.figure import Figure

    mean = 0.1 + 0.2
    Figure().subplots().errorbar(mean, 0, xerr=lengths(mean, mean + 1e-12, mean - 1e-12))


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
    assert ["--dataset_name truthful_qa" in line for line in trained] == [True] * 6 + [False] * 11
    folders = {Path(line.split("--output_dir ")[1].split()[0]).parent.parent.name for line in trained}
    program, *compared = comparison.removeprefix("python ").split()
    assert program == "results/study.py"
    assert {Path(run).name for run in compared if run.endswith("_seed_0")} == folders
    asked = [line for line in done.stdout.splitlines() if "create_pair_responses.py" in line]
    assert ["--demos misconceptions" in line for line in asked] == [False] * 7 + [True, True, False, False]
    assert ["--useGT" in line for line in asked] == [False] * 9 + [True, True]
