"""The figure of the study: changes of the scores with their intervals, by what the models were trained on."""

from grath.evaluation.tasks import get_task
from grath.report.plots import new_figure, save_figure


def plot_changes(groups, tasks, path):
    """Draw a forest plot: a panel with one scale for each task, a row for each model, and the groups as headings.

    Args:
        groups: dict of title -> list of (label, gains as `study.gains` returns them).
        tasks: names of the tasks.
    """
    lines, colors = [], []
    for color, (title, changes) in zip(("#31a354", "#3182bd", "#e6550d"), groups.items(), strict=True):
        if changes:
            lines += [(title, {}), *changes]
            colors += [color] * (1 + len(changes))
    figure = new_figure(3.2 * len(tasks) + 2.6, 1 + 0.27 * len(lines))
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False, sharex=True)[0], tasks, strict=True):
        for at, ((_, found), color) in enumerate(zip(lines, colors, strict=True)):
            if task in found:
                difference, low, high = found[task]
                axes.plot(difference, at, marker="o", color=color)
                axes.plot((low, high), (at, at), marker="|", color=color)
        axes.axvline(0, color="gray", linewidth=1)
        axes.set_yticks(range(len(lines)), [label for label, _ in lines])
        for (_, found), color, label in zip(lines, colors, axes.get_yticklabels(), strict=True):
            label.set(color=color, fontweight="normal" if found else "bold")
        axes.tick_params(left=False, labelleft=task == tasks[0])
        axes.set(title=f"change of {get_task(task).title}", xlabel="points", ylim=(len(lines) - 0.5, -0.5))
        axes.grid(axis="x", alpha=0.3)
    save_figure(figure, path)
