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
# Settings of pairs that their record has among its inputs.
RESOLVED = ("precision", "max_new_tokens")


def is_run(folder):
    """Return whether a folder is the folder of a run."""
    return any(path.exists() for path in (folder / "models", folder / "data", results_path(folder, 0)))


def read_run(folder):
    """Read the folder of a run.

    Returns:
        dict: "folder" (Path); "name", that of the folder without the seed; "settings", a dict: "STAGE NAME" -> value,
        of the first pairs and scores and the last training; "models", a dict: i -> {"name": hub name or folder of M_i;
        "records", a dict of those that there are: "dpo" trained M_i, "scores" scored it, and with "pairs" it wrote
        pairs; "results": folder of its scores; "scores": what `read_scores` returned; "pairs": what `pair_stats`
        returned, or None; "training": entries of the training log}.

    Raises:
        UserError: a record is damaged, or a file was edited.
    """
    folder, models = Path(folder), {}
    published = read_json(folder / PAIR_STATS, "record of pairs") if (folder / PAIR_STATS).is_file() else {}
    questions = _asked_questions(_pairs_record(folder, 0)) if find_pairs(folder, 0) else []
    for number in count():
        model = find_model(folder, number) if number else None
        training = read_record(model / TRAINING_RECORD) if model else None
        if number and not (training and "files" in training):
            break  # not trained, or not yet
        results, log = results_path(folder, number), model and model / TRAINING_LOG
        records = {"dpo": training, "scores": read_record(results / SCORES_RECORD)}
        records["pairs"] = _pairs_record(folder, number)
        models[number] = {
            "name": model,
            "records": {stage: record for stage, record in records.items() if record},
            "scores": read_scores(results),
            "results": results,
            "pairs": _pairs(find_pairs(folder, number), published.get(str(number)), questions),
            "training": read_json_lines(log, "training log") if log and log.is_file() else [],
        }
    if 1 in models:
        first = models[1]["records"]["dpo"]
        models[0]["name"] = first.get("incoming_adapter") or first["base_model"]
    settings = _settings(models)
    name = folder.resolve().name.removesuffix(f"_seed_{settings.get('seed')}")
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


def _settings(models):
    base, training = models[0]["records"], models[max(models)]["records"].get("dpo", {})
    pairs = base.get("pairs", {})
    stages = {
        "pairs": pairs.get("settings", {}) | {name: pairs["inputs"].get(name) for name in RESOLVED if pairs},
        "dpo": training.get("settings", {}) | {"pairs in a step": training.get("inputs", {}).get("effective_batch")},
        "scores": base.get("scores", {}).get("inputs", {}),
    }
    found = {"base model": models[0]["name"], "seed": stages["dpo"].get("seed")}
    for stage, settings in stages.items():
        for name, value in settings.items():
            if name not in NOT_COMPARED and not isinstance(value, dict):
                found[f"{stage} {name}"] = value
    return {name: str(value) for name, value in found.items() if value not in (None, "")}


def group_runs(runs):
    """Group the runs whose settings differ only in the seed.

    Args:
        runs: list of what `read_run` returned.

    Returns:
        list of dict: "name"; "settings", with the values of all its runs; "models", a dict: i -> {"runs": number of
        runs that have M_i; "scores" and "base": what `pool` returned for these; "pairs": list of different dicts of
        `pair_stats`}.
    """
    grouped = []
    for run in runs:
        for members in grouped:
            if all(_other_seed(run["settings"], other["settings"]) for other in members):
                members.append(run)
                break
        else:
            grouped.append([run])
    groups = []
    for members in grouped:
        name = common_name(members)
        if name in [group["name"] for group in groups]:
            name = members[0]["folder"].resolve().name
        settings = {name: None for run in members for name in run["settings"]}
        for setting in settings:
            settings[setting] = ", ".join(dict.fromkeys(run["settings"].get(setting, "") for run in members))
        numbers = sorted({number for run in members for number in run["models"]})
        models = {number: _pooled_model(number, [run["models"] for run in members]) for number in numbers}
        groups.append({"name": name, "settings": settings, "models": models})
    return groups


def _other_seed(settings, others):
    return settings.get("seed") != others.get("seed") and settings | {"seed": ""} == others | {"seed": ""}


def common_name(runs):
    """Return what the names of runs have in common."""
    return os.path.commonprefix([run["name"] for run in runs]).rstrip("_- ") or runs[0]["name"]


def _pooled_model(number, runs):
    having = [models for models in runs if number in models]
    pairs = [models[number]["pairs"] for models in having if models[number]["pairs"]]
    having = [models for models in having if models[number]["scores"]] or having
    return {
        "runs": len(having),
        "scores": pool([models[number]["scores"] for models in having]),
        "base": pool([models[0]["scores"] for models in having]),
        "pairs": [stats for at, stats in enumerate(pairs) if stats not in pairs[:at]],
    }


def model_label(group, number):
    """Return the name of a group's M_i; if only some of its runs have it, also how many."""
    runs, all_runs = group["models"][number]["runs"], max(model["runs"] for model in group["models"].values())
    return f"{group['name']}: M_{number}" + (f" ({runs} of {all_runs} runs)" if runs < all_runs else "")
