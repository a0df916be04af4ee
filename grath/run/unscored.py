"""The newest run and its models, as lines for evaluation.sh."""

import os
import re
from pathlib import Path
from shlex import quote

from grath.common.defaults import TASKS
from grath.common.errors import UserError
from grath.common.layout import SAMPLES, SCORES_RECORD, TRAINING_RECORD, find_model, results_path
from grath.common.record import OF_TRAINING, read_record
from grath.modeling.precision import SERVER


def unscored_lines():
    """Return RUN, MODELS and RESULTS, and the settings of the run that the environment does not set, as bash lines.

    TASKS are those that any model of the run has a score of, unless the environment sets them.

    Raises:
        UserError: there is no run with a model in RUNS_DIR, or the newest lacks its first.
    """
    runs_dir = Path(os.path.expanduser(os.environ.get("RUNS_DIR") or "runs"))  # noqa: PTH111
    folders = {file.parent.parent for file in runs_dir.absolute().glob(f"*/models/iter_*/{TRAINING_RECORD}")}
    folders = [folder for folder in folders if not re.search(r"\.old-\d+$", folder.parent.name)]  # by FRESH=1
    if not folders:
        raise UserError(f"nothing to score in {runs_dir}; usage: ./evaluation.sh MODEL_OR_ADAPTER [OUTPUT_DIR]")
    run = max(folders, key=lambda folder: folder.stat().st_mtime).parent
    trained = []
    while (folder := find_model(run, len(trained) + 1)) and (read_record(folder / TRAINING_RECORD) or {}).get("files"):
        trained.append(folder)
    first = (folder := find_model(run, 1)) and read_record(folder / TRAINING_RECORD, OF_TRAINING)
    if not first:
        raise UserError(f"{run} contains later models, but no M_1: put it back")
    models = [first.get("incoming_adapter") or first["base_model"], *trained]
    results = [results_path(run, i) for i in range(len(models))]
    records = [record for folder in results if (record := read_record(folder / SCORES_RECORD))]
    files = dict.fromkeys(Path(name) for record in records for name in record.get("files", ()))
    scored = [file.stem for file in files if file.suffix == ".json"]
    inputs = records[0]["inputs"] if records else {}
    of_scores = {"EVAL_PRECISION": "precision", "LIMIT": "limit", "BACKEND": "backend"}
    settings = {name: inputs.get(key) for name, key in of_scores.items()}
    if isinstance(settings["LIMIT"], float):  # without an exponent
        settings["LIMIT"] = f"{settings['LIMIT']:.9f}".rstrip("0")
    settings |= {"TASKS": " ".join(scored) or TASKS, "MODEL_TYPE": first.get("settings", {}).get("model_type")}
    settings["CHAT_TEMPLATE"] = "1" if inputs.get("chat_template") else None
    settings["SAMPLES"] = "0" if files and Path(SAMPLES) not in files else None
    if settings["EVAL_PRECISION"] == SERVER:  # not a precision of this machine
        del settings["EVAL_PRECISION"]
    given = {name for name, value in os.environ.items() if value or name == "TASKS"}
    lines = [f"{name}={quote(str(value))}" for name, value in settings.items() if value and name not in given]
    lines.append(f"RUN={quote(str(run))}")
    for name, paths in {"MODELS": models, "RESULTS": results}.items():
        lines.append(f"{name}=({' '.join(quote(str(path)) for path in paths)})")
    return "\n".join(lines) + "\n"
