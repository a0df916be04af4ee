"""The newest run and its models without scores, as lines for evaluation.sh."""

import os
import re
from pathlib import Path
from shlex import quote

from grath.common.defaults import TASKS
from grath.common.errors import UserError
from grath.common.layout import SAMPLES, SCORES_RECORD, TRAINING_RECORD, find_model, quote_path, results_path
from grath.common.record import OF_TRAINING, read_record
from grath.modeling.precision import SERVER


def unscored_lines():
    """Return RUN, MODELS and RESULTS, and the settings of the run that the environment does not set, as bash lines.

    TASKS are those that any model of the run has a score of, unless the environment sets it.

    Raises:
        UserError: there is no run with a model in RUNS_DIR.
    """
    runs_dir = os.environ.get("RUNS_DIR") or "runs"
    folders = {file.parent.parent for file in Path(runs_dir).glob(f"*/models/iter_*/{TRAINING_RECORD}")}
    folders = [folder for folder in folders if not re.search(r"\.old-\d+$", folder.parent.name)]  # by FRESH=1
    if not folders:
        raise UserError(f"nothing to score in {runs_dir}; usage: ./evaluation.sh MODEL_OR_ADAPTER [OUTPUT_DIR]")
    run = max(folders, key=lambda folder: folder.stat().st_mtime).parent
    trained = []
    while (folder := find_model(run, len(trained) + 1)) and (read_record(folder / TRAINING_RECORD) or {}).get("files"):
        trained.append(folder)
    first = read_record(trained[0] / TRAINING_RECORD, OF_TRAINING) if trained else {}
    names = [first.get("incoming_adapter") or first["base_model"], *trained] if trained else []
    models = [(name, results_path(run, i)) for i, name in enumerate(names)]
    records = [read_record(folder / SCORES_RECORD) or {"inputs": {}} for _, folder in models]
    files = dict.fromkeys(Path(name) for record in records for name in record.get("files", ()))
    scored = [file.stem for file in files if file.suffix == ".json"]
    tasks = (os.environ["TASKS"].split() if "TASKS" in os.environ else scored) or TASKS.split()
    inputs = next((record["inputs"] for record in records if record["inputs"]), {})
    of_scores = {"EVAL_PRECISION": "precision", "LIMIT": "limit", "BACKEND": "backend"}
    settings = {name: inputs.get(key) for name, key in of_scores.items()}
    settings |= {"TASKS": " ".join(tasks), "MODEL_TYPE": first.get("settings", {}).get("model_type")}
    settings["CHAT_TEMPLATE"] = "1" if inputs.get("chat_template") else None
    wanted = {f"{task}.json" for task in tasks}
    if Path(SAMPLES) in files or not files:
        wanted.add(SAMPLES)
    else:
        settings["SAMPLES"] = "0"
    if settings["EVAL_PRECISION"] == SERVER:  # not a precision of this machine
        del settings["EVAL_PRECISION"]
    left = [
        (name, folder)
        for (name, folder), record in zip(models, records, strict=True)
        if any(file not in record.get("files", ()) or not (folder / file).is_file() for file in wanted)
    ]
    lines = [f"{name}={quote(str(value))}" for name, value in settings.items() if value and name not in os.environ]
    lines += [f"RUN={quote_path(run)}"]
    lines += [f"MODELS=({' '.join(quote_path(name) for name, _ in left)})"]
    lines += [f"RESULTS=({' '.join(quote_path(folder) for _, folder in left)})"]
    return "\n".join(lines) + "\n"
