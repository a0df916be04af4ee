"""Plots of scores by iteration and of DPO by step."""

import io

from grath.common.files import atomic_write_bytes
from grath.evaluation.results import QUESTIONS, tasks_of
from grath.evaluation.tasks import get_task


def new_figure(width, height):
    """Make an empty matplotlib figure; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path):
    """Save a matplotlib figure atomically, in the format of the file's suffix."""
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:], dpi=120)
    atomic_write_bytes(path, content.getvalue())


def plot_iterations(rows, *paths):
    """Plot the scores of (name, scores) rows by iteration; a dashed line marks the base.

    Error bars are standard errors, where there are no scores of single questions for paired differences.

    Args:
        paths: the files to write; their suffixes choose the format.
    """
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    for task in tasks_of(rows):
        found = {at: scores[task] for at, (_, scores) in enumerate(rows) if task in scores}
        heights = [score["score"] for score in found.values()]
        errors = [0 if score[QUESTIONS] else score["stderr"] or 0 for score in found.values()]
        title = get_task(task).title
        line = axes.errorbar(list(found), heights, yerr=errors, marker="o", capsize=3, label=title)
        if 0 in found:
            axes.axhline(heights[0], linestyle="--", linewidth=1, alpha=0.6, color=line[0].get_color())
    axes.set(xlabel="iteration", ylabel="percent", title="Scores (dashed: the base model)")
    axes.set_xticks(range(len(rows)), [name.split()[0] for name, _ in rows])
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    for path in paths:
        save_figure(figure, path)


def plot_comparison(groups, tasks, path):
    """Plot the scores of groups of runs, as from `group_runs`, by iteration: one panel per task, the legend below."""
    figure = new_figure(4 * len(tasks), 3.6 + 0.12 * len(groups))
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False).flat, tasks, strict=True):
        lines = []
        for group in groups:
            scores = {number: model["scores"].get(task) for number, model in group["models"].items()}
            points = {number: score["score"] for number, score in scores.items() if score}
            lines += axes.plot(list(points), list(points.values()), marker="o")
        axes.set(title=get_task(task).title, xlabel="iteration", ylabel="percent")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.legend(lines, [group["name"] for group in groups], loc="outside lower center", ncols=4)
    save_figure(figure, path)


def plot_training(log, path):
    """Plot the loss, reward margin, reward accuracy and log-probabilities of DPO by step.

    Args:
        log: list of dict, the entries of TRL's log.
        path: the PNG file; it is written atomically.
    """
    panels = {
        "loss": {"loss": "loss"},
        "reward margin": {"margin": "rewards/margins"},
        "reward accuracy": {"accuracy": "rewards/accuracies"},
        "log-probability of an answer": {"chosen": "logps/chosen", "rejected": "logps/rejected"},
    }
    figure = new_figure(9, 6)
    for axes, (title, lines) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for label, key in lines.items():
            points = {entry["step"]: entry[key] for entry in log if key in entry}
            axes.plot(list(points), list(points.values()), marker=".", label=label)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend()
    save_figure(figure, path)
