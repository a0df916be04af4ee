"""The output folder of a training: its record, its checkpoints, and the adapter."""

import json
import os
import shutil
from pathlib import Path
from zipfile import is_zipfile

from safetensors import SafetensorError, safe_open

from grath.common.errors import UserError
from grath.common.files import atomic_write_text, sha256
from grath.common.paths import ADAPTER, RECORD
from grath.dpo.callbacks import TRAINING_LOG

TRAINING_PLOT = "training.png"
# Settings that may change between two starts of one training. Data and weights are compared by their hashes. Of batch
# size, accumulation and processes, only the effective batch is compared.
RESUME_IGNORED_KEYS = {
    "output_dir", "model_name_or_path", "dataset_path", "overwrite_output_dir", "resume_from_checkpoint", "run_name",
    "gradient_accumulation_steps", "per_device_train_batch_size", "processes",
    "logging_dir", "logging_steps", "logging_first_step", "report_to", "project",
    "trackio_space_id", "save_steps", "save_total_limit", "disable_tqdm", "log_level", "dataloader_num_workers",
    "precompute_ref_batch_size", "per_device_eval_batch_size",
}  # fmt: skip


def read_record(output_dir):
    """Read the record of the training in `output_dir`; return None if there is no valid one."""
    try:
        record = json.loads((Path(output_dir) / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("settings"), dict) else None


def resume_state(output_dir, record, overwrite):
    """Determine how far an earlier start of the same training got in `output_dir`.

    Args:
        record: the record of this training (dict).
        overwrite: whether to ignore and replace an earlier training.

    Returns:
        (state, checkpoint): "finished", "interrupted" or "nothing", and the checkpoint to start from: that of
        `resume_from_checkpoint`, else the last complete one if the state is "interrupted" and there is one, else None.

    Raises:
        UserError: the folder contains something else, or is the model that the training starts from, or the checkpoint
            is not complete.
    """
    folder, chosen = Path(output_dir), record["settings"].get("resume_from_checkpoint")
    if overwrite and chosen:
        raise UserError("--overwrite_output_dir removes the checkpoints that --resume_from_checkpoint needs")
    if chosen and not _is_complete(Path(chosen)):
        raise UserError(f"--resume_from_checkpoint {chosen} is no complete checkpoint (--output_dir has checkpoint-N)")
    if folder.resolve() == Path(record["settings"]["model_name_or_path"]).expanduser().resolve():
        raise UserError(f"--output_dir {folder} is the model that the training starts from: choose another folder")
    if (folder / "config.json").is_file():
        raise UserError(f"--output_dir {folder} contains a full model: choose another folder")
    # A start that was killed early leaves at most a temporary file and the model card that TRL writes.
    others = [path for path in folder.glob("[!.]*") if path.name != "README.md"]
    if overwrite or not others:
        return "nothing", chosen
    advice = "choose another --output_dir, remove this one, or pass --overwrite_output_dir to replace it"
    earlier = read_record(folder)
    if earlier is None:
        raise UserError(f"{folder} is not empty and contains no training of dpo.py: {advice}")
    differing = [name for name in _resume_key(record) if _resume_key(record)[name] != _resume_key(earlier).get(name)]
    if differing:
        name = differing[0]
        was, now = _resume_key(earlier).get(name), _resume_key(record)[name]
        raise UserError(f"{folder} contains a training with another {name} ({was}, not {now}): {advice}")
    if earlier.get("adapter_sha256") and (folder / ADAPTER).is_file():
        if sha256(folder / ADAPTER) != earlier["adapter_sha256"]:
            raise UserError(f"{folder / ADAPTER} is not the file that the training saved: {advice}")
        return "finished", None
    return "interrupted", chosen or last_checkpoint(folder)


def _resume_key(record):
    """Return the part of a record that must be equal in two starts of one training, as a flat dict."""
    settings = {name: value for name, value in record["settings"].items() if name not in RESUME_IGNORED_KEYS}
    names = ("base_model", "incoming_adapter_sha256", "pair_file_sha256", "effective_batch")
    return json.loads(json.dumps({**{name: record[name] for name in names}, **settings}))


def last_checkpoint(output_dir):
    """Return the folder of the last complete checkpoint in `output_dir`, or None; skip incomplete ones."""
    found = [(int(path.name.partition("-")[2]), path) for path in Path(output_dir).glob("checkpoint-*[0-9]")]
    return next((str(path) for step, path in sorted(found, reverse=True) if _is_complete(path, step)), None)


def _is_complete(checkpoint, step=None):
    """Tell whether no file of a checkpoint is missing or truncated, and it is of that step, if given.

    `trainer_state.json` is written last.
    """
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        with safe_open(checkpoint / ADAPTER, "pt"):
            pass
    except (OSError, ValueError, SafetensorError):
        return False
    archives = [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]
    return step in (None, state.get("global_step")) and bool(archives) and all(map(is_zipfile, archives))


def clear_output_dir(output_dir):
    """Remove an earlier training: the adapter first, then record, log, plot and checkpoints."""
    folder = Path(output_dir)
    for name in (ADAPTER, "adapter_config.json", RECORD, TRAINING_LOG, TRAINING_PLOT):
        (folder / name).unlink(missing_ok=True)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def write_record(output_dir, record):
    """Write `record` (dict) to grath.json in `output_dir`."""
    atomic_write_text(Path(output_dir) / RECORD, json.dumps(record, indent=2) + "\n")


def save_adapter(trainer, record):
    """Save the adapter and its `record` in the trainer's output folder.

    The weights appear last and complete: with them, the training counts as finished.
    """
    folder = Path(trainer.args.output_dir)
    partial = folder / ".partial"
    trainer.drop_ref_adapter()
    trainer.save_model(str(partial))
    if trainer.accelerator.is_main_process:
        # PEFT writes a set, whose order differs between processes.
        config = json.loads((partial / "adapter_config.json").read_text(encoding="utf-8"))
        if isinstance(config["target_modules"], list):  # not a regular expression
            config["target_modules"].sort()
        atomic_write_text(partial / "adapter_config.json", json.dumps(config, indent=2) + "\n")
        write_record(folder, {**record, "adapter_sha256": sha256(partial / ADAPTER)})
        for name in ("adapter_config.json", ADAPTER):
            with (partial / name).open("rb") as file:
                os.fsync(file.fileno())
            (partial / name).replace(folder / name)
        shutil.rmtree(partial)
    trainer.accelerator.wait_for_everyone()
