"""Tables of scores: of one model's results, or of every round of a run.

    python -m grath.report RUN_DIR
    python -m grath.report RESULTS_DIR
    python -m grath.report --pending RUNS_DIR

Results are the JSON files of lm-evaluation-harness, below any names.
"""

import json
import re
import sys
from pathlib import Path

from grath.cli import Parser, UserError, run
from grath.models import split_adapter

# Score tasks by the leaderboard's metric; the others by accuracy.
METRICS = {"arc_challenge": "acc_norm", "hellaswag": "acc_norm"}
TITLES = {
    "truthfulqa_mc1": "MC1",
    "truthfulqa_mc2": "MC2",
    "grath_mc1": "MC1 (bundled)",
    "grath_mc2": "MC2 (bundled)",
    "arc_challenge": "ARC",
    "hellaswag": "HellaSwag",
    "mmlu": "MMLU",
}


def read_scores(folder):
    """The scores that the result files of `folder` hold.

    Returns:
        dict: task -> {"score", "stderr" (both in percent; stderr None where unknown), "version", "harness"}.
    """
    scores = {}
    for file in sorted(Path(folder).glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        subtasks = {task for members in content.get("group_subtasks", {}).values() for task in members}
        for task, values in content.get("results", {}).items():
            metric = METRICS.get(task, "acc")
            if task in subtasks or f"{metric},none" not in values:
                continue
            stderr = values.get(f"{metric}_stderr,none")
            scores[task] = {
                "score": 100 * values[f"{metric},none"],
                "stderr": 100 * stderr if isinstance(stderr, float) else None,
                "version": content.get("versions", {}).get(task),
                "harness": content.get("lm_eval_version"),
            }
    return scores


def rounds(run_dir):
    """The rounds of a run's folder.

    Returns:
        dict: round number -> {"model": name or folder, None if not known; "results": folder; "pairs": how many}.
    """
    run_dir = Path(run_dir)
    found = {0: {"model": None}}
    for folder in run_dir.glob("models/iter_*"):
        if (folder / "adapter_model.safetensors").is_file():
            found[int(re.match(r"iter_(\d+)", folder.name)[1])] = {"model": folder}
    for number, row in found.items():
        row["results"] = run_dir / "results" / f"iter_{number}"
        files = [file for file in run_dir.glob(f"data/iter{number}_*.json") if not file.stem.endswith("_combined")]
        row["pairs"] = sum(1 for _ in files[0].open(encoding="utf-8")) if files else None
    first = found.get(1, {}).get("model")
    found[0]["model"] = split_adapter(first)[0] if first else None
    return dict(sorted(found.items()))


def newest_run(runs_dir):
    """The run below `runs_dir` whose models changed last, or None."""
    models = [folder for folder in Path(runs_dir).glob("*/models") if any(folder.glob("iter_*"))]
    return max(models, key=lambda folder: folder.stat().st_mtime).parent if models else None


def pending(runs_dir, tasks):
    """The newest run, and its rounds that lack a score of `tasks`: (run, [(model, results folder), ...])."""
    run_dir = newest_run(runs_dir)
    if run_dir is None:
        raise UserError(f"nothing to score below {runs_dir}; usage: ./evaluation.sh MODEL_OR_ADAPTER [OUTPUT_DIR]")
    rows = [row for row in rounds(run_dir).values() if row["model"] and set(tasks) - set(read_scores(row["results"]))]
    return run_dir, [(row["model"], row["results"]) for row in rows]


def table(rows):
    """A text table of (name, pairs, scores) rows, a column a task."""
    from tabulate import tabulate

    tasks = [task for task in TITLES if any(task in scores for *_, scores in rows)]
    tasks += sorted({task for *_, scores in rows for task in scores} - set(tasks))
    with_pairs = any(pairs is not None for _, pairs, _ in rows)
    header = ["model", *(["pairs"] if with_pairs else []), *(TITLES.get(task, task) for task in tasks)]
    body = [
        [name, *([pairs if pairs is not None else ""] if with_pairs else []), *(_cell(scores.get(t)) for t in tasks)]
        for name, pairs, scores in rows
    ]
    all_scores = [(task, score) for *_, scores in rows for task, score in scores.items()]
    versions = sorted({f"{task} {score['version']}" for task, score in all_scores})
    harness = sorted({f"lm-evaluation-harness {score['harness']}" for _, score in all_scores if score["harness"]})
    footer = "; ".join(harness + versions)
    return tabulate(body, header, disable_numparse=True) + (f"\n({footer}; percent ± standard error)" if footer else "")


def _cell(score):
    if score is None:
        return "-"
    return f"{score['score']:.2f}" + (f" ± {score['stderr']:.2f}" if score["stderr"] is not None else "")


def run_table(run_dir):
    """The table of every round of a run."""
    rows = [
        (f"M_{number}" + (" (base)" if number == 0 else ""), row["pairs"], read_scores(row["results"]))
        for number, row in rounds(run_dir).items()
    ]
    return table(rows)


def plot_training(log, path):
    """Draw a training's loss, reward margin, reward accuracy and log-probabilities against its steps.

    Args:
        log: entries of TRL's log.
        path: the PNG file, which appears whole.
    """
    from matplotlib.figure import Figure

    panels = {
        "loss": {"loss": "loss"},
        "reward margin": {"margin": "rewards/margins"},
        "reward accuracy": {"accuracy": "rewards/accuracies"},
        "log-probability of an answer": {"chosen": "logps/chosen", "rejected": "logps/rejected"},
    }
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for label, key in lines.items():
            points = [(entry["step"], entry[key]) for entry in log if key in entry]
            axes.plot(*zip(*points, strict=True) if points else ([], []), marker=".", label=label)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend()
    save_figure(figure, path)


def save_figure(figure, path):
    """Save a matplotlib figure under a name that never shows a part of it."""
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format=path.suffix[1:], dpi=120)
    partial.replace(path)


def main():
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="a run's folder, or a folder of result files")
    parser.add_argument(
        "--pending",
        action="store_true",
        help="print the newest run, then model and results folder of its rounds without scores, each ended by a NUL",
    )
    parser.add_argument("--tasks", nargs="+", default=[], help="the scores that --pending asks for")
    args = parser.parse_args()
    if args.pending:
        run_dir, models = pending(args.folder, args.tasks)
        print(f"newest run: {run_dir}, {len(models)} round(s) without scores", file=sys.stderr)
        print(run_dir, end="\0")
        for model, results in models:
            print(model, results, sep="\0", end="\0")
    elif (args.folder / "models").is_dir():
        print(run_table(args.folder))
        print(f"The run's folder: {args.folder}")
    else:
        scores = read_scores(args.folder)
        if not scores:
            raise UserError(f"{args.folder} holds no results of lm-evaluation-harness and no run")
        print(table([(args.folder.name, None, scores)]))


if __name__ == "__main__":
    run(main)
