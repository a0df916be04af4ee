"""The report of a run: scores of every round against the base, pairs, trainings, answers side by side, and a plot.

    python -m grath.report RUN_DIR              writes report.md, iterations.png and iterations.svg there
    python -m grath.report RUN_DIR RUN_DIR ...  compares runs: writes comparison.md and comparison.png beside the first
    python -m grath.report RESULTS_DIR          prints the scores of one model
    python -m grath.report --pending RUNS_DIR   what the newest run has not scored yet, for evaluation.sh

Results are the JSON files of lm-evaluation-harness, below any names.
"""

import re
import sys
from pathlib import Path

from grath.cli import Parser, UserError, read_json, read_json_lines, run, write_whole
from grath.distance import negated
from grath.manifest import NAME as MANIFEST
from grath.manifest import read as read_manifest
from grath.models import ADAPTER, RECORD, split_adapter
from grath.plots import plot_comparison, plot_iterations
from grath.scores import footer, read_scores, table, tasks_of, verdict

# The paper's main results: scores of the base and of the last round where both are given, else the gain.
PAPER = {
    "llama-2-7b-chat": "MC1 30.23 -> 54.71, MC2 45.32 -> 69.10, ARC +5.03, HellaSwag +1.13, MMLU -1.26",
    "zephyr-7b": "MC1 42.23 -> 53.86, MC2 57.83 -> 66.73",
}


# What a comparison shows of the pairs of a round.
FACTS = ("asked", "parsed", "identical", "echoed", "distance", "probe", "negated", "words")


def manifest_of(run_dir):
    """The manifest of a run's folder, an empty one where there is none."""
    found = read_manifest(run_dir) if (Path(run_dir) / MANIFEST).is_file() else None
    return found or {"settings": {}, "stages": []}


def rounds(run_dir):
    """The rounds of a run's folder.

    Returns:
        dict: round number -> {"model": name or folder, None if not known; "results": folder; "pairs": dict of
        `read_pairs_of`, or None; "training": dict of `read_training`, or None for the base}.
    """
    run_dir = Path(run_dir)
    found = {0: {"model": None, "training": None}}
    for folder in run_dir.glob("models/iter_*"):
        if (folder / ADAPTER).is_file():
            found[int(re.match(r"iter_(\d+)", folder.name)[1])] = {"model": folder, "training": read_training(folder)}
    for number, row in found.items():
        row["results"] = run_dir / "results" / f"iter_{number}"
        files = [file for file in run_dir.glob(f"data/iter{number}_*.json") if file.stem.endswith(("_True", "_False"))]
        row["pairs"] = read_pairs_of(files[0]) if files else None
    first = found.get(1, {}).get("model")
    found[0]["model"] = split_adapter(first)[0] if first else None
    return dict(sorted(found.items()))


def read_pairs_of(file):
    """What is known of a round's pairs.

    Returns:
        dict: how many were "asked" for (the file's name says so), "parsed", have "identical" answers, and an "echoed"
        correct one, which only repeats the question; of the pairs that DPO is given (spliced, different answers) the
        shares of correct and of incorrect answers that are "negated", their mean "words", and "distance" and "probe",
        None where `grath.distance` has not been run.
    """
    rows = read_json_lines(file, "the pair file")
    asked = re.search(r"_num_(\d+)_", file.name)
    spliced = file.with_name(f"{file.stem}_combined.json")
    given = read_json_lines(spliced, "the spliced pair file") if spliced.is_file() else rows
    given = [row for row in given if row.get("correct") != row.get("incorrect")]
    sides = [[row.get(side, "") for row in given] for side in ("correct", "incorrect")]
    measured = (spliced if spliced.is_file() else file).with_suffix(".distance.json")
    found = read_json(measured, "record of grath.distance") if measured.is_file() else {}
    return {
        "distance": found.get("distance"),
        "probe": found.get("probe"),
        "negated": " / ".join(f"{negated(side):.3f}" for side in sides) if given else None,
        "words": " / ".join(f"{len(' '.join(side).split()) / len(side):.1f}" for side in sides) if given else None,
        "asked": int(asked[1]) if asked else None,
        "parsed": len(rows),
        "identical": sum(row.get("correct") == row.get("incorrect") for row in rows),
        "echoed": sum(_echoes(row.get("question", ""), row.get("correct", "")) for row in rows),
    }


def _echoes(question, answer):
    question, answer = (re.sub(r"[^a-z0-9 ]", "", text.lower()).strip() for text in (question, answer))
    return answer in question or question in answer


