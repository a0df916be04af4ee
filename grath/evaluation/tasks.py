"""The tasks of the Open LLM Leaderboard and the bundled ones: few-shot examples, metric, data set and title."""

import os
import re
from dataclasses import dataclass
from math import exp
from pathlib import Path

from grath.common.errors import UserError
from grath.common.layout import PROJECT
from grath.common.local_data import load_dataset

OWN_TASKS = PROJECT / "tasks"
NO_SCORE = "is not a task with a score of its own: name its members in TASKS"


@dataclass(frozen=True)
class Task:
    """How to score a task of lm-evaluation-harness."""

    name: str
    title: str  # the heading of its column in tables and plots
    shots: int = 0  # few-shot examples in each prompt
    metric: str = "acc"  # the harness's name of the reported score
    dataset: str | None = None  # the hub name of its data set; None: it reads a bundled file
    folder: str | None = None  # where `lm_eval.tasks` has its files; None for a bundled task


# In the order of the table's columns.
KNOWN_TASKS = {
    task.name: task
    for task in (
        Task("truthfulqa_mc1", "MC1", dataset="truthfulqa/truthful_qa", folder="truthfulqa"),
        Task("truthfulqa_mc2", "MC2", dataset="truthfulqa/truthful_qa", folder="truthfulqa"),
        Task("grath_mc1", "MC1 (bundled)"),
        Task("grath_mc2", "MC2 (bundled)"),
        Task("arc_challenge", "ARC", shots=25, metric="acc_norm", dataset="allenai/ai2_arc", folder="arc"),
        Task("hellaswag", "HellaSwag", shots=10, metric="acc_norm", dataset="Rowan/hellaswag", folder="hellaswag"),
        Task("mmlu", "MMLU", shots=5, dataset="cais/mmlu", folder="mmlu/default"),
    )
}


def get_task(name):
    """Return the `Task` of a name. Any other task of the harness is zero-shot and scored by accuracy."""
    return KNOWN_TASKS.get(name) or Task(name, title=name)


def own_files(name):
    """List the files of a task in tasks/: its own, those that it includes, and the functions; none for another task."""
    file = OWN_TASKS / f"{name}.yaml"
    if not file.is_file():
        return []
    included = re.findall(r"""^include: *["']?([^\s#"']+)\.yaml""", file.read_text(encoding="utf-8"), re.MULTILINE)
    return [file, *(one for name in included for one in own_files(name)), *OWN_TASKS.glob("*.py")]


def task_manager(tasks):
    """Prepare the harness; return its `TaskManager`. Raise `UserError` if one of the tasks is not known."""
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    import datasets
    import lm_eval.tasks
    import lm_eval.utils

    lm_eval.utils.setup_logging()
    datasets.load_dataset = load_dataset
    # The harness needs 14 seconds to read the files of all its tasks, so it reads those of the known ones first.
    builtin = Path(lm_eval.tasks.__file__).parent
    folders = {str(builtin / KNOWN_TASKS[task].folder) for task in KNOWN_TASKS.keys() & tasks if get_task(task).folder}
    own = [str(OWN_TASKS), *sorted(folders)]
    manager = lm_eval.tasks.TaskManager(include_path=own, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        manager = lm_eval.tasks.TaskManager(include_path=own)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UserError(f"{unknown[0]} is not a task of lm-evaluation-harness: see `lm-eval ls tasks`")
    for task in tasks:
        averaged = (manager.task_index[task].cfg or {}).get("aggregate_metric_list")
        if task in manager.all_tags or (task in manager.all_groups and not averaged):
            raise UserError(f"{task} {NO_SCORE}")
    return manager


def mc2(log_likelihoods, labels):
    """Compute MC2: the probability of the correct answers (label 1), normalized over all answers; never 0 / 0."""
    highest = max(log_likelihoods)
    shares = [exp(log_likelihood - highest) for log_likelihood in log_likelihoods]
    return sum(share for share, label in zip(shares, labels, strict=True) if label == 1) / sum(shares)
