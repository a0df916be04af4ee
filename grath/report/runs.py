"""Read run folders by their records, and group the runs that differ only in the seed."""

import os
import re
import sys
from itertools import count
from pathlib import Path
from types import NoneType

from grath.common import layout
from grath.common.defaults import UNCOMPARED
from grath.common.errors import UserError
from grath.common.files import read_json, read_json_lines
from grath.common.record import NUMBER, OF_TRAINING, check_inputs, read_record
from grath.evaluation.results import read_scores
from grath.pairs.questions import load_questions
from grath.pairs.record import hash_rows
from grath.pairs.stats import pair_stats
from grath.report.paired import pool

# Settings that change no result, and the seed, in which the runs of a group differ.
NOT_COMPARED = UNCOMPARED - {"tokenizer_name"} | {"batch_size", "seed"}
# Shapes of what is read: pairs.json, a line of the training log, and what a record says of the questions.
FIGURE = re.compile(r"[-+\d.,/%()\[\] a-z]{0,100}")
PAIR_STATS = {
    str: {"truth": (NoneType, dict), "signal": (FIGURE, NoneType)}
    | dict.fromkeys(("negated?", "words?"), (FIGURE, NoneType))
    | dict.fromkeys(("asked?", "parsed?", "identical?", "echoed?", "distance?", "probe?"), NUMBER | None)
}
LOG_ENTRY = {"step?": int, **dict.fromkeys(("loss?", "rewards/margins?", "rewards/accuracies?"), NUMBER)}
QUESTIONS = {"data_path": str | None, "data_name": str, "subdata_name": str | None, "split": str}
# What a report takes for the settings of a stage, from the stage's record.
OF_STAGE = {
    "pairs": lambda record: record.get("settings", {}) | {
        name: record["inputs"].get(name) for name in ("precision", "max_new_tokens")
    },
    "dpo": lambda record: record["settings"] | {"pairs in a step": record["inputs"].get("effective_batch")},
    "scores": lambda record: record["inputs"],
}  # fmt: skip


def read_run(folder):
    """Read the folder of a run.

    Returns:
        dict: "folder" (Path); "name", that of the folder without the seed; "settings", a dict: "STAGE NAME" -> text,
        with every value and its models if they differ, "seed", and "base model", a hub name or folder; "models", a
        dict: i -> {"records", a dict of those that there are: "dpo" trained M_i, "scores" scored it, and with "pairs"
        it wrote pairs; "scores": what `read_scores` returned; "pairs": what `pair_stats` returned, or None;
        "training": entries of the training log}.

    Raises:
        UserError: the folder is not that of a run or lacks a model, a record is damaged, a file was edited, or the
            stages had different models.
    """
    if not layout.is_run(folder):
        raise UserError(f"{folder} is not a run folder: it contains neither models, data nor scores of M_0")
    stats = folder / layout.PAIR_STATS
    earlier = read_json(stats, "record of pairs", PAIR_STATS) if stats.is_file() else {}
    questions, models = [], {}
    for number in count():
        model = layout.find_model(folder, number)  # the base has none
        log = model and model / layout.TRAINING_LOG
        results, pairs = layout.results_path(folder, number), layout.find_pairs(folder, number)
        # A published run has the records of its pairs, but no pair files.
        asked = sorted(folder.glob(f"data/{layout.record_path(Path(f'{layout.save_prefix(number)}_num_*.json'))}"))
        asked = [layout.record_path(pairs)] if pairs else asked[:1]
        records = {
            "dpo": model and read_record(model / layout.TRAINING_RECORD, OF_TRAINING),
            "scores": read_record(results / layout.SCORES_RECORD),
            "pairs": read_record(asked[0], {"settings?": QUESTIONS}) if asked else None,
        }
        records = {stage: record for stage, record in records.items() if record}
        if number and "files" not in records.get("dpo", {}):  # not trained, or not yet
            if layout.find_model(folder, number + 1):
                raise UserError(f"{folder} contains M_{number + 1}, but no finished M_{number}: put it back")
            if number and results.is_dir():
                print(f"Warning: {results} is left out: there is no finished M_{number}", file=sys.stderr)
            break
        if number == 0 and pairs and "settings" in records.get("pairs", {}):
            questions = _asked_questions(records["pairs"])
        known = earlier.get(str(number))
        of_pairs = pair_stats(pairs, questions) if pairs else known
        if known and not questions:  # they are no longer on this machine
            of_pairs |= {"truth": known["truth"], "signal": known["signal"]}
        models[number] = {
            "records": records,
            "scores": read_scores(results),
            "pairs": of_pairs,
            "training": read_json_lines(log, "training log", LOG_ENTRY) if log and log.is_file() else [],
        }
    _check_models(models)
    settings = _settings(models)
    name = folder.resolve().name.removesuffix(f"_seed_{settings['seed']}")
    return {"folder": folder, "name": name, "settings": settings, "models": models}


