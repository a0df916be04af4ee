"""Read run folders: models, scores, pairs and trainings of every iteration."""

import re
from pathlib import Path

from grath.common.errors import UserError
from grath.common.files import read_json, read_json_lines
from grath.common.paths import ADAPTER, PROJECT, RECORD
from grath.common.provenance import MANIFEST, read_manifest
from grath.evaluation.results import read_scores, tasks_of
from grath.modeling.loading import resolve_base_and_adapter
from grath.pairs.questions import load_questions
from grath.pairs.stats import pair_stats
from grath.report.paired import hold_out

# What `pair_stats` found, by iteration: a published run has no pair files.
PAIRS = "pairs.json"


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
    recorded = read_json(run_dir / PAIRS, "record of pairs") if (run_dir / PAIRS).is_file() else {}
    for folder in run_dir.glob("models/iter_*"):
        if (folder / ADAPTER).is_file() or _is_published(folder):
            found[int(re.match(r"iter_(\d+)", folder.name)[1])] = {"model": folder, "training": read_training(folder)}
    for number, row in found.items():
        row["results"] = run_dir / "results" / f"iter_{number}"
        files = [file for file in run_dir.glob(f"data/iter{number}_*.json") if file.stem.endswith(("_True", "_False"))]
        row["pairs"] = earlier = recorded.get(str(number))
        if files:
            row["pairs"] = pair_stats(files[0], questions)
            if earlier and not questions:
                row["pairs"] |= {name: earlier[name] for name in ("truth", "signal")}
    first = found.get(1, {}).get("model")
    if first and (first / ADAPTER).is_file():
        record = read_json(first / RECORD, "training record") if (first / RECORD).is_file() else {}
        found[0]["model"] = record.get("incoming_adapter") or resolve_base_and_adapter(first)[0]
    elif first:
        found[0]["model"] = manifest_of(run_dir)["settings"].get("MODEL_NAME_OR_PATH")
    return dict(sorted(found.items()))


def _is_published(folder):
    """Whether the training of a model is finished, by its record, and its weights are not here."""
    return (folder / RECORD).is_file() and bool(read_json(folder / RECORD, "training record").get("adapter_sha256"))


def is_run(folder):
    """Return whether a folder is the folder of a run."""
    return any((folder / name).exists() for name in (MANIFEST, "models", "data"))


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
    """Find the newest run and its models that lack a score.

    Args:
        tasks: list of the tasks to score, or None for those that any model of the run has a score of.

    Returns:
        tuple: the run folder, a list of (model, results folder), and the list of tasks, which is empty if `tasks` is
        None and the run has no score.

    Raises:
        UserError: `runs_dir` contains no run with a model.
    """
    run_dir = newest_run(runs_dir)
    if run_dir is None:
        raise UserError(f"nothing to score in {runs_dir}; usage: ./evaluation.sh MODEL_OR_ADAPTER [OUTPUT_DIR]")
    models = [
        (row, read_scores(row["results"]))
        for number, row in iterations(run_dir).items()
        if row["model"] and (number == 0 or (row["model"] / ADAPTER).is_file())
    ]
    tasks = tasks_of(enumerate(scores for _, scores in models)) if tasks is None else tasks
    left = [(row["model"], row["results"]) for row, scores in models if not tasks or set(tasks) - set(scores)]
    return run_dir, left, tasks


def score_rows(run_dir, found):
    """Return (name, scores) of every model of `iterations`, on questions that the run has not trained on."""
    gold_pairs = manifest_of(run_dir)["settings"].get("GOLD_PAIRS", "")
    return [
        (f"M_{number}" + (" (base)" if number == 0 else ""), hold_out(read_scores(row["results"]), gold_pairs))
        for number, row in found.items()
    ]
