"""The report of one run: scores of every iteration against the base, pairs, training, sample answers, and a plot."""

import re
from pathlib import Path

from grath.common.errors import UserError
from grath.common.files import atomic_write_text, read_json, read_json_lines
from grath.common.paths import ADAPTER, PROJECT, RECORD
from grath.common.provenance import MANIFEST, read_manifest
from grath.evaluation.results import read_scores, tasks_of
from grath.modeling.loading import resolve_base_and_adapter
from grath.pairs.questions import load_questions
from grath.pairs.stats import pair_stats
from grath.report.plots import plot_iterations
from grath.report.tables import best_iteration, score_footer, score_table

# The paper's main results: the scores of the base and of the last iteration, or the gain where it gives only that.
PAPER = {
    "llama-2-7b-chat": "MC1 30.23 -> 54.71, MC2 45.32 -> 69.10, ARC +5.03, HellaSwag +1.13, MMLU -1.26",
    "zephyr-7b": "MC1 42.23 -> 53.86, MC2 57.83 -> 66.73",
}


def manifest_of(run_dir):
    """Read the manifest of a run folder; return an empty one if there is none."""
    found = read_manifest(run_dir) if (Path(run_dir) / MANIFEST).is_file() else None
    return found or {"settings": {}, "stages": []}


def asked_questions(run_dir):
    """Load the questions of a run with their gold answers; an empty list if they are not on this machine."""
    settings = manifest_of(run_dir)["settings"]
    if "SPLIT" not in settings:
        return []
    path = settings.get("DATA_PATH")
    path = next((place for place in (Path(path), PROJECT / path) if place.is_file()), path) if path else None
    try:
        return load_questions(settings["DATA_NAME"], settings["SUBDATA_NAME"], settings["SPLIT"], path)
    except UserError:
        return []


def iterations(run_dir, questions=()):
    """Collect the iterations of a run folder.

    Args:
        questions: what `asked_questions` returned, for the truth signal of the pairs.

    Returns:
        dict: i -> {"model": name or folder of M_i, None if unknown; "results": folder of its scores; "pairs": dict of
        `pair_stats` of the pairs that M_i wrote, or None; "training": dict of `read_training`, None for the base M_0}.
    """
    run_dir = Path(run_dir)
    found = {0: {"model": None, "training": None}}
    for folder in run_dir.glob("models/iter_*"):
        if (folder / ADAPTER).is_file():
            found[int(re.match(r"iter_(\d+)", folder.name)[1])] = {"model": folder, "training": read_training(folder)}
    for number, row in found.items():
        row["results"] = run_dir / "results" / f"iter_{number}"
        files = [file for file in run_dir.glob(f"data/iter{number}_*.json") if file.stem.endswith(("_True", "_False"))]
        row["pairs"] = pair_stats(files[0], questions) if files else None
    first = found.get(1, {}).get("model")
    found[0]["model"] = resolve_base_and_adapter(first)[0] if first else None
    return dict(sorted(found.items()))


def is_run(folder):
    """Return whether a folder is the folder of a run."""
    return (folder / "models").is_dir() or (folder / "data").is_dir()


def read_training(folder):
    """Read the record and the log of DPO in a model folder.

    Returns:
        dict: the last "margin" and "accuracy", "steps", "pairs" and "seconds", each None if not recorded, and
        "warnings", a list of str.
    """
    record, log = {}, []
    if (folder / RECORD).is_file():
        record = read_json(folder / RECORD, "training record")
    if (folder / "training_log.jsonl").is_file():
        log = [entry for entry in read_json_lines(folder / "training_log.jsonl", "training log") if "loss" in entry]
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
    """Return the run folder in `runs_dir` whose models changed last, or None."""
    models = [folder for folder in Path(runs_dir).glob("*/models") if any(folder.glob("iter_*"))]
    # FRESH=1 moves a run aside under such a name.
    models = [folder for folder in models if not re.search(r"\.old-\d+$", folder.parent.name)]
    return max(models, key=lambda folder: folder.stat().st_mtime).parent if models else None


