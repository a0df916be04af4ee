"""Report on the runs of our study: the project's report, and what only the study needs.

    python results/study.py RUN_DIR              the report of a run
    python results/study.py RUN_DIR RUN_DIR ...  the comparison, with negations, summary.png, signal.png, correlations

A control trains on gold answers (results/control.sh). A run about questions of TruthfulQA, gold answers or its own, is
scored on the questions that it has not trained on, and runs that differ only in disjoint rows (truthful_qa[:200] and
truthful_qa[200:], in the name of the data set, of the question file or of the pair file) count as one.
"""

import math
import re
from pathlib import Path

from figures import plot_signal, plot_summary
from subsets import negation_section, restrict

from grath.common.arguments import Parser
from grath.common.errors import UserError, run_main
from grath.common.files import atomic_write_text
from grath.evaluation.results import QUESTIONS, tasks_of
from grath.evaluation.tasks import get_task
from grath.pairs.questions import LABELED, TRUTHFULQA
from grath.report.pages import COMPARISON, score_rows, write_comparison, write_report
from grath.report.paired import paired_difference, pool
from grath.report.runs import common_name, group_runs, model_label, read_run

DATASET = "dpo dataset_name"
SOURCES = {DATASET, "pairs data_path"}
ROWS = re.compile(rf"{TRUTHFULQA}(?:\[(\d*):(\d*)\])?")
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


def signal_points(groups, tasks):
    """Collect for each group the truth signal of the pairs that M_1 was trained on, and the gains of M_1.

    Returns:
        list of dict: "name", "gold", "signal" (value, low, high, averaged over the group's different pairs; a control's
        is 1 by definition), "gains" (as in `gains`). Groups without either, or with those of another, are left out.
    """
    points = []
    for group in groups:
        found = gains(group, 1, tasks) if 1 in group["models"] else {}
        of_runs = [stats["truth"] for stats in group["models"].get(0, {"pairs": ()})["pairs"] if stats["truth"]]
        of_runs = [(truth["signal"], *truth["interval"]) for truth in of_runs]
        gold = is_control(group["settings"])
        signal = (1.0, 1.0, 1.0) if gold else tuple(sum(part) / len(part) for part in zip(*of_runs, strict=True))
        # M_1 is the same with either reference.
        same = any((signal, found) == (point["signal"], point["gains"]) for point in points)
        if found and signal and not same:
            points.append({"name": group["name"], "gold": gold, "signal": signal, "gains": found})
    return points


def correlation(pairs):
    """Return Pearson's correlation of (x, y) pairs and its 95 % interval by Fisher's transformation.

    Returns:
        tuple of three floats; None with fewer than four pairs, or if one side does not vary.
    """
    import numpy

    xs, ys = numpy.array(pairs, dtype=float).reshape(-1, 2).T
    if len(xs) < 4 or not xs.std() or not ys.std():
        return None
    r = float(numpy.corrcoef(xs, ys)[0, 1])
    middle, half = math.atanh(min(max(r, -1 + 1e-12), 1 - 1e-12)), 1.96 / math.sqrt(len(xs) - 3)
    return r, math.tanh(middle - half), math.tanh(middle + half)


def correlation_lines(points, tasks):
    """Say how the truth signal of the pairs and the gain of M_1 correlate over runs, without and with the controls."""
    lines = []
    for kept, what in (
        (False, "the runs on a model's own pairs"),
        (True, "these runs and the controls on gold answers"),
    ):
        for task in tasks:
            chosen = [point for point in points if task in point["gains"] and (kept or not point["gold"])]
            found = correlation([(point["signal"][0], point["gains"][task][0]) for point in chosen])
            if found and (not kept or any(point["gold"] for point in chosen)):
                r, low, high = found
                lines.append(
                    f"Over {what} ({len(chosen)}), the correlation of the truth signal and the change of "
                    f"{get_task(task).title} in M_1 is {r:.2f} [{low:.2f}, {high:.2f}]."
                )
    return lines


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
    tasks = tasks_of(rows)
    if not tasks:
        return text
    changes = [
        {"name": name, "gold": is_control(group["settings"]), "gains": found}
        for group in groups
        for name, found in first_and_last(group, tasks)
    ]
    pairs = [(group["name"], stats) for group in groups for stats in group["models"][0]["pairs"][:1]]
    plot_summary(changes, pairs, tasks, folder / "summary.png")
    files, parts = ["summary.png"], ["![pairs of the first iteration, and changes of the scores](summary.png)"]
    points = signal_points(groups, tasks)
    if len(points) > 1:
        plot_signal(points, tasks, folder / "signal.png")
        files.append("signal.png")
        parts += ["![truth signal and gain](signal.png)", *correlation_lines(points, tasks)]
    page = folder / COMPARISON
    parts = [page.read_text(encoding="utf-8").rstrip(), *negation_section(rows, bases), *parts]
    atomic_write_text(page, "\n\n".join(parts) + "\n")
    return f"{text}\nWrote {', '.join(files)} in {folder}"


def first_and_last(group, tasks):
    """Return (name, gains) of the first model that has gains over the base, and of the last one."""
    found = [
        (model_label(group, number), of_model)
        for number in sorted(group["models"])
        if number and (of_model := gains(group, number, tasks))
    ]
    return found if len(found) < 2 else [found[0], found[-1]]


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
