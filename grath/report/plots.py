"""Plots of scores by iteration and of DPO by step."""

import io

from grath.common.files import atomic_write_bytes
from grath.evaluation.results import QUESTIONS
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


def plot_scores(runs, tasks, *paths):
    """Plot scores by iteration, one panel per task, with the legend below; a dashed line marks the base.

    Error bars are standard errors, where there are no scores of single questions for paired differences.

    Args:
        runs: dict of name -> "models" of what `read_run` or `group_runs` returned.
        paths: the files to write; their suffixes choose the format.
    """
    figure = new_figure(4 * len(tasks), 3.6 + 0.12 * len(runs))
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False).flat, tasks, strict=True):
        for color, (name, models) in enumerate(runs.items()):
            found = {number: model["scores"][task] for number, model in models.items() if task in model["scores"]}
            heights = [score["score"] for score in found.values()]
            errors = [0 if score[QUESTIONS] else score["stderr"] or 0 for score in found.values()]
            axes.errorbar(
                list(found), heights, errors, marker="o", capsize=3, color=f"C{color}", label=name.replace("$", r"\$")
            )
            if 0 in found:
                axes.axhline(heights[0], linestyle="--", linewidth=1, alpha=0.6, color=f"C{color}")
        axes.set(title=get_task(task).title.replace("$", r"\$"), xlabel="iteration", ylabel="percent")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    for path in paths:
        save_figure(figure, path)


def plot_training(log, path):
    """Plot the loss, reward margin, reward accuracy and log-probabilities of DPO by step (log: dicts, as TRL's)."""
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
