"""Result files of lm-evaluation-harness: split, written with the score of every question, and read."""

import json
import math
import re
from functools import partial
from pathlib import Path
from types import NoneType

from grath.common.errors import UserError
from grath.common.files import atomic_write_text, fits, hash_of, read_json
from grath.common.layout import SCORES_RECORD
from grath.common.record import NUMBER, VERSION, check_files, read_record
from grath.evaluation.tasks import KNOWN_TASKS, NO_SCORE, get_task, mc2
from grath.pairs.stats import negated

QUESTIONS = "questions"
RESULT_FILE = "result file of lm-evaluation-harness"
RESULT = {
    "results?": {str: dict},
    "versions?": {str: (VERSION, int | float, NoneType)},
    "group_subtasks?": {str: [str]},
    "lm_eval_version?": (VERSION, NoneType),
    "truncated?": int,
    f"{QUESTIONS}?": (NoneType, {"sha256": str, "scores": [NUMBER | None], "negated?": [int]}),
}
EDITED = "remove it, and score the model again"
TASK = re.compile(r"[\w.:/+ -]{1,100}")
# Parts of the names of metrics between 0 and 1, which are shown in percent.
SHARES = ("acc", "exact_match", "f1", "pass", "mcc")


def read_scores(folder):
    """Read the scores from the result files in `folder`; if it has a record, from those that the record names.

    Returns:
        dict: task -> {"score", "stderr" (or None), "version", "harness", "chat", "truncated", "questions"}, without the
        members of groups (MMLU's subjects). Score and standard error are in percent, or as the harness gives them if
        the metric is not a share (a perplexity). "truncated" is the number of contexts that were cut, "questions" what
        `question_scores` returned.

    Raises:
        UserError: a file is not a result file, or not the one that was recorded, or two have one task.
    """
    folder, scores = Path(folder), {}
    if record := read_record(folder / SCORES_RECORD):
        check_files(record, folder, EDITED)
    for file in sorted(set(folder.glob("*.json")) - {folder / SCORES_RECORD}):
        # A file that the record does not name: its stage was killed, and will score the task again.
        if not file.is_file() or (record and file.name not in record.get("files", {})):
            continue
        content = read_json(file, RESULT_FILE, RESULT)
        subtasks = {task for members in content.get("group_subtasks", {}).values() for task in members}
        for task, values in content.get("results", {}).items():
            if not TASK.fullmatch(task):
                raise UserError(f"{file} is damaged, or not a {RESULT_FILE}")
            metrics = [name for name in values if "," in name and "_stderr" not in name]
            key = f"{get_task(task).metric},none"
            key = key if key in metrics else next(iter(metrics), None)
            if task in subtasks or key is None:
                continue
            if task in scores:
                raise UserError(f"{file} and an earlier file of {folder} both have {task}: move one away")
            if not fits(values[key], NUMBER):
                raise UserError(f"{file} is damaged: {key} of {task} is not a number")
            stderr = values.get(key.replace(",", "_stderr,"))
            scale = 100 if any(part in key.partition(",")[0] for part in SHARES) else 1
            scores[task] = {
                "score": scale * values[key],
                "stderr": scale * stderr if fits(stderr, float) else None,
                "version": content.get("versions", {}).get(task),
                "harness": content.get("lm_eval_version"),
                "chat": bool(content.get("chat_template")),
                "truncated": content.get("truncated", 0),
                QUESTIONS: content.get(QUESTIONS),
            }
    return scores


def question_scores(samples, task, reported):
    """Return the score of every question, for paired differences between models.

    Args:
        samples: the harness's samples of a task, or of all members of a group: list of dicts.
        task: the task, or group of tasks.
        reported: its score as the harness reports it, or None.

    Returns:
        dict of "sha256" (of the questions, in order) and "scores" (list of float, between 0 and 1); for TruthfulQA's
        format also "negated" (list of 0 or 1: whether the gold answer contains a negation). None if the score of the
        task is not the mean of scores of questions.
    """
    metric = get_task(task).metric
    rows = [row for row in samples if row["filter"] == "none" and metric in row]
    mean = sum(float(row[metric]) for row in rows) / max(1, len(rows))
    if not rows or reported is None or abs(mean - reported) > 1e-5:
        return None
    asked = hash_of(["".join(row["doc_hash"] for row in rows)])
    found = {"sha256": asked, "scores": [round(float(row[metric]), 6) for row in rows]}
    if task in KNOWN_TASKS and task.endswith(("_mc1", "_mc2")):
        targets = [row["doc"]["mc1_targets"] for row in rows]
        found["negated"] = [int(negated([target["choices"][target["labels"].index(1)]])) for target in targets]
    return found