def _check_models(models):
    made = [
        (f"{stage} of M_{number}", record["inputs"]["model"]["base"])
        for number, model in models.items()
        for stage, record in model["records"].items()
        if isinstance(record["inputs"].get("model", {}).get("base"), dict)
    ]
    for name, base in made[1:]:
        check_inputs({"inputs": made[0][1]}, base, made[0][0], f"{name}: the base was replaced during the run")
    for number, model in models.items():
        for stage, record in model["records"].items():
            owner = number - 1 if stage == "dpo" else number
            trained, used = models.get(owner, {}).get("records", {}).get("dpo"), record["inputs"].get("model", {})
            if trained and isinstance(used.get("adapter"), dict):
                again = f"train M_{number} again" if stage == "dpo" else f"run the {stage} of M_{number} again"
                advice = f"M_{owner} was trained again since; {again}"
                check_inputs({"inputs": used["adapter"]}, trained["files"], f"{stage} of M_{number}", advice)


def _asked_questions(record):
    """Load the questions that a record of pairs is about; an empty list if they are not on this machine."""
    settings, asked = record["settings"], record.get("counts", {}).get("asked")
    path = settings["data_path"] and Path(settings["data_path"])
    if path and not path.is_file():
        path = layout.PROJECT / path
    try:
        questions = load_questions(settings["data_name"], settings["subdata_name"], settings["split"], path)[:asked]
    except UserError:
        return []
    return questions if hash_rows(questions) == record["inputs"].get("questions") else []


def _settings(models):
    trained = [model["records"]["dpo"] for model in models.values() if "dpo" in model["records"]]
    start = trained[0] if trained else {}
    seed = trained[-1]["settings"].get("seed") if trained else None
    found = {"base model": start.get("incoming_adapter") or start.get("base_model", "")}
    found["seed"] = "" if seed is None else str(seed)
    values = {}
    for stage in OF_STAGE:
        for number, model in models.items():
            of_model = settings_of(stage, model["records"][stage]) if stage in model["records"] else {}
            for name, value in of_model.items():
                values.setdefault(name, {}).setdefault(value, []).append(f"M_{number}")
    for name, models_of in values.items():
        differing = ", ".join(f"{value or 'none'} ({' '.join(names)})" for value, names in models_of.items())
        found[name] = next(iter(models_of)) if len(models_of) == 1 else differing
    return found


def settings_of(stage, record):
    """Return the settings in the record of a model's stage: "STAGE NAME" -> text."""
    return {
        f"{stage} {name}": "" if value is None else str(value)
        for name, value in OF_STAGE[stage](record).items()
        if name not in NOT_COMPARED and not isinstance(value, dict)
    }


def group_runs(runs):
    """Group the runs whose settings differ only in the seed.

    Args:
        runs: list of what `read_run` returned.

    Returns:
        list of dict: "name"; "settings", with all seeds; "models", a dict: i -> {"runs": number of runs that have M_i;
        "scores" and "base": what `pool` returned for these; "pairs": list of different dicts of `pair_stats`}.
    """
    grouped, groups = [], []
    for run in runs:
        members = next((members for members in grouped if all(_other_seed(run, other) for other in members)), [])
        if not members:
            grouped.append(members)
        members.append(run)
    for members in grouped:
        folder, names = members[0]["folder"].resolve(), [group["name"] for group in groups]
        name = next(name for name in (common_name(members), folder.name, str(folder)) if name not in names)
        settings = members[0]["settings"] | {"seed": ", ".join(run["settings"]["seed"] for run in members)}
        numbers = range(max(len(run["models"]) for run in members))
        models = {number: _pooled_model(number, [run["models"] for run in members]) for number in numbers}
        groups.append({"name": name, "settings": settings, "models": models})
    return groups


def _other_seed(run, other):
    settings, others = run["settings"], other["settings"]
    return settings["seed"] != others["seed"] and settings | {"seed": ""} == others | {"seed": ""}


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


def model_name(number):
    """Return the name of M_i in tables; the base is marked."""
    return f"M_{number}" + (" (base)" if number == 0 else "")


def model_label(group, number):
    """Return the name of a group's M_i; if only some of its runs have it, also how many."""
    runs, all_runs = group["models"][number]["runs"], max(model["runs"] for model in group["models"].values())
    return f"{group['name']}: {model_name(number)}" + (f" ({runs} of {all_runs} runs)" if runs < all_runs else "")
