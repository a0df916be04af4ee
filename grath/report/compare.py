"""The comparison of several runs: settings that differ, scores, pairs, and a plot."""

from pathlib import Path

from grath.common.errors import UserError
from grath.common.files import atomic_write_text
from grath.common.provenance import MANIFEST
from grath.evaluation.results import tasks_of
from grath.pairs.stats import PAIR_STATS
from grath.report.plots import plot_comparison
from grath.report.run import asked_questions, iterations, manifest_of, score_rows
from grath.report.tables import score_footer, score_table


def compare(run_dirs):
    """Write comparison.md and comparison.png next to the first run; return the text for the terminal.

    Raises:
        UserError: one of the folders has no manifest.
    """
    from tabulate import tabulate

    for run_dir in run_dirs:
        if not (run_dir / MANIFEST).is_file():
            raise UserError(f"{run_dir} is not a run folder: it contains no {MANIFEST}")
    folder, parts, rows, bases, curves = Path(run_dirs[0]).resolve().parent, ["# Runs compared"], [], [], {}
    manifests = {run_dir: manifest_of(run_dir) for run_dir in run_dirs}
    names = {name for manifest in manifests.values() for name in manifest["settings"]}
    differing = [name for name in sorted(names) if len({m["settings"].get(name) for m in manifests.values()}) > 1]
    stats = []
    for run_dir in map(Path.resolve, run_dirs):
        found = iterations(run_dir, asked_questions(run_dir))
        run_rows = score_rows(found)
        curves[run_dir.name] = run_rows
        bases.append(run_rows[0][1])
        shown = run_rows if run_rows[0][1] not in bases[:-1] else run_rows[1:]  # a base that runs share is shown once
        rows += [(f"{run_dir.name}: {name}", scores) for name, scores in shown]
        for number, row in found.items():
            if row["pairs"]:
                stats.append([run_dir.name, f"M_{number}", *(row["pairs"][name] for name in PAIR_STATS)])
    header = ["run", *differing]
    settings = [
        [Path(run_dir).name, *(m["settings"].get(name) for name in differing)] for run_dir, m in manifests.items()
    ]
    same_base = all(base == bases[0] for base in bases)
    parts += [tabulate(settings, header, tablefmt="github", disable_numparse=True)]
    parts += [score_table(rows, "github", differences=same_base), score_footer(rows)]
    parts.append(tabulate(stats, ["run", "pairs by", *PAIR_STATS], tablefmt="github", missingval="-", floatfmt=".3f"))
    files = ["comparison.md"]
    if tasks_of(rows):
        plot_comparison(curves, folder / "comparison.png")
        parts.append("![scores of the runs by iteration](comparison.png)")
        files.append("comparison.png")
    atomic_write_text(folder / "comparison.md", "\n\n".join(part for part in parts if part) + "\n")
    scores = score_table(rows, differences=same_base)
    return "\n".join([scores, score_footer(rows), f"Wrote {' and '.join(files)} in {folder}"])
