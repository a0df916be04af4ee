"""Scores out of the result files of lm-evaluation-harness: reading, tables, and what they say in words."""

from pathlib import Path

from grath.cli import UserError, in_root, read_json
from grath.local_data import content_hash

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
# The hub's data set that a task asks.
SETS = {
    "arc_challenge": "allenai/ai2_arc",
    "hellaswag": "Rowan/hellaswag",
    "mmlu": "cais/mmlu",
    "truthfulqa_mc1": "truthfulqa/truthful_qa",
    "truthfulqa_mc2": "truthfulqa/truthful_qa",
}


def local_sets(tasks):
    """The hash of what the local folders of the tasks' data sets contain now: hub name -> hash; others are left out."""
    folders = {SETS[task]: in_root(SETS[task]) for task in tasks if task in SETS}
    return {name: content_hash(folder) for name, folder in sorted(folders.items()) if Path(folder).is_dir()}


def read_scores(folder):
    """The scores that the result files of `folder` hold.

    Returns:
        dict: task -> {"score", "stderr" (both in percent; stderr None where unknown), "version", "harness", "chat"}.
    """
    scores = {}
    for file in sorted(Path(folder).glob("*.json")):
        what = "result file of lm-evaluation-harness"
        content = read_json(file, what)
        if not isinstance(content.get("results", {}), dict):
            raise UserError(f"{file} is no {what}")
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


def table(rows, style="simple", differences=True):
    """A table of (name, scores) rows, a column a task: percent, standard error, and difference to the first row."""
    from tabulate import tabulate

    tasks = tasks_of(rows)
    base = rows[0][1] if differences and len(rows) > 1 else {}
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
