"""Report on the runs of our study: the project's report, and what only the study needs.

    python results/study.py RUN_DIR              the report of a run
    python results/study.py RUN_DIR RUN_DIR ...  the comparison, with negations, and summary.png

A control trains on gold answers (results/control.sh). A run about questions of TruthfulQA, gold answers or its own, is
scored on the questions that it has not trained on, and runs that differ only in disjoint rows (truthful_qa[:200] and
truthful_qa[200:], in the name of the data set, of the question file or of the pair file) count as one.
"""

import re
from pathlib import Path

from figures import plot_changes
from subsets import negation_section, restrict

from grath.common.arguments import Parser
from grath.common.errors import UserError, run_main
from grath.common.files import atomic_write_text
from grath.evaluation.results import QUESTIONS, tasks_of
from grath.pairs.questions import LABELED, TRUTHFULQA
from grath.report.pages import COMPARISON, score_rows, write_comparison, write_report
from grath.report.paired import paired_difference, pool
from grath.report.runs import common_name, group_runs, read_run

DATASET = "dpo dataset_name"
SOURCES = {DATASET, "pairs data_path"}
ROWS = re.compile(rf"{TRUTHFULQA}(?:\[(\d*):(\d*)\])?")
# Of the figure: its tasks, the titles of its groups, the names of models, and settings that go without saying.
MAIN_TASKS = ("truthfulqa_mc1", "truthfulqa_mc2")
KINDS = {
    "gold": "gold answers of TruthfulQA",
    "False": "pairs of their own",
    "True": "pairs of their own, with ground-truth candidates",
}
SIZES = {"smollm2": "135M", "qwen2.5-coder-0.5b": "0.5B", "qwen2.5-coder-1.5b": "1.5B"}
DEMOS, USUAL_STEPS = "truthfulqa", "40"
# More than any data set with gold answers has.
MOST_ROWS = 10**5


def is_control(settings):
    """Return whether a run, or a group of runs, with these settings trains on gold answers."""
    return LABELED.fullmatch(settings.get(DATASET, "").partition(", ")[0]) is not None


def source(run):
    """Return the name of what a run trains on: a data set, a question file or a pair file."""
    training = run["models"].get(1, {"records": {}})["records"].get("dpo", {})
    settings = run["settings"]
    return settings.get(DATASET) or Path(settings.get("pairs data_path") or training.get("pair_file") or "").name


def is_fold(run):
    """Return whether a run trains on pairs about questions of TruthfulQA."""
    return ROWS.search(source(run)) is not None


def rows_of(run):
    """Return the numbers of the questions that a fold trains on: set of int."""
    first, end = ROWS.search(source(run)).groups()
    return set(range(int(first or 0), int(end or MOST_ROWS)))


def hold_out(run):
    """Leave the questions that a fold trains on out of its scores; return how many are left, or None.

    A task of TruthfulQA without scores of single questions is left out. Other runs stay as they are.

    Raises:
        UserError: no question is left.
    """
    if not is_fold(run):
        return None
    trained_on, left = rows_of(run), None
    for model in run["models"].values():
        for task, score in list(model["scores"].items()):
            if not task.startswith("truthfulqa_"):
                continue
            del model["scores"][task]
            if score[QUESTIONS]:
                kept = [number not in trained_on for number in range(len(score[QUESTIONS]["scores"]))]
                if not any(kept):
                    raise UserError(f"{run['folder']} has trained on all questions of {task}: none is left to score")
                model["scores"][task], left = restrict(score, kept), sum(kept)
    return left


def merge_folds(runs):
    """Replace runs that differ only in disjoint rows of TruthfulQA by one run with the held-out scores of all."""
    merged = []
    for run in runs:
        for folds in merged:
            if is_fold(run) and all(_complements(run, other) for other in folds):
                folds.append(run)
                break
        else:
            merged.append([run])
    return [folds[0] if len(folds) == 1 else _merged(folds) for folds in merged]


