"""Figures of the study: pairs and changes of the scores of all runs, and changes against the truth signal."""

from grath.evaluation.tasks import get_task
from grath.report.plots import new_figure, save_figure


def plot_summary(changes, pairs, tasks, path):
    """Plot the pairs of the first iteration (left), and the changes of the scores (right); controls are on top.

    Args:
        changes: list of dict: "name" of the model, "gold", whether it was trained on gold answers, and "gains".
        pairs: list of (name of the runs, `pair_stats` of M_0's pairs).
    """
    changes = sorted(changes, key=lambda change: not change["gold"])
    tasks = [task for task in tasks if any(task in change["gains"] for change in changes)]
    funnels = {}
    for name, stats in pairs:
        funnels.setdefault(tuple(map(str, stats.items())), (name, stats))
    height = 1.6 + 0.4 * max(len(changes), len(funnels))
    widths = [*([1.6] if funnels else []), *[1] * len(tasks)]
    figure = new_figure(2.9 * sum(widths) + 1, height)
    panels = list(figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]) if widths else []
    if funnels:
        _plot_funnels(funnels.values(), panels.pop(0))
    for axes, task in zip(panels, tasks, strict=True):
        for at, change in enumerate(changes):
            if task in change["gains"]:
                difference, low, high = change["gains"][task]
                error = lengths(difference, low, high)
                color = "#31a354" if change["gold"] else "#3182bd"
                axes.errorbar(difference, at, xerr=error, marker="o", capsize=3, color=color)
        axes.axvline(0, color="gray", linewidth=1)
        axes.set_yticks(range(len(changes)), [change["name"] for change in changes])
        axes.tick_params(labelleft=axes is panels[0])
        axes.set(title=f"change of {get_task(task).title}", xlabel="points", ylim=(len(changes) - 0.5, -0.5))
        axes.grid(axis="x", alpha=0.3)
    save_figure(figure, path)


def _plot_funnels(funnels, axes):
    """Draw for each (name, pair statistics) how many questions were asked, parsed, and have different answers."""
    names = []
    for at, (name, stats) in enumerate(funnels):
        different = stats["parsed"] - stats["identical"]
        asked = stats["asked"] or stats["parsed"]
        bars = {"asked": asked, "parsed": stats["parsed"], "different": different}
        for color, (what, count) in zip(("#d9d9d9", "#9ecae1", "#6baed6"), bars.items(), strict=True):
            axes.barh(at, count, color=color, label=what if at == 0 else None, height=0.7)
        text = f" {different} of {asked}; truth signal {stats['signal'] or 'not known'}"
        axes.text(0, at, text, va="center", fontsize=8)
        names.append(name)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(title="pairs of the first iteration", xlabel="questions")
    below = -0.7 / axes.figure.get_figheight()
    axes.legend(loc="upper left", bbox_to_anchor=(0, below), ncols=3, fontsize=8, frameon=False)


def plot_signal(points, tasks, path):
    """Plot the change of the scores of M_1 against the truth signal of the pairs that it was trained on.

    Args:
        points: what `signal_points` of study.py returned.
    """
    tasks = [task for task in tasks if any(task in point["gains"] for point in points)]
    figure = new_figure(4.2 * len(tasks), 4 + 0.12 * len(points))
    marks = {}
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False).flat, tasks, strict=True):
        for at, point in enumerate(points):
            if task not in point["gains"]:
                continue
            (x, left, right), (y, low, high) = point["signal"], point["gains"][task]
            marks[point["name"]] = axes.errorbar(
                x,
                y,
                xerr=lengths(x, left, right),
                yerr=lengths(y, low, high),
                marker="s" if point["gold"] else "o",
                color=f"C{at}",
                capsize=2,
            )
        axes.axhline(0, color="gray", linewidth=1)
        axes.set(xlabel="truth signal of the pairs", ylabel="points", title=f"change of {get_task(task).title} in M_1")
        axes.grid(alpha=0.3)
    figure.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=4)
    save_figure(figure, path)


def lengths(value, low, high):
    """Return the two lengths of an error bar; an interval of equal values may leave its mean by a rounding error."""
    return [[max(0, value - low)], [max(0, high - value)]]
