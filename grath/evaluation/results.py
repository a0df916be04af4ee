"""Read scores from the result files of lm-evaluation-harness, and record the settings that they depend on."""

import hashlib
import math
from pathlib import Path

from grath.common.errors import UserError
from grath.common.files import atomic_write_text, check_writable, read_json
from grath.common.local_data import content_hash
from grath.common.paths import resolve_local
from grath.evaluation.tasks import TASKS, get_task
from grath.pairs.stats import negated

QUESTIONS = "questions"
# What the names of metrics between 0 and 1 contain; they are shown in percent.
SHARES = ("acc", "exact_match", "f1", "pass", "mcc")


def local_dataset_hashes(tasks):
    """Hash the local folders of the tasks' data sets: hub name -> hash. Data sets without one are left out."""
    names = {get_task(task).dataset for task in tasks} - {None}
    folders = {name: resolve_local(name) for name in sorted(names)}
    return {name: content_hash(folder) for name, folder in folders.items() if Path(folder).is_dir()}


def read_scores(folder):
    """Read the scores from the result files in `folder`.

    Returns:
        dict: task -> {"score", "stderr", "version", "harness", "chat", "questions"}. Score and standard error are in
        percent, or as the harness gives them if the metric is not a share (a perplexity); the standard error is None if
        the file has none. "questions" is what `question_scores` returned, or
        None. A member of a group (a subject of MMLU) is left out.

    Raises:
        UserError: a file is not a result file.
    """
    scores = {}
    for file in sorted(Path(folder).glob("*.json")):
        what = "result file of lm-evaluation-harness"
        content = read_json(file, what)
        if not isinstance(content.get("results", {}), dict):
            raise UserError(f"{file} is not a {what}")
        subtasks = {task for members in content.get("group_subtasks", {}).values() for task in members}
        for task, values in content.get("results", {}).items():
            metric = get_task(task).metric
            if f"{metric},none" not in values:
                others = [name.partition(",")[0] for name in values if "," in name and "_stderr" not in name]
                metric = others[0] if others else metric
            key = next((name for name in values if name.startswith(f"{metric},")), None)
            if task in subtasks or key is None:
                continue
            stderr = values.get(key.replace(",", "_stderr,"))
            scale = 100 if any(part in metric for part in SHARES) else 1
            scores[task] = {
                "score": scale * values[key],
                "stderr": scale * stderr if isinstance(stderr, float) else None,
                "version": content.get("versions", {}).get(task),
                "harness": content.get("lm_eval_version"),
                "chat": bool(content.get("chat_template")),
                QUESTIONS: content.get(QUESTIONS),
            }
    return scores


def question_scores(samples, task, results):
    """Return the score of every question, for paired differences between models.

    Args:
        samples: the harness's samples: dict of task -> list of dicts.
        task: the task, or group of tasks.
        results: the results of this task alone, as from `split_by_task`.

    Returns:
        dict of "sha256" (of the questions, in order) and "scores" (list of float, between 0 and 1); for TruthfulQA's
        format also "negated" (list of 0 or 1: whether the gold answer contains a negation). None if the harness gives
        no score of single questions, or if the score of the task is not their mean.
    """
    metric = get_task(task).metric
    rows = [
        row
        for name in _members(task, results.get("group_subtasks", {})) or [task]
        for row in sorted(samples.get(name, ()), key=lambda row: row["doc_id"])
        if row["filter"] == "none" and metric in row
    ]
    reported = results["results"][task].get(f"{metric},none")
    mean = sum(float(row[metric]) for row in rows) / max(1, len(rows))
    if not rows or reported is None or abs(mean - reported) > 1e-5:
        return None
    asked = hashlib.sha256("".join(row["doc_hash"] for row in rows).encode())
    found = {"sha256": asked.hexdigest(), "scores": [round(float(row[metric]), 6) for row in rows]}
    if task in TASKS and task.endswith(("_mc1", "_mc2")):
        targets = [row["doc"]["mc1_targets"] for row in rows]
        found["negated"] = [int(negated([target["choices"][target["labels"].index(1)]])) for target in targets]
    return found


def check_numbers(samples):
    """Raise `UserError` if a log-likelihood or a score in the harness's samples is NaN.

    The harness would take the first choice then, which is the right one of MC1.
    """
    for task, rows in samples.items():
        if any(_has_nan([row["filtered_resps"], row.get(get_task(task).metric)]) for row in rows):
            raise UserError(
                f"{task}: the model computes NaN instead of log-likelihoods. Often this is an overflow in fp16: score "
                "this model alone in bf16 or fp32; if that does not help, its weights are broken, or training diverged"
            )


def _has_nan(value):
    if isinstance(value, list | tuple):
        return any(map(_has_nan, value))
    return isinstance(value, float) and math.isnan(value)


def tasks_of(rows):
    """List the tasks with a score in any of the (name, scores) rows, in the order of the table's columns."""
    scored = {task for _, scores in rows for task in scores}
    return [task for task in TASKS if task in scored] + sorted(scored - set(TASKS))


def record_settings(folder, settings, write=True):
    """Write the settings that the scores in a folder depend on (dict of str) to its settings.txt, as NAME=VALUE lines.

    Args:
        write: whether to write the file, or only to compare.

    Raises:
        UserError: the folder has scores made with another value of a setting. A setting that is new, such as the data
            set of a task that is added later, is appended.
    """
    file = folder / "settings.txt"
    text = file.read_text(encoding="utf-8") if file.is_file() and any(folder.glob("*.json*")) else ""
    before = dict(part.split("=", 1) for part in text.split() if "=" in part)
    for name, value in settings.items():
        if before.get(name, value) != value:
            raise UserError(
                f"{folder} contains scores with {name}={before[name]}, not {value}: choose another folder, or remove it"
            )
    now = "".join(f"{name}={value}\n" for name, value in (before | settings).items())
    if write and now != text:
        check_writable(folder)
        atomic_write_text(file, now)


def split_by_task(results):
    """Split the harness's results of several tasks: dict of task, or group of tasks, -> results of that task only."""
    groups = results.get("group_subtasks", {})
    members = {task for tasks in groups.values() for task in tasks}
    by_task = set(results["results"]) | set(results["versions"])
    found = {}
    for task in results["results"]:
        if task in members:
            continue
        own = {task, *_members(task, groups)}
        found[task] = {
            key: {name: entry for name, entry in value.items() if name in own}
            if isinstance(value, dict) and value and set(value) <= by_task
            else value
            for key, value in results.items()
        }
    return found


def is_scored(folder, task, log_samples):
    """Whether a task has its result file in a folder, and, with `log_samples`, those of its logged questions."""
    scored = (folder / f"{task}.json").is_file()
    return scored and (not log_samples or all(file.is_file() for file in sample_files(folder, task)))


def sample_files(folder, task):
    """List the files of the logged questions of a task that has its result file: one for each member of a group."""
    groups = read_json(folder / f"{task}.json", "result file of lm-evaluation-harness").get("group_subtasks", {})
    return [folder / f"samples_{name}.jsonl" for name in [task, *_members(task, groups)] if not groups.get(name)]


def _members(task, groups):
    return [name for member in groups.get(task, ()) for name in (member, *_members(member, groups))]
