"""The comparison of several runs: settings that differ, scores, pairs, and plots; runs of several seeds are pooled."""

from pathlib import Path

from grath.common.errors import UserError
from grath.common.files import atomic_write_text
from grath.common.provenance import MANIFEST
from grath.evaluation.results import tasks_of
from grath.evaluation.tasks import get_task
from grath.pairs.stats import OF_OWN_PAIRS, PAIR_STATS
from grath.report.groups import correlation, group_runs, model_label, signal_points
from grath.report.plots import plot_comparison, plot_signal, plot_summary
from grath.report.tables import negation_section, score_footer, score_tables


def compare(run_dirs):
    """Write comparison.md and its plots next to the first run; return the text for the terminal.

    Raises:
        UserError: one of the folders has no manifest.
    """
    for run_dir in run_dirs:
        if not (run_dir / MANIFEST).is_file():
            raise UserError(f"{run_dir} is not a run folder: it contains no {MANIFEST}")
    folder = Path(run_dirs[0]).resolve().parent
    groups = group_runs(run_dirs)
    rows, bases = _score_rows(groups)
    page, terminal = score_tables(rows, bases)
    parts = ["# Runs compared", _settings_table(groups)]
    parts += [page, score_footer(rows, bases), *negation_section(rows, bases)]
    parts.append(_pairs_table(groups))
    files = ["comparison.md"]
    tasks = tasks_of(rows)
    if tasks:
        plot_comparison(groups, tasks, folder / "comparison.png")
        plot_summary(groups, tasks, folder / "summary.png")
        parts.append("![scores of the runs by iteration](comparison.png)")
        parts.append("![pairs of the first iteration, and changes of the scores](summary.png)")
        files += ["comparison.png", "summary.png"]
    points = signal_points(groups, tasks)
    if len(points) > 1:
        plot_signal(points, tasks, folder / "signal.png")
        parts += ["![truth signal and gain](signal.png)", *_correlation_lines(points, tasks)]
        files.append("signal.png")
    atomic_write_text(folder / "comparison.md", "\n\n".join(part for part in parts if part) + "\n")
    wrote = f"Wrote {', '.join(files)} in {folder}"
    return "\n".join([terminal, score_footer(rows, bases), wrote])


def _score_rows(groups):
    """Return (name, scores) rows of all models, and the base's scores for each; a base is shown once."""
    rows, bases, shown = [], [], []
    for group in groups:
        for number, model in group["models"].items():
            if number == 0:
                key = {task: round(score["score"], 6) for task, score in model["scores"].items()}
                if key in shown:
                    continue
                shown.append(key)
            base = model["scores"] if number == 0 else model["base"]
            rows.append((model_label(group, number) + (" (base)" if number == 0 else ""), model["scores"]))
            bases.append(base)
    return rows, bases


def _settings_table(groups):
    from tabulate import tabulate

    names = sorted({name for group in groups for name in group["settings"]})
    differing = [
        name
        for name in names
        if len({group["settings"].get(name, "") for group in groups}) > 1
        or any(", " in group["settings"].get(name, "") for group in groups)
    ]
    body = [[group["name"], *(group["settings"].get(name, "") for name in differing)] for group in groups]
    return tabulate(body, ["run", *differing], tablefmt="github", disable_numparse=True)


def _pairs_table(groups):
    from tabulate import tabulate

    body = [
        [group["name"], f"M_{number}", *(stats[name] for name in PAIR_STATS)]
        for group in groups
        for number, model in group["models"].items()
        for stats in model["pairs"]
    ]
    if not body:
        return ""
    header = ["run", "pairs by", *PAIR_STATS]
    table = tabulate(body, header, tablefmt="github", missingval="-", floatfmt=".3f")
    own = ", ".join(OF_OWN_PAIRS)
    return f"{table}\n\n({own}: of the pairs that the model wrote; the rest: of those that DPO trains on)"


def _correlation_lines(points, tasks):
    """Say how the truth signal of the pairs and the gain of M_1 correlate over runs, without and with the controls."""
    lines = []
    for kept, what in (
        (False, "the runs on a model's own pairs"),
        (True, "these runs and the controls on gold answers"),
    ):
        for task in tasks:
            chosen = [point for point in points if task in point["gains"] and (kept or not point["gold"])]
            found = correlation([(point["signal"][0], point["gains"][task][0]) for point in chosen])
            if found and (not kept or any(point["gold"] for point in chosen)):
                r, low, high = found
                lines.append(
                    f"Over {what} ({len(chosen)}), the correlation of the truth signal and the change of "
                    f"{get_task(task).title} in M_1 is {r:.2f} [{low:.2f}, {high:.2f}]."
                )
    return lines
