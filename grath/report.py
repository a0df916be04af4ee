"""The report of a run: scores of every round against the base, pairs, trainings, answers side by side, and a plot.

    python -m grath.report RUN_DIR              writes report.md, iterations.png and iterations.svg there
    python -m grath.report RESULTS_DIR          prints the scores of one model
    python -m grath.report --pending RUNS_DIR   what the newest run has not scored yet, for evaluation.sh

Results are the JSON files of lm-evaluation-harness, below any names.
"""

import json
import re
import sys
from pathlib import Path

from grath.cli import Parser, UserError, read_json_lines, run, write_whole
from grath.manifest import NAME as MANIFEST
from grath.manifest import commit
from grath.manifest import read as read_manifest
from grath.models import ADAPTER, split_adapter

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


# The paper's main results: scores of the base and of the last round where both are given, else the gain.
PAPER = {
    "llama-2-7b-chat": "MC1 30.23 -> 54.71, MC2 45.32 -> 69.10, ARC +5.03, HellaSwag +1.13, MMLU -1.26",
    "zephyr-7b": "MC1 42.23 -> 53.86, MC2 57.83 -> 66.73",
}


def read_scores(folder):
    """The scores that the result files of `folder` hold.

    Returns:
        dict: task -> {"score", "stderr" (both in percent; stderr None where unknown), "version", "harness", "chat"}.
    """
    scores = {}
    for file in sorted(Path(folder).glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        subtasks = {task for members in content.get("group_subtasks", {}).values() for task in members}
        for task, values in content.get("results", {}).items():
            metric = METRICS.get(task, "acc")
            if f"{metric},none" not in values:
                others = [name.partition(",")[0] for name in values if "," in name and "_stderr" not in name]
                metric = others[0] if others else metric
            key = next((name for name in values if name.startswith(f"{metric},")), None)
            if task in subtasks or key is None:
                continue
            stderr = values.get(key.replace(",", "_stderr,"))
            scores[task] = {
                "score": 100 * values[key],
                "stderr": 100 * stderr if isinstance(stderr, float) else None,
                "version": content.get("versions", {}).get(task),
                "harness": content.get("lm_eval_version"),
                "chat": bool(content.get("chat_template")),
            }
    return scores


def rounds(run_dir):
    """The rounds of a run's folder.

    Returns:
        dict: round number -> {"model": name or folder, None if not known; "results": folder; "pairs": dict of
        `read_pair_counts`, or None; "training": dict of `read_training`, or None for the base}.
    """
    run_dir = Path(run_dir)
    found = {0: {"model": None, "training": None}}
    for folder in run_dir.glob("models/iter_*"):
        if (folder / ADAPTER).is_file():
            found[int(re.match(r"iter_(\d+)", folder.name)[1])] = {"model": folder, "training": read_training(folder)}
    for number, row in found.items():
        row["results"] = run_dir / "results" / f"iter_{number}"
        files = [file for file in run_dir.glob(f"data/iter{number}_*.json") if not file.stem.endswith("_combined")]
        row["pairs"] = read_pair_counts(files[0]) if files else None
    first = found.get(1, {}).get("model")
    found[0]["model"] = split_adapter(first)[0] if first else None
    return dict(sorted(found.items()))


def read_pair_counts(file):
    """How many pairs a pair file's round "asked" for (its name says so), "parsed", and how many are "identical"."""
    rows = read_json_lines(file, "the pair file")
    asked = re.search(r"_num_(\d+)_", file.name)
    return {
        "asked": int(asked[1]) if asked else None,
        "parsed": len(rows),
        "identical": sum(row.get("correct") == row.get("incorrect") for row in rows),
    }


def read_training(folder):
    """The last "margin" and "accuracy" of a training, its "pairs", "steps" and "seconds"; None where not recorded."""
    record, log = {}, []
    if (folder / "grath.json").is_file():
        record = json.loads((folder / "grath.json").read_text(encoding="utf-8"))
    if (folder / "training_log.jsonl").is_file():
        log = [entry for entry in read_json_lines(folder / "training_log.jsonl", "the log") if "loss" in entry]
    last = log[-1] if log else {}
    return {
        "margin": last.get("rewards/margins"),
        "accuracy": last.get("rewards/accuracies"),
        "steps": last.get("step"),
        "pairs": (record.get("pairs") or {}).get("kept"),
        "seconds": record.get("seconds"),
        "warnings": record.get("warnings", []),
    }


def newest_run(runs_dir):
    """The run below `runs_dir` whose models changed last, or None."""
    models = [folder for folder in Path(runs_dir).glob("*/models") if any(folder.glob("iter_*"))]
    # Runs that FRESH=1 has moved aside are not gone on with.
    models = [folder for folder in models if not re.search(r"\.old-\d+$", folder.parent.name)]
    return max(models, key=lambda folder: folder.stat().st_mtime).parent if models else None


def pending(runs_dir, tasks):
    """The newest run, and its rounds that lack a score of `tasks`: (run, [(model, results folder), ...])."""
    run_dir = newest_run(runs_dir)
    if run_dir is None:
        raise UserError(f"nothing to score below {runs_dir}; usage: ./evaluation.sh MODEL_OR_ADAPTER [OUTPUT_DIR]")
    rows = [row for row in rounds(run_dir).values() if row["model"] and set(tasks) - set(read_scores(row["results"]))]
    return run_dir, [(row["model"], row["results"]) for row in rows]


def table(rows, style="simple"):
    """A table of (name, scores) rows, a column a task: percent, standard error, and difference to the first row."""
    from tabulate import tabulate

    tasks = tasks_of(rows)
    base = rows[0][1] if len(rows) > 1 else {}
    body = [[name, *(_cell(scores.get(task), base.get(task)) for task in tasks)] for name, scores in rows]
    header = ["model", *(TITLES.get(task, task) for task in tasks)]
    return tabulate(body, header, tablefmt=style, disable_numparse=True)


def tasks_of(rows):
    """The tasks that (name, scores) rows have a score of, in the table's order."""
    scored = {task for _, scores in rows for task in scores}
    return [task for task in TITLES if task in scored] + sorted(scored - set(TITLES))


def _cell(score, base):
    if score is None:
        return "-"
    text = f"{score['score']:.2f}" + (f" ± {score['stderr']:.2f}" if score["stderr"] is not None else "")
    return text if base is None or base is score else f"{text} ({score['score'] - base['score']:+.2f})"


def footer(rows):
    """Versions behind the scores of (name, scores) rows, and whether the chat template was on."""
    scores = [(task, score) for _, scores in rows for task, score in scores.items()]
    if not scores:
        return ""
    harness = sorted({f"lm-evaluation-harness {score['harness']}" for _, score in scores if score["harness"]})
    versions = sorted({f"{task} {score['version']}" for task, score in scores})
    chat = ["chat template ON" if any(score["chat"] for _, score in scores) else "chat template off"]
    return f"({'; '.join(harness + versions + chat)}; percent ± standard error)"


def score_rows(found):
    """(name, scores) of every round of `rounds`."""
    return [
        (f"M_{number}" + (" (base)" if number == 0 else ""), read_scores(row["results"]))
        for number, row in found.items()
    ]


def verdict(rows):
    """In words: the best round by MC1 + MC2, where the scores turn down again, and which scores are missing."""
    tasks = tasks_of(rows)
    lines = []
    for pair in (("truthfulqa_mc1", "truthfulqa_mc2"), ("grath_mc1", "grath_mc2")):
        sums = {name: sum(scores[task]["score"] for task in pair) for name, scores in rows if set(pair) <= set(scores)}
        if len(sums) < 2:
            continue
        names = list(sums)
        best = max(sums, key=sums.get)
        after = names[names.index(best) + 1 :]
        lower = after and all(sums[name] < sums[best] for name in after)
        turn = f"; from {after[0]} on it is lower again, {sums[after[-1]]:.2f} at last" if lower else ""
        lines.append(f"Best by {' + '.join(TITLES[task] for task in pair)}: {best} ({sums[best]:.2f}){turn}.")
    for name, scores in rows:
        missing = [TITLES.get(task, task) for task in tasks if task not in scores]
        if missing or not tasks:
            lines.append(f"No score of {name} yet" + (f": {', '.join(missing)}." if tasks else "."))
    return lines


def write_report(run_dir):
    """Write report.md, iterations.png and iterations.svg of a run; the text for the terminal."""
    run_dir = Path(run_dir)
    found = rounds(run_dir)
    rows = score_rows(found)
    base = str(found[0]["model"] or "not known yet")
    files = ["report.md"]
    parts = [f"# {run_dir.resolve().name}", f"Base model: {base}", table(rows, "github"), footer(rows), *verdict(rows)]
    if tasks_of(rows):
        plot_iterations(rows, run_dir / "iterations.png", run_dir / "iterations.svg")
        parts.append("![scores against rounds](iterations.png)")
        files += ["iterations.png", "iterations.svg"]
    for name, figures in PAPER.items():
        if name in base.lower():
            parts.append(f"The paper reports for this base: {figures}.")
    parts += ["## Pairs and trainings", _rounds_table(found)]
    parts += [
        f"- M_{number}: {warning}"
        for number, row in found.items()
        if row["training"]
        for warning in row["training"]["warnings"]
    ]
    manifest = read_manifest(run_dir) if (run_dir / MANIFEST).is_file() else {"settings": {}, "stages": []}
    parts += _stages(manifest["stages"])
    parts += _samples(found)
    parts.append("## Settings")
    if manifest["settings"]:
        settings = "\n".join(f"{name}={value}" for name, value in manifest["settings"].items())
        parts.append(f"```text\n{settings}\n```")
    scored = {
        file.read_text(encoding="utf-8") for row in found.values() for file in row["results"].glob("settings.txt")
    }
    parts += ["```text\n" + text.strip() + "\n```" for text in sorted(scored)]
    parts.append(f"Commit: {commit() or 'not known'}")
    write_whole(run_dir / "report.md", "\n\n".join(part for part in parts if part) + "\n")
    return "\n".join([table(rows), footer(rows), *verdict(rows), f"Wrote {', '.join(files)} in {run_dir}"])


def _rounds_table(found):
    from tabulate import tabulate

    header = [
        "round",
        "asked",
        "parsed",
        "identical",
        "trained on",
        "steps",
        "last margin",
        "accuracy",
        "DPO seconds (last start)",
    ]
    body = []
    for number, row in found.items():
        pairs, training = row["pairs"] or {}, found.get(number + 1, {}).get("training") or {}
        if not pairs and not training:
            continue
        cells = [pairs.get(key) for key in ("asked", "parsed", "identical")]
        cells += [training.get(key) for key in ("pairs", "steps", "margin", "accuracy", "seconds")]
        body.append([f"M_{number} -> M_{number + 1}", *cells])
    return tabulate(body, header, tablefmt="github", missingval="-", floatfmt=".3f") if body else "No round yet."


def _stages(entries):
    from tabulate import tabulate

    if not entries:
        return []
    rows = [[entry["title"], round(entry["seconds"]), entry["starts"], entry["outcome"]] for entry in entries]
    return ["## Stages", tabulate(rows, ["stage", "seconds, all starts", "starts", "outcome"], tablefmt="github")]


def _samples(found):
    answers = {}
    for number, row in found.items():
        if (row["results"] / "samples.jsonl").is_file():
            for sample in read_json_lines(row["results"] / "samples.jsonl", "the samples"):
                answers.setdefault(sample["question"], []).append((number, sample["answer"]))
    if not answers:
        return []
    parts = ["## The same questions, round by round"]
    for question, rows in answers.items():
        parts.append(f"**{question}**")
        parts.append("\n".join(f"- M_{number}: {' '.join(answer.split()) or '(nothing)'}" for number, answer in rows))
    return parts


def plot_iterations(rows, *paths):
    """Draw the scores of (name, scores) rows against the rounds, with error bars; the base as a dashed line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for task in tasks_of(rows):
        points = [(at, scores[task]) for at, (_, scores) in enumerate(rows) if task in scores]
        where, heights = [at for at, _ in points], [score["score"] for _, score in points]
        line = axes.errorbar(
            where,
            heights,
            yerr=[score["stderr"] or 0 for _, score in points],
            marker="o",
            capsize=3,
            label=TITLES.get(task, task),
        )
        if where[0] == 0:
            axes.axhline(heights[0], linestyle="--", linewidth=1, alpha=0.6, color=line[0].get_color())
    axes.set(xlabel="round", ylabel="percent", xticks=range(len(rows)), title="Scores; dashed: the base model")
    axes.set_xticks(range(len(rows)), [name.split()[0] for name, _ in rows])
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    for path in paths:
        save_figure(figure, path)


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
    elif (args.folder / "models").is_dir() or (args.folder / "data").is_dir():
        print(write_report(args.folder))
        print(f"The run's folder: {args.folder}")
    else:
        scores = read_scores(args.folder)
        if not scores:
            raise UserError(f"{args.folder} holds no results of lm-evaluation-harness and no run")
        rows = [(args.folder.name, scores)]
        print(table(rows))
        print(footer(rows))


if __name__ == "__main__":
    run(main)
