"""Plots of scores by iteration and of DPO by step."""

import io

from grath.common.files import atomic_write_bytes
from grath.evaluation.results import QUESTIONS, tasks_of
from grath.evaluation.tasks import get_task
from grath.report.groups import gains, model_label


def plot_iterations(rows, *paths):
    """Plot the scores of (name, scores) rows by iteration; a dashed line marks the base.

    Error bars are standard errors, where there are no scores of single questions for paired differences.

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
            yerr=[0 if score[QUESTIONS] else score["stderr"] or 0 for _, score in points],
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


def plot_comparison(groups, tasks, path):
    """Plot the scores of groups of runs by iteration, one panel per task, with the legend below.

    Args:
        groups: what `group_runs` returned.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(tasks), 3.6 + 0.12 * len(groups)), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False).flat
    lines = {}
    for axes, task in zip(panels, tasks, strict=True):
        for at, group in enumerate(groups):
            points = [
                (number, model["scores"][task]["score"])
                for number, model in group["models"].items()
                if task in model["scores"]
            ]
            where, heights = zip(*points, strict=True) if points else ((), ())
            lines[group["name"]] = axes.plot(where, heights, marker="o", color=f"C{at}")[0]
        axes.set(title=get_task(task).title, xlabel="iteration", ylabel="percent")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4)
    save_figure(figure, path)


def plot_summary(groups, tasks, path):
    """Plot the pairs of the first iteration (left), and the changes of the scores by the first and the last (right).

    Args:
        groups: what `group_runs` returned; those that train on gold answers are drawn on top. Of runs with several
            seeds, the pairs are those of the first.
    """
    from matplotlib.figure import Figure

    groups = sorted(groups, key=lambda group: not group["gold"])
    changes = [change for group in groups for change in _first_and_last(group, tasks)]
    tasks = [task for task in tasks if any(task in found for *_, found in changes)]
    funnels = {}
    for group in groups:
        for stats in group["models"].get(0, {"pairs": ()})["pairs"][:1]:
            funnels.setdefault(tuple(map(str, stats.items())), (group["name"], stats))
    height = 1.6 + 0.4 * max(len(changes), len(funnels))
    widths = [*([1.6] if funnels else []), *[1] * len(tasks)]
    figure = Figure(figsize=(2.9 * sum(widths) + 1, height), layout="constrained")
    panels = list(figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]) if widths else []
    if funnels:
        _plot_funnels(funnels.values(), panels.pop(0))
    for axes, task in zip(panels, tasks, strict=True):
        for at, (group, _, found) in enumerate(changes):
            if task in found:
                difference, low, high = found[task]
                error = _lengths(difference, low, high)
                color = "#31a354" if group["gold"] else "#3182bd"
                axes.errorbar(difference, at, xerr=error, marker="o", capsize=3, color=color)
        axes.axvline(0, color="gray", linewidth=1)
        axes.set_yticks(range(len(changes)), [name for _, name, _ in changes])
        axes.tick_params(labelleft=axes is panels[0])
        axes.set(title=f"change of {get_task(task).title}", xlabel="points", ylim=(len(changes) - 0.5, -0.5))
        axes.grid(axis="x", alpha=0.3)
    save_figure(figure, path)


def _first_and_last(group, tasks):
    """Return (group, name, gains) of the first model that has gains over the base, and of the last one."""
    found = [
        (group, model_label(group, number), of_model)
        for number in sorted(group["models"])
        if number and (of_model := gains(group, number, tasks))
    ]
    return found if len(found) < 2 else [found[0], found[-1]]


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
        points: what `signal_points` returned.
    """
    from matplotlib.figure import Figure

    tasks = [task for task in tasks if any(task in point["gains"] for point in points)]
    figure = Figure(figsize=(4.2 * len(tasks), 4 + 0.12 * len(points)), layout="constrained")
    marks = {}
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False).flat, tasks, strict=True):
        for at, point in enumerate(points):
            if task not in point["gains"]:
                continue
            (x, left, right), (y, low, high) = point["signal"], point["gains"][task]
            marks[point["name"]] = axes.errorbar(
                x,
                y,
                xerr=_lengths(x, left, right),
                yerr=_lengths(y, low, high),
                marker="s" if point["gold"] else "o",
                color=f"C{at}",
                capsize=2,
            )
        axes.axhline(0, color="gray", linewidth=1)
        axes.set(xlabel="truth signal of the pairs", ylabel="points", title=f"change of {get_task(task).title} in M_1")
        axes.grid(alpha=0.3)
    figure.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=4)
    save_figure(figure, path)


def _lengths(value, low, high):
    """Return the two lengths of an error bar; an interval of equal values may leave its mean by a rounding error."""
    return [[max(0, value - low)], [max(0, high - value)]]


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
    """Save a matplotlib figure atomically, in the format of the file's suffix."""
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:], dpi=120)
    atomic_write_bytes(path, content.getvalue())
