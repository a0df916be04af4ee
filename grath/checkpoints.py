"""What a training keeps in its folder: record, log, plot, checkpoints, and the adapter that appears last."""

import json
import os
import shutil
from pathlib import Path
from zipfile import is_zipfile

from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from transformers import ProgressCallback, TrainerCallback

from grath.cli import UserError, write_whole
from grath.models import ADAPTER, DTYPES, RECORD, sha256

LOG = "training_log.jsonl"
PLOT = "training.png"
# Parts of the record that may differ between two starts of one training. Data and weights are compared by their hashes;
# of batch, accumulation and processes only the effective batch counts.
MAY_DIFFER = {
    "output_dir", "model_name_or_path", "dataset_path", "overwrite_output_dir", "resume_from_checkpoint", "run_name",
    "gradient_accumulation_steps", "per_device_train_batch_size", "processes",
    "logging_dir", "logging_steps", "logging_first_step", "report_to", "project",
    "trackio_space_id", "save_steps", "save_total_limit", "disable_tqdm", "log_level", "dataloader_num_workers",
    "precompute_ref_batch_size", "per_device_eval_batch_size",
}  # fmt: skip


def read_record(output_dir):
    """The record of the training in `output_dir`, or None."""
    try:
        record = json.loads((Path(output_dir) / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("settings"), dict) else None


def find_earlier(output_dir, record, overwrite):
    """What an earlier start of the same training left in `output_dir`.

    Args:
        record: dict of this training, as it goes into grath.json.
        overwrite: whether whatever is there may be replaced.

    Returns:
        ("finished", None), ("interrupted", the last complete checkpoint's folder, or None if there is none yet), or
        ("nothing", None).

    Raises:
        UserError: the folder holds something else, or is the model that the training starts from.
    """
    folder = Path(output_dir)
    if folder.resolve() == Path(record["settings"]["model_name_or_path"]).expanduser().resolve():
        raise UserError(f"--output_dir {folder} is the model that the training starts from: choose another folder")
    if (folder / "config.json").is_file():
        raise UserError(f"--output_dir {folder} holds a whole model: choose another folder")
    # A kill in the middle of a first start leaves a temporary file, or the model card that TRL writes.
    theirs = [path for path in folder.glob("[!.]*") if path.name != "README.md"]
    if overwrite or not theirs:
        return "nothing", None
    way_out = "choose another --output_dir, remove this one, or pass --overwrite_output_dir to replace it"
    earlier = read_record(folder)
    if earlier is None:
        raise UserError(f"{folder} is not empty and holds no training of this program: {way_out}")
    differing = [name for name in _compared(record) if _compared(record)[name] != _compared(earlier).get(name)]
    if differing:
        name = differing[0]
        was, now = _compared(earlier).get(name), _compared(record)[name]
        raise UserError(f"{folder} holds a training with another {name} ({was}, not {now}): {way_out}")
    if earlier.get("adapter_sha256") and (folder / ADAPTER).is_file():
        if sha256(folder / ADAPTER) != earlier["adapter_sha256"]:
            raise UserError(f"{folder / ADAPTER} is not the file that was saved: {way_out}")
        return "finished", None
    return "interrupted", last_checkpoint(folder)


def _compared(record):
    """What must agree between two starts of one training: a flat dict without the parts that may differ."""
    settings = {name: value for name, value in record["settings"].items() if name not in MAY_DIFFER}
    names = ("base_model", "incoming_adapter_sha256", "pair_file_sha256", "effective_batch")
    return json.loads(json.dumps({**{name: record[name] for name in names}, **settings}))


def last_checkpoint(output_dir):
    """The complete checkpoint with the most steps below `output_dir`, or None; half-written ones are passed over."""
    found = [(int(path.name.partition("-")[2]), path) for path in Path(output_dir).glob("checkpoint-*[0-9]")]
    return next((str(path) for step, path in sorted(found, reverse=True) if _is_complete(path, step)), None)


def _is_complete(checkpoint, step):
    """Whether every file of a checkpoint can be read to its end. `trainer_state.json` is the last to be written."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        with safe_open(checkpoint / ADAPTER, "pt"):
            pass
    except (OSError, ValueError, SafetensorError):
        return False
    archives = [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]
    return state.get("global_step") == step and bool(archives) and all(map(is_zipfile, archives))


def clear(output_dir):
    """Remove an earlier training's adapter, record, log and checkpoints; the adapter first."""
    folder = Path(output_dir)
    for name in (ADAPTER, "adapter_config.json", RECORD, LOG, PLOT):
        (folder / name).unlink(missing_ok=True)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def write_record(output_dir, record):
    write_whole(Path(output_dir) / RECORD, json.dumps(record, indent=2) + "\n")


def save_adapter(trainer, record):
    """Save the adapter and its `record` in the trainer's output folder; the weights appear last, and whole."""
    folder = Path(trainer.args.output_dir)
    partial = folder / ".partial"
    trainer.drop_ref_adapter()
    trainer.save_model(str(partial))
    if trainer.accelerator.is_main_process:
        # PEFT writes a set, in an order that differs from process to process.
        config = json.loads((partial / "adapter_config.json").read_text(encoding="utf-8"))
        config["target_modules"] = sorted(config["target_modules"])
        write_whole(partial / "adapter_config.json", json.dumps(config, indent=2) + "\n")
        write_record(folder, {**record, "adapter_sha256": sha256(partial / ADAPTER)})
        for name in ("adapter_config.json", ADAPTER):
            with (partial / name).open("rb") as file:
                os.fsync(file.fileno())
            (partial / name).replace(folder / name)
        shutil.rmtree(partial)
    trainer.accelerator.wait_for_everyone()


class Bar(ProgressCallback):
    """A progress bar with the newest loss, margin and reward accuracy, instead of a line a log entry."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and "loss" in logs:
            shown = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}
            self.training_bar.set_postfix({name: f"{logs.get(key, 0):.3f}" for name, key in shown.items()})


class TrainingLog(TrainerCallback):
    """Keeps the log as JSON lines in the output folder, and says in words when the training goes wrong."""

    def __init__(self):
        self.said = {}

    def on_train_begin(self, args, state, control, **kwargs):
        # What was said before an interruption belongs to the record too.
        for end in range(1, len(state.log_history) + 1):
            self._warn(args, state, state.log_history[:end])

    def on_log(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        lines = [json.dumps(entry) + "\n" for entry in state.log_history]
        write_whole(Path(args.output_dir) / LOG, "".join(lines))
        self._warn(args, state, state.log_history)

    def _warn(self, args, state, log):
        warmup_steps = args.get_warmup_steps(state.max_steps)
        for kind, warning in warnings_of(log, args.beta, warmup_steps, rounding(args)).items():
            if kind not in self.said:
                self.said[kind] = warning
                PartialState().print(f"\nWarning: {warning}")


def rounding(config):
    """The relative rounding error of the numbers that a training of `GrathDPOConfig` computes its logits in."""
    import torch

    computed = DTYPES.get(config.precision) or ("bfloat16" if config.bf16 else "float16")
    return torch.finfo(getattr(torch, computed)).eps


def warnings_of(log, beta, warmup_steps=0, eps=0.0):
    """What a user should know about a training so far.

    Args:
        log: entries of TRL's log, each a dict with `step`, `rewards/chosen`, `rewards/margins`, ...
        beta: DPO's beta. A reward is beta times the log-ratio of policy to reference (DPO, section 4).
        warmup_steps: steps before the learning rate is at its peak.
        eps: relative rounding error of the logits. The reference's log-probabilities were computed in batches of
            another shape, so a policy that has learnt nothing has a margin of about beta * eps * |log-probability|.

    Returns:
        dict: kind of warning -> sentence.
    """
    entries = [entry for entry in log if "rewards/margins" in entry]
    if not entries:
        return {}
    found, last = {}, entries[-1]
    chosen, rejected = last["rewards/chosen"] / beta, last["rewards/rejected"] / beta
    if chosen < -1 and rejected < -1:
        found["collapse"] = (
            f"chosen answers lose probability together with the rejected ones (log-ratios {chosen:.1f} and "
            f"{rejected:.1f} at step {last['step']}): fewer steps, a smaller learning rate or a larger beta keep the "
            "policy nearer to its reference"
        )
    if last["rewards/accuracies"] == 1 and last["step"] > 1:
        found["all preferred"] = (
            f"every chosen answer is preferred already (reward accuracy 1.0 at step {last['step']}): from here on the "
            "policy only moves away from its reference"
        )
    sizes = [abs(entry.get(f"logps/{side}", 0)) for entry in entries for side in ("chosen", "rejected")]
    nothing = max(1e-3, beta * eps * max(sizes))
    if last["step"] >= max(10, warmup_steps) and all(abs(entry["rewards/margins"]) < nothing for entry in entries):
        found["no margin"] = (
            f"the margin is still 0 at step {last['step']}: nothing is learnt; is the learning rate too small?"
        )
    return found
