"""The newest run and its models without scores, as lines for evaluation.sh."""

import os
import re
from pathlib import Path
from shlex import quote

from grath.common.defaults import TASKS
from grath.common.errors import UserError
from grath.common.layout import SAMPLES, SCORES_RECORD, TRAINING_RECORD, find_model, quote_path, results_path
from grath.common.record import read_record
from grath.modeling.precision import SERVER

# Setting -> the input in the record of scores.
INPUTS = {"EVAL_PRECISION": "precision", "LIMIT": "limit", "BACKEND": "backend"}


def newest_run(runs_dir):
    """Return the run folder in `runs_dir` whose models changed last, or None. FRESH=1 moved others to NAME.old-N."""
    models = [path for path in Path(runs_dir).glob("*/models") if not re.search(r"\.old-\d+$", path.parent.name)]
    models = [folder for folder in models if any(folder.glob(f"iter_*/{TRAINING_RECORD}"))]
    return max(models, key=lambda folder: folder.stat().st_mtime).parent if models else None


def finished_models(run):
    """List the finished adapters of a run, from M_1 on, as (folder, record of the training)."""
    found = []
    while folder := find_model(run, len(found) + 1):
        record = read_record(folder / TRAINING_RECORD)
        if not record or not record.get("files"):
            break
        found.append((folder, record))
    return found


def unscored_lines():
    """Return RUN, MODELS and RESULTS, and the settings of the run that the environment does not set, as bash lines.

    TASKS are those that any model of the run has a score of, unless the environment sets it.

    Raises:
        UserError: there is no run with a model in RUNS_DIR.
    """
    runs_dir = os.environ.get("RUNS_DIR") or "runs"
    run = newest_run(runs_dir)
    if run is None:
        raise UserError(f"nothing to score in {runs_dir}; usage: ./evaluation.sh MODEL_OR_ADAPTER [OUTPUT_DIR]")
    trained = finished_models(run)
    first = trained[0][1] if trained else {}
    base = [first.get("incoming_adapter") or first["base_model"]] if trained else []
    models = [(name, results_path(run, i)) for i, name in enumerate([*base, *(folder for folder, _ in trained)])]
    records = [read_record(folder / SCORES_RECORD) or {"inputs": {}} for _, folder in models]
    files = dict.fromkeys(Path(name) for record in records for name in record.get("files", ()))
    scored = [file.stem for file in files if file.suffix == ".json"]
    tasks = (os.environ["TASKS"].split() if "TASKS" in os.environ else scored) or TASKS.split()
    inputs = next((record["inputs"] for record in records if record["inputs"]), {})
    settings = {name: inputs.get(key) for name, key in INPUTS.items()}
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
