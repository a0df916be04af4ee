"""Result files of lm-evaluation-harness: split, written with the score of every question, and read."""

import hashlib
import json
import math
from pathlib import Path

from grath.common.errors import UserError
from grath.common.files import atomic_write_text, read_json, sha256
from grath.common.layout import SCORES_RECORD
from grath.common.record import read_record
from grath.evaluation.tasks import KNOWN_TASKS, get_task
from grath.pairs.stats import negated

QUESTIONS = "questions"
RESULT_FILE = "result file of lm-evaluation-harness"
EDITED = "is not the file that was written: remove it, and score the model again"
NO_SCORE = "is not a task with a score of its own: name its members in TASKS"
# What the names of metrics between 0 and 1 contain; they are shown in percent.
SHARES = ("acc", "exact_match", "f1", "pass", "mcc")


def read_scores(folder):
    """Read the scores from the result files in `folder`; if it has a record, from those that the record names.

    Returns:
        dict: task -> {"score", "stderr", "version", "harness", "chat", "questions"}. Score and standard error are in
        percent, or as the harness gives them if the metric is not a share (a perplexity); the standard error is None if
        the file has none. "questions" is what `question_scores` returned. A member of a group (a subject of MMLU) is
        left out.

    Raises:
        UserError: a file is not a result file, or not the one that was recorded.
    """
    folder, scores = Path(folder), {}
    recorded = (read_record(folder / SCORES_RECORD) or {}).get("files")
    for file in sorted(set(folder.glob("*.json")) - {folder / SCORES_RECORD}):
        if recorded is not None:
            if file.name not in recorded:  # its stage was killed, and will score the task again
                continue
            if sha256(file) != recorded[file.name]:
                raise UserError(f"{file} {EDITED}")
        content = read_json(file, RESULT_FILE)
        if not isinstance(content.get("results", {}), dict):
            raise UserError(f"{file} is not a {RESULT_FILE}")
        subtasks = {task for members in content.get("group_subtasks", {}).values() for task in members}
        for task, values in content.get("results", {}).items():
            metrics = [name for name in values if "," in name and "_stderr" not in name]
            key = f"{get_task(task).metric},none"
            key = key if key in metrics else next(iter(metrics), None)
            if task in subtasks or key is None:
                continue
            stderr = values.get(key.replace(",", "_stderr,"))
            scale = 100 if any(part in key.partition(",")[0] for part in SHARES) else 1
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
    if task in KNOWN_TASKS and task.endswith(("_mc1", "_mc2")):
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
    return [task for task in KNOWN_TASKS if task in scored] + sorted(scored - set(KNOWN_TASKS))


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


def write_results(folder, tasks, results, log_samples):
    """Write the harness's results of some tasks, one file a task.

    Args:
        log_samples: whether to write every question and its log-likelihoods to samples_{task}.jsonl too.

    Returns:
        list of the files' names.

    Raises:
        UserError: the model computes NaN, or a task has no score of its own.
    """
    from lm_eval.utils import handle_non_serializable

    samples = results.pop("samples", {})
    check_numbers(samples)
    by_task, texts = split_by_task(results), {}
    for task in tasks:
        if task not in by_task:  # a group whose scores the harness does not average
            raise UserError(f"{task} {NO_SCORE}")
        by_task[task][QUESTIONS] = question_scores(samples, task, by_task[task])
        text = json.dumps(by_task[task], indent=2, default=handle_non_serializable, ensure_ascii=False)
        texts[f"{task}.json"] = text + "\n"
    for task, rows in samples.items() if log_samples else ():
        lines = [json.dumps(row, default=handle_non_serializable, ensure_ascii=False) + "\n" for row in rows]
        texts[f"samples_{task}.jsonl"] = "".join(lines)
    for name, text in texts.items():
        atomic_write_text(folder / name, text)
    return list(texts)


def is_scored(folder, task, log_samples, files):
    """Whether `files` (names) contain the result file of a task and, with `log_samples`, of its logged questions."""
    scored = f"{task}.json" in files
    return scored and (not log_samples or set(sample_files(folder, task)) <= set(files))


def sample_files(folder, task):
    """Name the files of the logged questions of a task that has its result file: one for each member of a group."""
    groups = read_json(folder / f"{task}.json", RESULT_FILE).get("group_subtasks", {})
    return [f"samples_{name}.jsonl" for name in [task, *_members(task, groups)] if not groups.get(name)]


def _members(task, groups):
    return [name for member in groups.get(task, ()) for name in (member, *_members(member, groups))]
