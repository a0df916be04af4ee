"""Trainer callbacks: progress bar, log file, and warnings about the training."""

import json
import math
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import ProgressCallback, TrainerCallback

from grath.common.errors import UserError
from grath.common.files import atomic_write_text
from grath.common.layout import TRAINING_LOG
from grath.common.progress import progress_bar
from grath.modeling.precision import DTYPES


class ProgressBar(ProgressCallback):
    """Show the latest loss, margin and reward accuracy in the progress bar, instead of printing each log entry."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar = progress_bar(total=state.max_steps, desc="DPO", unit=" steps")
        self.current_step = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and "loss" in logs:
            shown = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}
            self.training_bar.set_postfix({name: f"{logs.get(key, 0):.3f}" for name, key in shown.items()})


class TrainingLog(TrainerCallback):
    """Write the log as JSON lines to the output folder; print warnings when the training goes wrong, end it on NaN.

    The attribute `warnings` is a dict, kind of warning -> sentence.

    Args:
        steps_per_epoch: float. `Trainer` takes the whole training for one epoch.
    """

    def __init__(self, steps_per_epoch):
        self.warnings, self.steps_per_epoch, self.checked = {}, steps_per_epoch, 0

    def on_train_begin(self, args, state, control, **kwargs):
        # A resumed training would use the intervals of its checkpoint; those given now apply.
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step / self.steps_per_epoch
        if int(state.epoch) > int((state.global_step - 1) / self.steps_per_epoch):
            control.should_log = control.should_log or args.logging_strategy == "epoch"
            control.should_save = control.should_save or args.save_strategy == "epoch"

    def on_log(self, args, state, control, **kwargs):
        log = state.log_history
        if any(math.isnan(value) for name, value in log[-1].items() if name.startswith("rewards/")):
            raise UserError(
                f"the training diverged: the rewards are NaN at step {state.global_step}; use a lower --learning_rate"
            )
        if state.is_world_process_zero:
            atomic_write_text(Path(args.output_dir) / TRAINING_LOG, "".join(json.dumps(line) + "\n" for line in log))
        # A resumed training also finds the warnings from before the interruption.
        while self.checked < len(log):
            self.checked += 1
            for kind, warning in training_warnings(log[: self.checked], args, state.max_steps).items():
                if self.warnings.setdefault(kind, warning) is warning:
                    PartialState().print(f"\nWarning: {warning}")


def training_warnings(log, config, max_steps):
    """Find signs in the log that the training goes wrong: dict, kind of warning -> sentence.

    A reward is beta times the log-ratio of policy to reference (DPO, section 4). The reference's log-probabilities come
    from batches of another shape, so a policy that has learned nothing has a margin of about beta * eps *
    |log-probability|, where eps is the relative rounding error of the logits.

    Args:
        log: entries of TRL's log, each a dict with `step`, `rewards/chosen`, `rewards/margins`, ...
        config: `GrathDPOConfig`.
        max_steps: optimizer steps of the whole training.
    """
    entries = [entry for entry in log if "rewards/margins" in entry]
    if not entries:
        return {}
    found, last, warmup = {}, entries[-1], config.get_warmup_steps(max_steps)
    if warmup >= max_steps and config.lr_scheduler_type not in ("constant", "reduce_lr_on_plateau", "greedy"):
        found["warm-up"] = f"the warm-up of {warmup} steps never ends in {max_steps}: use fewer warm-up steps"
    chosen, rejected = last["rewards/chosen"] / config.beta, last["rewards/rejected"] / config.beta
    if chosen < -1 and rejected < -1:
        found["collapse"] = (
            f"chosen answers lose probability together with the rejected ones (log-ratios {chosen:.1f} and "
            f"{rejected:.1f} at step {last['step']}): use fewer steps, a smaller learning rate or a larger beta to "
            "keep the policy close to its reference"
        )
    if last["rewards/accuracies"] == 1 and last["step"] > 1:
        found["all preferred"] = (
            f"every chosen answer is preferred already (reward accuracy 1.0 at step {last['step']}): more steps only "
            "move the policy away from its reference"
        )
    dtype = DTYPES.get(config.precision) or ("bfloat16" if config.bf16 else "float16")
    sizes = [abs(entry.get(f"logps/{side}", 0)) for entry in entries for side in ("chosen", "rejected")]
    negligible = max(1e-3, config.beta * torch.finfo(getattr(torch, dtype)).eps * max(sizes))
    too_small = all(abs(entry["rewards/margins"]) < negligible for entry in entries)
    if too_small and last["step"] >= max(10, min(warmup, max_steps)):
        found["no margin"] = (
            f"the margin is still 0 at step {last['step']}: the policy learns nothing; try a larger learning rate"
        )
    return found