def _complements(run, other):
    def rest(one):
        return ROWS.sub("", source(one)), {name: one["settings"].get(name) for name in one["settings"].keys() - SOURCES}

    return is_fold(other) and rest(run) == rest(other) and not rows_of(run) & rows_of(other)


def _merged(folds):
    folds = sorted(folds, key=lambda run: min(rows_of(run)))
    names = {
        name: ", ".join(run["settings"][name] for run in folds)
        for name in SOURCES
        if all(run["settings"].get(name) for run in folds)
    }
    models = {}
    for number in sorted({number for run in folds for number in run["models"]}):
        having = [run["models"][number] for run in folds if number in run["models"]]
        models[number] = {**having[0], "scores": pool([model["scores"] for model in having if model["scores"]])}
    return {
        **folds[0],
        "name": common_name(folds),
        "settings": folds[0]["settings"] | names,
        "models": models,
        "pairs": [run["models"][0]["pairs"] for run in folds if run["models"][0]["pairs"]],
    }


def gains(group, number, tasks):
    """Return the gains of a group's M_i over its base: task -> (difference, low, high), as in `paired_difference`."""
    model = group["models"][number]
    found = {
        task: paired_difference(model["base"][task], model["scores"][task])
        for task in tasks
        if task in model["base"] and task in model["scores"]
    }
    return {task: gain for task, gain in found.items() if gain}


def figure_groups(groups, tasks):
    """Sort the changes of models with the usual examples and the rolling reference: title -> list of (label, gains)."""
    found = {title: [] for title in KINDS.values()}
    sizes = list(SIZES)

    def size_of(group):
        name = Path(group["settings"]["base model"]).name
        return sizes.index(name) if name in SIZES else len(sizes), SIZES.get(name, name)

    for group in sorted(groups, key=size_of):
        settings, gold = group["settings"], is_control(group["settings"])
        if not gold and (settings.get("pairs demos") != DEMOS or settings.get("dpo reference") != "rolling"):
            continue
        about = "" if gold or not settings.get("pairs data_path") else ", about TruthfulQA"
        steps = "" if settings.get("dpo max_steps") == USUAL_STEPS else f", {settings.get('dpo max_steps')} steps"
        title = KINDS["gold" if gold else settings["pairs useGT"]]
        for number in range(1, len(group["models"])):
            iteration = f", iteration {number}" if number > 1 else ""
            label = f"{size_of(group)[1]}{about}{steps}{iteration}"
            found[title].append((label, gains(group, number, tasks)))
    return found


def compare(runs, folder):
    """Write the comparison of runs and its plots into a folder; return the text for the terminal."""
    for run in runs:
        hold_out(run)
    runs = merge_folds(runs)
    groups = group_runs(runs)
    of_folds = {run["name"]: run["pairs"] for run in runs if run.get("pairs")}
    for group in groups:
        group["models"][0]["pairs"] = of_folds.get(group["name"], group["models"][0]["pairs"])
    text = write_comparison(folder, groups)
    rows, bases = score_rows(groups)
    if not tasks_of(rows):
        return text
    plot_changes(figure_groups(groups, MAIN_TASKS), MAIN_TASKS, folder / "summary.png")
    page = folder / COMPARISON
    parts = [page.read_text(encoding="utf-8").rstrip(), *negation_section(rows, bases)]
    atomic_write_text(page, "\n\n".join(parts) + "\n")
    return f"{text}\nWrote summary.png in {folder}"


def main():
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    folders = parser.parse_args().runs
    runs = [read_run(folder) for folder in folders]
    if len(runs) > 1:
        print(compare(runs, folders[0].resolve().parent))
        return
    left = hold_out(runs[0])
    print(write_report(runs[0], f"TruthfulQA: the {left} questions that the run has not trained on." if left else ""))


if __name__ == "__main__":
    run_main(main)
