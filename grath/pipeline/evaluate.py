"""What evaluation.sh runs: score a model, or what the newest run has not scored, by the settings in the environment."""

import contextlib
import os
from pathlib import Path

from grath.common.errors import UserError
from grath.evaluation.run import score_model
from grath.modeling.precision import SERVER
from grath.pipeline.loop import lock
from grath.pipeline.process import share_cpu_products
from grath.pipeline.settings import EVALUATION, read_settings
from grath.report.run import write_report
from grath.report.runs import manifest_of, unscored
from grath.report.tables import model_scores


def evaluate(model=None, output=None):
    """Score `model` into the folder `output`; without a model, score what the newest run has not scored yet.

    Without a model, settings that are not set are those of the run, and its tasks are those that any of its models has
    a score of.

    Raises:
        UserError: a setting is not valid, or there is nothing to score.
    """
    values = read_settings(EVALUATION)
    if not values["TASKS"]:
        raise UserError("TASKS names no task")
    if model == "":
        raise UserError("the model's name is empty; usage: ./evaluation.sh MODEL_OR_ADAPTER [OUTPUT_DIR]")
    dry_run, main_process = values["DRY_RUN"] == "1", os.environ.get("RANK", "0") == "0"
    if model is None:
        given = values["TASKS"].split() if "TASKS" in os.environ else None
        run, models, tasks = unscored(values["RUNS_DIR"], given)
        of_run = {name: value for name, value in manifest_of(run)["settings"].items() if name in EVALUATION}
        if of_run.get("EVAL_PRECISION") == SERVER:  # not a precision of this machine
            del of_run["EVAL_PRECISION"]
        of_run |= {"TASKS": " ".join(tasks)} if tasks else {}
        values = read_settings(EVALUATION, of_run | os.environ)
        share_cpu_products(run)
    else:
        run, models = None, [(model, Path(output or f"scores/{Path(model).name}"))]
    if main_process and run:
        print(f"newest run: {run}, {len(models)} model(s) to score", flush=True)
    # The loop must not work in the same folder.
    with lock(run) if run and main_process and not dry_run else contextlib.nullcontext():
        for name, folder in models:
            _score(str(name), folder, values)
        if main_process and not dry_run:
            print(write_report(run) if run else model_scores(models[0][1]))
            print(f"Wrote the results to {run or models[0][1]}")


def _score(model, output, values):
    batch_size, limit = values["EVAL_BATCH_SIZE"], values["LIMIT"]
    score_model(
        model,
        output,
        values["TASKS"].split(),
        precision=values["EVAL_PRECISION"],
        batch_size=int(batch_size) if batch_size.isdigit() else batch_size or None,
        limit=(float(limit) if "." in limit else int(limit)) if limit else None,
        backend=values["BACKEND"],
        chat_template=values["CHAT_TEMPLATE"] == "1",
        samples=values["SAMPLES"] == "1",
        model_type=values["MODEL_TYPE"],
        dry_run=values["DRY_RUN"] == "1",
        processes=int(values["NUM_PROCESSES"]),
        servers=values["SERVER_URL"].split(),
        server_timeout=int(values["SERVER_TIMEOUT"]),
    )
