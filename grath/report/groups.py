"""Groups of runs that differ only in the seed, or in the fold of a control: pooled scores, and gains over the base."""

import math
import os
import re
from pathlib import Path

from grath.report.paired import paired_difference, pool
from grath.report.runs import asked_questions, iterations, manifest_of, score_rows


def group_runs(run_dirs):
    """Read runs and group those whose settings differ only in SEED and in the rows of GOLD_PAIRS.

    Returns:
        list of dict: "name", that of the run folders without the seed; "settings", a dict of the values of every
        setting in the group, as a string; "gold", whether it trains on gold answers; "models", a dict: i -> {"scores"
        and "base": what `pool` returned for the runs that have M_i; "pairs": list of different dicts of `pair_stats`}.
    """
    grouped = {}
    for run_dir in map(Path, run_dirs):
        settings = manifest_of(run_dir)["settings"]
        same = {name: value for name, value in settings.items() if name != "SEED" and value}
        same["GOLD_PAIRS"] = settings.get("GOLD_PAIRS", "").partition("[")[0]
        grouped.setdefault(tuple(sorted(same.items())), []).append((run_dir, settings))
    groups = []
    for members in grouped.values():
        names = {name: None for _, settings in members for name in settings}
        runs = [_read_run(run_dir) for run_dir, _ in members]
        groups.append(
            {
                "name": _group_name([run_dir.resolve().name for run_dir, _ in members]),
                "settings": {name: _joined(settings.get(name) for _, settings in members) for name in names},
                "gold": bool(members[0][1].get("GOLD_PAIRS")),
                "models": {number: _pooled_model(number, runs) for number in sorted(set().union(*runs))},
            }
        )
    return groups


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
        list of dict: "name", "gold", "signal" (value, low, high; a control's is 1 by definition), "gains" (as in
        `gains`). Groups without either are left out.
    """
    points = []
    for group in groups:
        found = gains(group, 1, tasks) if 1 in group["models"] else {}
        truth = next((stats["truth"] for stats in group["models"].get(0, {"pairs": ()})["pairs"]), None)
        signal = (1.0, 1.0, 1.0) if group["gold"] else truth and (truth["signal"], *truth["interval"])
        if found and signal:
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
