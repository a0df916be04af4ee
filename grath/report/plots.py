"""Plots of scores by iteration and of DPO by step."""

from grath.evaluation.results import tasks_of
from grath.evaluation.tasks import get_task


def plot_iterations(rows, *paths):
    """Plot the scores of (name, scores) rows by iteration, with error bars; a dashed line marks the base.

    Args:
        paths: the files to write; their suffixes choose the format.
    """
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
            label=get_task(task).title,
        )
        if where[0] == 0:
            axes.axhline(heights[0], linestyle="--", linewidth=1, alpha=0.6, color=line[0].get_color())
    axes.set(xlabel="iteration", ylabel="percent", title="Scores (dashed: the base model)")
    axes.set_xticks(range(len(rows)), [name.split()[0] for name, _ in rows])
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    for path in paths:
        save_figure(figure, path)


def plot_comparison(curves, path):
    """Plot the scores of several runs by iteration, one panel per task.

    Args:
        curves: dict: run -> (name, scores) rows.
    """
    from matplotlib.figure import Figure

    tasks = tasks_of([row for rows in curves.values() for row in rows])
    figure = Figure(figsize=(4 * len(tasks), 3.6), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False).flat, tasks, strict=True):
        for run, rows in curves.items():
            points = [(at, scores[task]) for at, (_, scores) in enumerate(rows) if task in scores]
            axes.errorbar(
                [at for at, _ in points],
                [score["score"] for _, score in points],
                yerr=[score["stderr"] or 0 for _, score in points],
                marker="o",
                capsize=3,
                label=run,
            )
        axes.set(title=get_task(task).title, xlabel="iteration", ylabel="percent")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def plot_training(log, path):
    """Plot the loss, reward margin, reward accuracy and log-probabilities of DPO by step.

    Args:
        log: list of dict, the entries of TRL's log.
        path: the PNG file; it is written atomically.
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
    """Save a matplotlib figure through a temporary file and a rename, so that `path` is never incomplete."""
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format=path.suffix[1:], dpi=120)
    partial.replace(path)
