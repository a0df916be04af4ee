"""TRL's `DPOConfig` with the paper's settings as defaults."""

import os
from dataclasses import dataclass

from transformers.hf_argparser import HfArg
from trl import DPOConfig

from grath.common import defaults
from grath.common.defaults import PAIRS_PER_STEP
from grath.common.errors import UserError
from grath.modeling.precision import DTYPES, PRECISIONS, compute_dtype, resolve_precision

EPOCHS = DPOConfig.num_train_epochs
POSITIVE = (
    "num_sample", "lora_r", "lora_alpha", "learning_rate", "beta", "num_train_epochs", "per_device_train_batch_size",
    "gradient_accumulation_steps", "precompute_ref_batch_size", "max_length", "save_steps", "logging_steps",
)  # fmt: skip
NOT_NEGATIVE = ("lora_dropout", "seed", "warmup_steps")


@dataclass
class GrathDPOConfig(DPOConfig):
    """TRL's `DPOConfig` with the defaults of the paper's code, plus `precision`."""

    output_dir: str = HfArg(default="", help="folder for the adapter, its record and its checkpoints (required)")
    precision: str = HfArg(
        default="auto",
        help="precision of the base model's weights; auto: fp4 on a CUDA GPU, bf16 on a CPU",
        metadata={"choices": PRECISIONS},
    )
    seed: int = HfArg(
        default=0, help="seed of the adapter's initial weights, the order of the pairs and the drawn incorrect answers"
    )
    beta: float = HfArg(
        default=defaults.BETA, help="strength of the KL penalty towards the reference (DPO, equation 7)"
    )
    learning_rate: float = HfArg(default=defaults.LEARNING_RATE, help="peak learning rate")
    lr_scheduler_type: str = HfArg(default="cosine", help="learning rate schedule")
    warmup_steps: float = HfArg(default=defaults.WARMUP_STEPS, help="warm-up steps; below 1: a fraction of all steps")
    optim: str = HfArg(
        default="auto", help="optimizer; auto: paged_adamw_32bit on a CUDA GPU, adamw_torch on a CPU or with FSDP"
    )
    per_device_train_batch_size: int | None = HfArg(
        default=None,
        help="pairs per device and forward pass; by default as many as the GPU's memory takes, at most "
        f"{PAIRS_PER_STEP}; 4 on a CPU or with --gradient_accumulation_steps",
    )
    gradient_accumulation_steps: int | None = HfArg(
        default=None,
        help=f"forward passes per step; by default so many that all devices together use {PAIRS_PER_STEP} pairs",
    )
    max_steps: int = HfArg(default=defaults.MAX_STEPS, help="optimizer steps")
    max_length: int | None = HfArg(default=defaults.MAX_LENGTH, help="drop pairs with more tokens")
    train_sampling_strategy: str = HfArg(
        default="group_by_length",
        help="order of the pairs; group_by_length: pairs of similar length in each step",
        metadata={"choices": ("random", "sequential", "group_by_length")},
    )
    gradient_checkpointing: bool | None = HfArg(
        default=None, help="recompute activations to save memory; off by default, because the sequences are short"
    )
    precompute_ref_log_probs: bool = HfArg(
        default=True, help="compute the reference's log-probabilities once, before training"
    )
    precompute_ref_batch_size: int | None = HfArg(
        default=16, help="pairs per forward pass of that; half as many each time that the memory is full"
    )
    logging_first_step: bool = HfArg(
        default=True, help="log the first step; its margin shows which model is the reference"
    )
    save_steps: float = HfArg(default=defaults.SAVE_STEPS, help="steps between checkpoints")
    report_to: str = HfArg(default="none", help="tensorboard, wandb, trackio, ... or none")

    def __post_init__(self):
        import torch

        if not self.output_dir:
            raise UserError("--output_dir is required: the folder to save the adapter in")
        check_signs(vars(self))
        defaults.check_trackers(self.report_to)
        if self.max_steps > 0 and self.num_train_epochs != EPOCHS:
            raise UserError("--num_train_epochs has no effect unless --max_steps is -1")
        self.precision = resolve_precision(self.precision, "dpo")
        sizes = (self.per_device_train_batch_size, self.gradient_accumulation_steps)
        # The trainer then replaces both values.
        self.probes_memory = sizes == (None, None) and torch.cuda.is_available()
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        self.per_device_train_batch_size, self.gradient_accumulation_steps = step_sizes(processes, *sizes)
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.optim == "auto":
            paged = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_FSDP") != "true"
            self.optim = "paged_adamw_32bit" if paged else "adamw_torch"
        # Train bf16 and fp32 weights without autocast; by default TRL turns bf16 autocast on.
        if self.bf16 is None:
            quantized = self.precision not in DTYPES
            self.bf16 = quantized and not self.fp16 and compute_dtype() == torch.bfloat16
            self.fp16 = self.fp16 or self.precision == "fp16" or (quantized and not self.bf16)
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every step uses all weights of the adapter
        super().__post_init__()
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        # One process uses one GPU even if it sees several: `DPOTrainer` refuses `nn.DataParallel`.
        self._n_gpu = min(self.n_gpu, 1)


def step_sizes(processes, batch=None, accumulation=None):
    """Return (pairs per forward pass, forward passes per step) of each process; a size that is given is kept.

    By default a step has `PAIRS_PER_STEP` pairs, or fewer where the processes cannot share them equally.
    """
    own = 2 ** (max(1, PAIRS_PER_STEP // processes).bit_length() - 1)
    batch = batch or (4 if accumulation else min(4, own))
    return batch, accumulation or max(1, own // batch)


def check_signs(values):
    """Raise `UserError` if a number in `values` (dict) is negative, or 0 where it must be positive. None is skipped."""
    for name in POSITIVE:
        if values.get(name) is not None and not 0 < values[name] < float("inf"):
            raise UserError(f"--{name} must be greater than 0, not {values[name]}")
    for name in NOT_NEGATIVE:
        if values.get(name) is not None and not values[name] >= 0:
            raise UserError(f"--{name} must not be negative, not {values[name]}")