def unscored(runs_dir, tasks):
    """Find the newest run and its models that lack a score of any of `tasks`.

    Returns:
        tuple: the run folder, and a list of (model, results folder).

    Raises:
        UserError: `runs_dir` contains no run with a model.
    """
    run_dir = newest_run(runs_dir)
    if run_dir is None:
        raise UserError(f"nothing to score in {runs_dir}; usage: ./evaluation.sh MODEL_OR_ADAPTER [OUTPUT_DIR]")
    rows = [
        row for row in iterations(run_dir).values() if row["model"] and set(tasks) - set(read_scores(row["results"]))
    ]
    return run_dir, [(row["model"], row["results"]) for row in rows]


def score_rows(found):
    """Return (name, scores) of every model of `iterations`."""
    return [
        (f"M_{number}" + (" (base)" if number == 0 else ""), read_scores(row["results"]))
        for number, row in found.items()
    ]


def write_report(run_dir):
    """Write report.md, iterations.png and iterations.svg into a run folder; return the text for the terminal."""
    run_dir = Path(run_dir)
    found = iterations(run_dir, asked_questions(run_dir))
    rows = score_rows(found)
    base = str(found[0]["model"] or "not known yet")
    files = ["report.md"]
    parts = [
        f"# {run_dir.resolve().name}",
        f"Base model: {base}",
        score_table(rows, "github"),
        score_footer(rows),
        *best_iteration(rows),
    ]
    if tasks_of(rows):
        plot_iterations(rows, run_dir / "iterations.png", run_dir / "iterations.svg")
        parts.append("![scores by iteration](iterations.png)")
        files += ["iterations.png", "iterations.svg"]
    for name, figures in PAPER.items():
        if name in base.lower():
            parts.append(f"The paper reports for this base: {figures}.")
    parts += ["## Pairs and training", _iterations_table(found)]
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
    score_settings = {
        file.read_text(encoding="utf-8") for row in found.values() for file in row["results"].glob("settings.txt")
    }
    parts += ["```text\n" + text.strip() + "\n```" for text in sorted(score_settings)]
    parts.append(made_with(manifest["stages"]))
    atomic_write_text(run_dir / "report.md", "\n\n".join(part for part in parts if part) + "\n")
    return "\n".join(
        [score_table(rows), score_footer(rows), *best_iteration(rows), f"Wrote {', '.join(files)} in {run_dir}"]
    )


def made_with(stages):
    """Name the commits and library versions that the manifest entries `stages` were made with."""
    commits = dict.fromkeys(entry["commit"] for entry in stages if entry.get("commit"))
    found = {}
    for entry in stages:
        for package, version in entry.get("versions", {}).items():
            found.setdefault(package, {})[version or "none"] = None
    lines = [f"Commit: {', '.join(commits) or 'not known'}"]
    if found:
        lines.append("Versions: " + ", ".join(f"{package} {' and '.join(seen)}" for package, seen in found.items()))
    return "\n".join(lines)


def _iterations_table(found):
    from tabulate import tabulate

    header = [
        "iteration",
        "asked",
        "parsed",
        "identical",
        "echoed",
        "truth signal [95 %]",
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
        cells = [pairs.get(key) for key in ("asked", "parsed", "identical", "echoed", "signal")]
        cells += [training.get(key) for key in ("pairs", "steps")]
        cells += [pairs.get(key) for key in ("distance", "probe", "negated", "words")]
        cells += [training.get(key) for key in ("margin", "accuracy", "seconds")]
        body.append([f"M_{number} -> M_{number + 1}", *cells])
    return tabulate(body, header, tablefmt="github", missingval="-", floatfmt=".3f") if body else "No iteration yet."


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
            for sample in read_json_lines(row["results"] / "samples.jsonl", "sample answers"):
                answers.setdefault(sample["question"], []).append((number, sample["answer"]))
    if not answers:
        return []
    parts = ["## The same questions, iteration by iteration"]
    for question, rows in answers.items():
        parts.append(f"**{question}**")
        parts.append("\n".join(f"- M_{number}: {' '.join(answer.split()) or '(nothing)'}" for number, answer in rows))
    return parts
