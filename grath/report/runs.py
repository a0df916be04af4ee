"""Read run folders by their records, and group the runs that differ only in the seed."""

import os
from itertools import count
from pathlib import Path

from grath.common.errors import UserError
from grath.common.files import read_json, read_json_lines
from grath.common.layout import (
    PAIR_STATS,
    PROJECT,
    SCORES_RECORD,
    TRAINING_LOG,
    TRAINING_RECORD,
    find_model,
    find_pairs,
    record_path,
    results_path,
    save_prefix,
)
from grath.common.record import read_record
from grath.evaluation.results import read_scores
from grath.pairs.questions import load_questions
from grath.pairs.stats import pair_stats
from grath.report.paired import pool

# Settings that change no result: places, and how much is computed at once.
NOT_COMPARED = {
    "batch_size", "dataloader_num_workers", "dataset_path", "disable_tqdm", "gradient_accumulation_steps", "log_level",
    "logging_first_step", "logging_steps", "model_name_or_path", "output_dir", "overwrite_output_dir",
    "per_device_eval_batch_size", "per_device_train_batch_size", "precompute_ref_batch_size", "project", "report_to",
    "resume_from_checkpoint", "run_name", "save_steps", "save_total_limit", "seed", "trackio_space_id",
}  # fmt: skip


def is_run(folder):
    """Return whether a folder is the folder of a run."""
    return any(path.exists() for path in (folder / "models", folder / "data", results_path(folder, 0)))


def read_run(folder):
    """Read the folder of a run.

    Returns:
        dict: "folder" (Path); "name", that of the folder without the seed; "settings", a dict: "STAGE NAME" -> text, of
        the first pairs and scores and the last training, and "base model", a hub name or folder; "models", a dict:
        i -> {"records", a dict of those that there are: "dpo" trained M_i, "scores" scored it, and with "pairs" it
        wrote pairs; "scores": what `read_scores` returned; "pairs": what `pair_stats` returned, or None; "trained": the
        last entry with a loss in the training log}.

    Raises:
        UserError: the folder is not that of a run, a record is damaged, or a file was edited.
    """
    if not is_run(folder):
        raise UserError(f"{folder} is not a run folder: it contains neither models, data nor scores of M_0")
    published = read_json(folder / PAIR_STATS, "record of pairs") if (folder / PAIR_STATS).is_file() else {}
    questions = _asked_questions(_pairs_record(folder, 0)) if find_pairs(folder, 0) else []
    models = {}
    for number in count():
        model, results = number and find_model(folder, number), results_path(folder, number)
        records = {
            "dpo": model and read_record(model / TRAINING_RECORD),
            "scores": read_record(results / SCORES_RECORD),
            "pairs": _pairs_record(folder, number),
        }
        if number and "files" not in (records["dpo"] or {}):
            break  # not trained, or not yet
        models[number] = {
            "records": {stage: record for stage, record in records.items() if record},
            "scores": read_scores(results),
            "pairs": _pairs(find_pairs(folder, number), published.get(str(number)), questions),
            "trained": _last_step(model / TRAINING_LOG) if model else {},
        }
    settings = _settings(models)
    name = folder.resolve().name.removesuffix(f"_seed_{settings['seed']}")
    return {"folder": folder, "name": name, "settings": settings, "models": models}


def _pairs_record(folder, number):
    """Return the record of the pairs that M_i wrote, also of a published run, which has no pair files; or None."""
    pattern = record_path(folder / "data" / f"{save_prefix(number)}_num_*.json")
    return next(map(read_record, sorted(pattern.parent.glob(pattern.name))), None)


def _asked_questions(record):
    """Load the questions that were asked, with their gold answers; an empty list if they are not on this machine."""
    settings = (record or {}).get("settings", {})
    if "split" not in settings:
        return []
    path = settings.get("data_path")
    path = next((place for place in (Path(path), PROJECT / path) if place.is_file()), path) if path else None
    try:
        return load_questions(settings["data_name"], settings["subdata_name"], settings["split"], path)
    except UserError:
        return []


def _pairs(path, published, questions):
    if not path:
        return published
    found = pair_stats(path, questions)
    # The truth signal of an earlier report, if the questions are no longer on this machine.
    return found | ({name: published[name] for name in ("truth", "signal")} if published and not questions else {})


def _last_step(log):
    entries = read_json_lines(log, "training log") if log.is_file() else []
    return next((entry for entry in reversed(entries) if "loss" in entry), {})


def _settings(models):
    """Name the settings of the stages that there are; a setting without a value is an empty text."""
    first, dpo = models[0]["records"], models[max(models)]["records"].get("dpo")
    stages = {"scores": first["scores"]["inputs"]} if "scores" in first else {}
    if pairs := first.get("pairs"):
        stages["pairs"] = pairs["settings"] | {
            name: pairs["inputs"].get(name) for name in ("precision", "max_new_tokens")
        }
    found = {"base model": None, "seed": None}
    if dpo:
        stages["dpo"] = dpo["settings"] | {"pairs in a step": dpo["inputs"].get("effective_batch")}
        start = models[1]["records"]["dpo"]
        found = {"base model": start.get("incoming_adapter") or start["base_model"], "seed": stages["dpo"].get("seed")}
    for stage in ("pairs", "dpo", "scores"):
        for name, value in stages.get(stage, {}).items():
            if name not in NOT_COMPARED and not isinstance(value, dict):
                found[f"{stage} {name}"] = value
    return {name: "" if value is None else str(value) for name, value in found.items()}