def read_training(folder):
    """The last "margin" and "accuracy" of a training, its "pairs", "steps" and "seconds"; None where not recorded."""
    record, log = {}, []
    if (folder / RECORD).is_file():
        record = read_json(folder / RECORD, "record of a training")
    if (folder / "training_log.jsonl").is_file():
        log = [entry for entry in read_json_lines(folder / "training_log.jsonl", "the log") if "loss" in entry]
    last = log[-1] if log else {}
    return {
        "margin": last.get("rewards/margins"),
        "accuracy": last.get("rewards/accuracies"),
        "steps": last.get("step"),
        "pairs": (record.get("pairs") or {}).get("kept"),
        "seconds": record.get("seconds"),
        "warnings": record.get("warnings", []),
    }


def newest_run(runs_dir):
    """The run below `runs_dir` whose models changed last, or None."""
    models = [folder for folder in Path(runs_dir).glob("*/models") if any(folder.glob("iter_*"))]
    # Runs that FRESH=1 has moved aside are not gone on with.
    models = [folder for folder in models if not re.search(r"\.old-\d+$", folder.parent.name)]
    return max(models, key=lambda folder: folder.stat().st_mtime).parent if models else None


def pending(runs_dir, tasks):
    """The newest run, and its rounds that lack a score of `tasks`: (run, [(model, results folder), ...])."""
    run_dir = newest_run(runs_dir)
    if run_dir is None:
        raise UserError(f"nothing to score below {runs_dir}; usage: ./evaluation.sh MODEL_OR_ADAPTER [OUTPUT_DIR]")
    rows = [row for row in rounds(run_dir).values() if row["model"] and set(tasks) - set(read_scores(row["results"]))]
    return run_dir, [(row["model"], row["results"]) for row in rows]


def score_rows(found):
    """(name, scores) of every round of `rounds`."""
    return [
        (f"M_{number}" + (" (base)" if number == 0 else ""), read_scores(row["results"]))
        for number, row in found.items()
    ]


def compare(run_dirs):
    """Write comparison.md and comparison.png of several runs beside the first; the text for the terminal."""
    from tabulate import tabulate

    folder, parts, rows, bases, curves = Path(run_dirs[0]).resolve().parent, ["# Runs compared"], [], [], {}
    manifests = {run_dir: manifest_of(run_dir) for run_dir in run_dirs}
    names = {name for manifest in manifests.values() for name in manifest["settings"]}
    differing = [name for name in sorted(names) if len({m["settings"].get(name) for m in manifests.values()}) > 1]
    facts = []
    for run_dir in map(Path.resolve, run_dirs):
        found = rounds(run_dir)
        own = score_rows(found)
        curves[run_dir.name] = own
        bases.append(own[0][1])
        shown = own if own[0][1] not in bases[:-1] else own[1:]
        rows += [(f"{run_dir.name}: {name}", scores) for name, scores in shown]
        for number, row in found.items():
            if row["pairs"]:
                facts.append([run_dir.name, f"M_{number}", *(row["pairs"][fact] for fact in FACTS)])
    header = ["run", *differing]
    settings = [
        [Path(run_dir).name, *(m["settings"].get(name) for name in differing)] for run_dir, m in manifests.items()
    ]
    one_base = all(base == bases[0] for base in bases)
    parts += [tabulate(settings, header, tablefmt="github", disable_numparse=True)]
    parts += [table(rows, "github", differences=one_base), footer(rows)]
    parts.append(tabulate(facts, ["run", "pairs by", *FACTS], tablefmt="github", missingval="-", floatfmt=".3f"))
    files = ["comparison.md"]
    if tasks_of(rows):
        plot_comparison(curves, folder / "comparison.png")
        parts.append("![scores of the runs against rounds](comparison.png)")
        files.append("comparison.png")
    write_whole(folder / "comparison.md", "\n\n".join(part for part in parts if part) + "\n")
    scores = table(rows, differences=one_base)
    return "\n".join([scores, footer(rows), f"Wrote {' and '.join(files)} in {folder}"])


def write_report(run_dir):
    """Write report.md, iterations.png and iterations.svg of a run; the text for the terminal."""
    run_dir = Path(run_dir)
    found = rounds(run_dir)
    rows = score_rows(found)
    base = str(found[0]["model"] or "not known yet")
    files = ["report.md"]
    parts = [f"# {run_dir.resolve().name}", f"Base model: {base}", table(rows, "github"), footer(rows), *verdict(rows)]
    if tasks_of(rows):
        plot_iterations(rows, run_dir / "iterations.png", run_dir / "iterations.svg")
        parts.append("![scores against rounds](iterations.png)")
        files += ["iterations.png", "iterations.svg"]
    for name, figures in PAPER.items():
        if name in base.lower():
            parts.append(f"The paper reports for this base: {figures}.")
    parts += ["## Pairs and trainings", _rounds_table(found)]
    parts += [
        f"- M_{number}: {warning}"
        for number, row in found.items()
        if row["training"]
        for warning in row["training"]["warnings"]
    ]
    manifest = manifest_of(run_dir)
    parts += _stages(manifest["stages"])
    parts += _samples(found)
    parts.append("## Settings")
    if manifest["settings"]:
        settings = "\n".join(f"{name}={value}" for name, value in manifest["settings"].items())
        parts.append(f"```text\n{settings}\n```")
    scored = {
        file.read_text(encoding="utf-8") for row in found.values() for file in row["results"].glob("settings.txt")
    }
    parts += ["```text\n" + text.strip() + "\n```" for text in sorted(scored)]
    parts.append(made_with(manifest["stages"]))
    write_whole(run_dir / "report.md", "\n\n".join(part for part in parts if part) + "\n")
    return "\n".join([table(rows), footer(rows), *verdict(rows), f"Wrote {', '.join(files)} in {run_dir}"])


