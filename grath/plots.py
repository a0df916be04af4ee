"""The plots: scores against rounds, and a training against its steps."""

from grath.scores import TITLES, tasks_of


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
    axes.set(xlabel="round", ylabel="percent", title="Scores; dashed: the base model")
    axes.set_xticks(range(len(rows)), [name.split()[0] for name, _ in rows])
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    for path in paths:
        save_figure(figure, path)


def plot_comparison(curves, path):
    """Draw the scores of several runs against the rounds, a panel a task.

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
        axes.set(title=TITLES.get(task, task), xlabel="round", ylabel="percent")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    axes.legend()
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
