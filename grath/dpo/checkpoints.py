"""The output folder of a training: its record, its checkpoints, and the adapter."""

import os
import shutil
from pathlib import Path
from zipfile import is_zipfile

from safetensors import SafetensorError, safe_open

from grath.common.errors import UserError
from grath.common.files import read_json, sha256
from grath.common.layout import ADAPTER, ADAPTER_CONFIG, TRAINING_LOG, TRAINING_PLOT, TRAINING_RECORD
from grath.common.record import check_files, check_inputs, read_record


def resume_state(inputs, settings):
    """Determine by the inputs and all options (dicts) how far an earlier start got in its output folder.

    Returns:
        (state, record, checkpoint): "finished", "interrupted" or "nothing"; the record of the earlier start, or None;
        and the checkpoint to start from: the given one, else the last complete one of an interrupted start, or None.

    Raises:
        UserError: the folder is not one of this training, or the given checkpoint is not complete.
    """
    folder, chosen = Path(settings["output_dir"]), settings.get("resume_from_checkpoint")
    overwrite = settings["overwrite_output_dir"]
    if overwrite and chosen:
        raise UserError("--overwrite_output_dir removes the checkpoints that --resume_from_checkpoint needs")
    if chosen and not _is_complete(Path(chosen)):
        raise UserError(
            f"--resume_from_checkpoint {chosen} is not a complete checkpoint (--output_dir has checkpoint-N)"
        )
    if chosen and (trained := read_record(Path(chosen).parent / TRAINING_RECORD)):
        check_inputs(trained, inputs, chosen, "choose a checkpoint of the same training, which cannot be extended")
    if folder.resolve() == Path(settings["model_name_or_path"]).expanduser().resolve():
        raise UserError(f"--output_dir {folder} is the model that the training starts from: choose another folder")
    if (folder / "config.json").is_file():
        raise UserError(f"--output_dir {folder} contains a full model: choose another folder")
    # A start that was killed early leaves at most a temporary file and the model card that TRL writes.
    if overwrite or all(path.name == "README.md" for path in folder.glob("[!.]*")):
        return "nothing", None, chosen
    advice = "choose another --output_dir, remove this one, or pass --overwrite_output_dir to replace it"
    record = read_record(folder / TRAINING_RECORD)
    if record is None:
        raise UserError(f"{folder} is not empty and contains no training of dpo.py: {advice}")
    check_inputs(record, inputs, folder, advice)
    if check_files(record, folder, advice):
        return "finished", record, None
    return "interrupted", record, chosen or last_checkpoint(folder)


def last_checkpoint(output_dir):
    """Return the folder of the last complete checkpoint in `output_dir`, or None."""
    found = {path.name.partition("-")[2]: path for path in Path(output_dir).glob("checkpoint-*")}
    found = {int(step): path for step, path in found.items() if step.isdecimal()}
    return next((str(found[step]) for step in sorted(found, reverse=True) if _is_complete(found[step])), None)


def _is_complete(checkpoint):
    """Return whether no file of a checkpoint is missing or truncated. `trainer_state.json` is written last."""
    try:
        read_json(checkpoint / "trainer_state.json", "trainer state", {"global_step": int, "log_history": [dict]})
        with safe_open(checkpoint / ADAPTER, "pt"):
            pass
    except (OSError, UserError, SafetensorError):
        return False
    archives = [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]
    optimizer = [*checkpoint.glob("optimizer*"), *checkpoint.glob("global_step*")]  # the latter is DeepSpeed's
    return bool(archives and optimizer) and all(map(is_zipfile, archives))


def clear_output_dir(folder):
    """Remove an earlier training: its record first, then adapter, log, plot and checkpoints."""
    for name in (TRAINING_RECORD, ADAPTER, ADAPTER_CONFIG, TRAINING_LOG, TRAINING_PLOT):
        (folder / name).unlink(missing_ok=True)
    for checkpoint in folder.glob("checkpoint-*/"):
        shutil.rmtree(checkpoint)


def save_adapter(trainer):
    """Save the adapter in the trainer's output folder; its weights appear last and complete.

    Returns:
        dict of file name -> SHA-256 in the main process, {} in the others.
    """
    folder, files = Path(trainer.args.output_dir), {}
    partial = folder / ".partial"
    trainer.drop_ref_adapter()
    config = trainer.model.peft_config["default"]
    if not isinstance(config.target_modules, str):  # a set, whose order differs between processes
        config.target_modules = sorted(config.target_modules)
    trainer.save_model(str(partial))
    if trainer.is_world_process_zero():
        for name in (ADAPTER_CONFIG, ADAPTER):
            with (partial / name).open("rb") as file:
                os.fsync(file.fileno())
            files[name] = sha256(partial / name)
            (partial / name).replace(folder / name)
        shutil.rmtree(partial)
    trainer.accelerator.wait_for_everyone()
    return files