def made_with(stages):
    """The commits and the versions of the libraries that a run's stages were made with, as its manifest keeps them."""
    commits = dict.fromkeys(entry["commit"] for entry in stages if entry.get("commit"))
    found = {}
    for entry in stages:
        for package, version in entry.get("versions", {}).items():
            found.setdefault(package, {})[version or "none"] = None
    lines = [f"Commit: {', '.join(commits) or 'not known'}"]
    if found:
        lines.append("Versions: " + ", ".join(f"{package} {' and '.join(seen)}" for package, seen in found.items()))
    return "\n".join(lines)


def _rounds_table(found):
    from tabulate import tabulate

    header = [
        "round",
        "asked",
        "parsed",
        "identical",
        "echoed",
        "trained on",
        "steps",
        "distance",
        "probe",
        "negated",
        "words",
        "last margin",
        "accuracy",
        "DPO seconds (last start)",
    ]
    body = []
    for number, row in found.items():
        pairs, training = row["pairs"] or {}, found.get(number + 1, {}).get("training") or {}
        if not pairs and not training:
            continue
        cells = [pairs.get(key) for key in ("asked", "parsed", "identical", "echoed")]
        cells += [training.get(key) for key in ("pairs", "steps")]
        cells += [pairs.get(key) for key in ("distance", "probe", "negated", "words")]
        cells += [training.get(key) for key in ("margin", "accuracy", "seconds")]
        body.append([f"M_{number} -> M_{number + 1}", *cells])
    return tabulate(body, header, tablefmt="github", missingval="-", floatfmt=".3f") if body else "No round yet."


def _stages(entries):
    from tabulate import tabulate

    if not entries:
        return []
    rows = [[entry["title"], round(entry["seconds"]), entry["starts"], entry["outcome"]] for entry in entries]
    return ["## Stages", tabulate(rows, ["stage", "seconds, all starts", "starts", "outcome"], tablefmt="github")]


def _samples(found):
    answers = {}
    for number, row in found.items():
        if (row["results"] / "samples.jsonl").is_file():
            for sample in read_json_lines(row["results"] / "samples.jsonl", "the samples"):
                answers.setdefault(sample["question"], []).append((number, sample["answer"]))
    if not answers:
        return []
    parts = ["## The same questions, round by round"]
    for question, rows in answers.items():
        parts.append(f"**{question}**")
        parts.append("\n".join(f"- M_{number}: {' '.join(answer.split()) or '(nothing)'}" for number, answer in rows))
    return parts


def main():
    parser = Parser(__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="a run's folder, several of them, or one of result files")
    parser.add_argument(
        "--pending",
        action="store_true",
        help="print the newest run, its EVAL_PRECISION, LIMIT, BACKEND and CHAT_TEMPLATE, then model and results "
        "folder of its rounds without scores, each ended by a NUL",
    )
    parser.add_argument("--tasks", nargs="+", default=[], help="the scores that --pending asks for")
    args = parser.parse_args()
    folder = args.folders[0]
    if len(args.folders) > 1:
        strange = [str(other) for other in args.folders if not (other / MANIFEST).is_file()]
        if strange:
            raise UserError(f"{strange[0]} is no run's folder: it holds no {MANIFEST}")
        print(compare(args.folders))
    elif args.pending:
        run_dir, models = pending(folder, args.tasks)
        print(f"newest run: {run_dir}, {len(models)} round(s) without scores", file=sys.stderr)
        settings = manifest_of(run_dir)["settings"]
        values = [settings.get(name, "") for name in ("EVAL_PRECISION", "LIMIT", "BACKEND", "CHAT_TEMPLATE")]
        print(run_dir, *values, sep="\0", end="\0")
        for model, results in models:
            print(model, results, sep="\0", end="\0")
    elif (folder / "models").is_dir() or (folder / "data").is_dir():
        print(write_report(folder))
    else:
        scores = read_scores(folder)
        if not scores:
            raise UserError(f"{folder} holds no results of lm-evaluation-harness and no run")
        rows = [(folder.name, scores)]
        print(table(rows))
        print(footer(rows))


if __name__ == "__main__":
    run(main)
