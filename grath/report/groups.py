"""Groups of runs that differ only in the seed, or in the fold of a control: pooled scores, and gains over the base."""

import math
import os
import re
from pathlib import Path

from grath.pairs.questions import labeled_rows
from grath.report.paired import paired_difference, pool
from grath.report.runs import asked_questions, iterations, manifest_of, score_rows

# More than any data set of `GOLD_PAIRS` has.
MOST_ROWS = 10**5


def group_runs(run_dirs):
    """Read runs and group those whose settings differ only in SEED, or in disjoint rows of GOLD_PAIRS (folds).

    Returns:
        list of dict: "name", that of the run folders without the seed; "settings", a dict of the values of every
        setting in the group, as a string; "gold", whether it trains on gold answers; "models", a dict: i -> {"runs":
        number of runs that have M_i; "scores" and "base": what `pool` returned for these; "pairs": list of different
        dicts of `pair_stats`}.
    """
    grouped = []
    for run_dir in map(Path, run_dirs):
        settings = manifest_of(run_dir)["settings"]
        group = next((members for members in grouped if _belongs(settings, members)), None)
        if group is None:
            grouped.append(group := [])
        group.append((run_dir, settings))
    groups = []
    for members in grouped:
        settings_names = {name: None for _, settings in members for name in settings}
        runs = [_read_run(run_dir) for run_dir, _ in members]
        names = [run_dir.resolve().name for run_dir, _ in members]
        name = _group_name(names)
        groups.append(
            {
                "name": names[0] if name in [group["name"] for group in groups] else name,
                "settings": {name: _joined(settings.get(name) for _, settings in members) for name in settings_names},
                "gold": bool(members[0][1].get("GOLD_PAIRS")),
                "models": {number: _pooled_model(number, runs) for number in sorted(set().union(*runs))},
            }
        )
    return groups


def model_label(group, number):
    """Return the name of a group's M_i; if only some of its runs have it, also how many."""
    runs, all_runs = group["models"][number]["runs"], max(model["runs"] for model in group["models"].values())
    return f"{group['name']}: M_{number}" + (f" ({runs} of {all_runs} runs)" if runs < all_runs else "")


def _belongs(settings, members):
    """Whether a run belongs to a group: another seed, or rows of GOLD_PAIRS that no run of its seed has."""

    def rest(of_run):
        kept = {name: value for name, value in of_run.items() if name not in ("SEED", "GOLD_PAIRS") and value}
        return kept | {"GOLD_PAIRS": of_run.get("GOLD_PAIRS", "").partition("[")[0]}

    def rows(of_run):
        return set(range(MOST_ROWS)[labeled_rows(of_run["GOLD_PAIRS"])])

    for _, other in members:
        if rest(settings) != rest(other):
            return False
        overlap = not settings.get("GOLD_PAIRS") or rows(settings) & rows(other)
        if overlap and settings.get("SEED") == other.get("SEED"):
            return False
        if overlap and settings.get("GOLD_PAIRS") != other.get("GOLD_PAIRS"):
            return False
    return True


def _read_run(run_dir):
    """Return i -> (scores, pairs) of a run."""
    found = iterations(run_dir, asked_questions(run_dir))
    rows = score_rows(run_dir, found)
    return {number: (scores, row["pairs"]) for (number, row), (_, scores) in zip(found.items(), rows, strict=True)}


def _pooled_model(number, runs):
    having = [run for run in runs if number in run]
    pairs = [run[number][1] for run in having if run[number][1]]
    having = [run for run in having if run[number][0]] or having
    return {
        "runs": len(having),
        "scores": pool([run[number][0] for run in having]),
        "base": pool([run[0][0] for run in having]),
        "pairs": [stats for i, stats in enumerate(pairs) if stats not in pairs[:i]],
    }


def _group_name(names):
    """Return what the names of run folders have in common, without their seeds."""
    names = [re.sub(r"_seed_\d+$", "", name) for name in names]
    return os.path.commonprefix(names).rstrip("_- ") or names[0]


def _joined(values):
    return ", ".join(dict.fromkeys(value for value in values if value))


def gains(group, number, tasks):
    """Return the gains of a group's M_i over its base: task -> (difference, low, high), as in `paired_difference`."""
    model = group["models"][number]
    found = {
        task: paired_difference(model["base"][task], model["scores"][task])
        for task in tasks
        if task in model["base"] and task in model["scores"]
    }
    return {task: gain for task, gain in found.items() if gain}


def signal_points(groups, tasks):
    """Collect for each group the truth signal of the pairs that M_1 was trained on, and the gains of M_1.

    Returns:
        list of dict: "name", "gold", "signal" (value, low, high, averaged over the group's different pairs; a control's
        is 1 by definition), "gains" (as in `gains`). Groups without either, or with those of another, are left out.
    """
    points = []
    for group in groups:
        found = gains(group, 1, tasks) if 1 in group["models"] else {}
        of_runs = [stats["truth"] for stats in group["models"].get(0, {"pairs": ()})["pairs"] if stats["truth"]]
        of_runs = [(truth["signal"], *truth["interval"]) for truth in of_runs]
        signal = (
            (1.0, 1.0, 1.0) if group["gold"] else tuple(sum(part) / len(part) for part in zip(*of_runs, strict=True))
        )
        # M_1 is the same with either reference.
        same = any((signal, found) == (point["signal"], point["gains"]) for point in points)
        if found and signal and not same:
            points.append({"name": group["name"], "gold": group["gold"], "signal": signal, "gains": found})
    return points


def correlation(pairs):
    """Return Pearson's correlation of (x, y) pairs and its 95 % interval by Fisher's transformation.

    Returns:
        tuple of three floats; None with fewer than four pairs, or if one side does not vary.
    """
    import numpy

    xs, ys = numpy.array(pairs, dtype=float).reshape(-1, 2).T
    if len(xs) < 4 or not xs.std() or not ys.std():
        return None
    r = float(numpy.corrcoef(xs, ys)[0, 1])
    middle, half = math.atanh(min(max(r, -1 + 1e-12), 1 - 1e-12)), 1.96 / math.sqrt(len(xs) - 3)
    return r, math.tanh(middle - half), math.tanh(middle + half)
