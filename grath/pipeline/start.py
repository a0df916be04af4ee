"""The start of a run: move an old run aside, compare the settings, and remove what an interruption left."""

from grath.common.errors import UserError
from grath.common.files import check_writable
from grath.common.provenance import read_manifest
from grath.dpo.defaults import check_trackers
from grath.modeling.chat import template_for
from grath.modeling.devices import check_devices, describe_device
from grath.modeling.loading import load_tokenizer
from grath.pipeline.machine import precision_hint
from grath.pipeline.manifest import remove_partial_files, start_manifest, write_manifest
from grath.pipeline.settings import STAGE_OF_PRECISION, normalize_settings, question_inputs, run_folder, served_stages
from grath.pipeline.stage import drop_damaged


def start(values):
    """Prepare the folder of a run for its stages; with CHECK=1 only compare the settings and write nothing.

    Args:
        values: what `read_settings` returned.

    Raises:
        UserError: the folder contains another run, or the devices or the model do not fit the settings.
    """
    run = run_folder(values)
    if run.exists() and not run.is_dir():
        raise UserError(f"{run} is a file, not a folder: set RUNS_DIR or RUN_NAME")
    check_writable(run)
    check_devices(int(values["NUM_PROCESSES"]))
    check_trackers(values["REPORT_TO"])
    settings = normalize_settings(values)
    print(
        f"  {', '.join(f'{name}={settings[name]}' for name in STAGE_OF_PRECISION)} on {describe_device()}", flush=True
    )
    if not served_stages(values) and (hint := precision_hint(values["MODEL_NAME_OR_PATH"], values)):
        print(f"  {hint}", flush=True)
    checking, fresh = values["CHECK"] == "1", values["FRESH"] == "1"
    if fresh and not checking and run.exists():
        aside = next(path for n in range(1, 10**6) if not (path := run.with_name(f"{run.name}.old-{n}")).exists())
        run.rename(aside)
        print(f"FRESH=1: moved the old run in {run} to {aside}", flush=True)
    if checking and (fresh or read_manifest(run) is None):
        return
    files, datasets = question_inputs(values)
    # Read before anything is written: a refused start touches nothing.
    manifest = start_manifest(run, settings, [values["MODEL_NAME_OR_PATH"], *files], datasets)
    if checking:
        return
    if values["MODEL_TYPE"] == "auto" and not manifest["stages"]:
        _check_template(values)
    run.mkdir(parents=True, exist_ok=True)
    remove_partial_files(run)
    # Of all stages now, because the report reads the outputs of later iterations too.
    for entry in manifest["stages"]:
        drop_damaged(run, entry, entry["outputs"])
    write_manifest(run, manifest)


def _check_template(values):
    """Raise `UserError` if the model's tokenizer has no chat template, which pairs, DPO and sample answers need."""
    try:
        tokenizer = load_tokenizer(values["MODEL_NAME_OR_PATH"])
    except UserError:  # a model that cannot be loaded gets its message when it is loaded
        return
    template_for(tokenizer, values["MODEL_TYPE"])