def check_numbers(samples):
    """Raise `UserError` if a log-likelihood or a score in the harness's samples is NaN.

    The harness would take the first choice then, which is the right one of MC1.
    """
    for task, rows in samples.items():
        answers = [answer for row in rows for answer in [*row["filtered_resps"], row.get(get_task(task).metric)]]
        numbers = [number for answer in answers for number in (answer if isinstance(answer, tuple) else [answer])]
        if any(isinstance(number, float) and math.isnan(number) for number in numbers):
            raise UserError(
                f"{task}: the model computes NaN instead of log-likelihoods. Often this is an overflow in fp16: score "
                "this model alone in bf16 or fp32; if that does not help, its weights are broken, or training diverged"
            )


def mend_underflow(samples, results):
    """Compute MC2 in place where the harness loses the probabilities of all answers, because they are below 1e-304."""
    from lm_eval.api.metrics import mean, mean_stderr

    for task, rows in samples.items():
        underflow = False
        for row in [row for row in rows if "mc2" in task and "mc2_targets" in row["doc"]]:
            logs = [log_likelihood for log_likelihood, _ in row["filtered_resps"]]
            if all(map(math.isfinite, logs)) and max(logs) < -700:
                row["acc"], underflow = mc2(logs, row["doc"]["mc2_targets"]["labels"]), True
        if underflow:
            scores = [row["acc"] for row in rows]
            results[task]["acc,none"] = mean(scores)
            results[task]["acc_stderr,none"] = mean_stderr(scores) if len(scores) > 1 else "N/A"


def tasks_of(rows):
    """List the tasks with a score in any of the (name, scores) rows, in the order of the table's columns."""
    scored = {task for _, scores in rows for task in scores}
    return [task for task in KNOWN_TASKS if task in scored] + sorted(scored - set(KNOWN_TASKS))


def write_results(folder, tasks, results, log_samples):
    """Write the harness's results of some tasks, one file per task; return the names of the files.

    Args:
        log_samples: whether to write every question and its log-likelihoods too, to the file `samples_file`.

    Raises:
        UserError: the model computes NaN, or a task has no score of its own.
    """
    from lm_eval.utils import handle_non_serializable

    to_json = partial(json.dumps, default=handle_non_serializable, ensure_ascii=False)
    samples, texts = results.pop("samples", {}), {}
    mend_underflow(samples, results["results"])
    check_numbers(samples)
    for task in tasks:
        if not any("," in name for name in results["results"].get(task, ())):
            raise UserError(f"{task} {NO_SCORE}")
        own = _with_members(task, results.get("group_subtasks", {}))
        of_task = {name: results["results"][name] for name in own if name in results["results"]}
        rows = [row for name in own for row in sorted(samples.get(name, ()), key=lambda row: row["doc_id"])]
        reported = of_task[task].get(f"{get_task(task).metric},none")
        content = results | {"results": of_task, QUESTIONS: question_scores(rows, task, reported)}
        texts[f"{task}.json"] = to_json(content, indent=2) + "\n"
        if log_samples:
            texts[samples_file(task)] = "".join(f"{to_json(row)}\n" for row in rows)
    for name, text in texts.items():
        atomic_write_text(folder / name, text)
    return list(texts)


def samples_file(task):
    """Return the name of the file of a task's logged questions; that of a group has the questions of all members."""
    return f"samples_{task}.jsonl"


def _with_members(task, groups):
    """List a task and, if it is a group, its members at every level."""
    return [task, *(name for member in groups.get(task, ()) for name in _with_members(member, groups))]
