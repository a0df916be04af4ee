"""TRL's `DPOConfig` with the paper's settings as defaults."""

import os
from dataclasses import dataclass, field
from math import isnan

from transformers.utils import is_liger_kernel_available
from trl import DPOConfig

from grath.common import defaults
from grath.common.defaults import PAIRS_PER_STEP
from grath.common.errors import UserError
from grath.dpo import option
from grath.modeling.precision import DTYPES, PRECISIONS, compute_dtype, resolve_precision

POSITIVE = (
    "num_sample", "lora_r", "lora_alpha", "learning_rate", "beta", "num_train_epochs", "per_device_train_batch_size",
    "gradient_accumulation_steps", "precompute_ref_batch_size", "max_length", "save_steps", "logging_steps",
)  # fmt: skip
NOT_NEGATIVE = ("lora_dropout", "seed", "warmup_steps", "dataloader_num_workers")
# TRL refuses others only in the first step.
LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass
class GrathDPOConfig(DPOConfig):
    """TRL's `DPOConfig` with the defaults of the paper's code, plus `precision`."""

    output_dir: str = option("", "folder for the adapter, its record and its checkpoints (required)")
    precision: str = option("auto", "of the base's weights; auto: fp4 on a CUDA GPU, bf16 on a CPU", choices=PRECISIONS)
    seed: int = option(0, "seed of the adapter's initial weights, the order of pairs and the drawn incorrect answers")
    beta: float = option(defaults.BETA, "strength of the KL penalty towards the reference (DPO, equation 7)")
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": "DPO's own loss is sigmoid; several losses are weighted by loss_weights", "choices": LOSSES},
    )
    f_divergence_type: str = option("reverse_kl", "divergence from the reference", choices=DIVERGENCES)
    learning_rate: float = option(defaults.LEARNING_RATE, "peak learning rate")
    lr_scheduler_type: str = option("cosine", "learning rate schedule")
    warmup_steps: float = option(defaults.WARMUP_STEPS, "warm-up steps; below 1: a fraction of all steps")
    optim: str = option("auto", "auto: paged_adamw_32bit on a CUDA GPU, adamw_torch on a CPU or with FSDP")
    per_device_train_batch_size: int | None = option(
        None, f"pairs per forward pass; by default as many as fit on a GPU, at most {PAIRS_PER_STEP}; 4 on a CPU"
    )
    gradient_accumulation_steps: int | None = option(
        None, f"forward passes per step; by default chosen so that all devices together use {PAIRS_PER_STEP} pairs"
    )
    max_steps: int = option(defaults.MAX_STEPS, "optimizer steps")
    num_train_epochs: float | None = option(
        None, f"epochs, with --max_steps -1; {DPOConfig.num_train_epochs} if not set"
    )
    max_length: int | None = option(defaults.MAX_LENGTH, "drop pairs with more tokens")
    train_sampling_strategy: str = option(
        "group_by_length",
        "order of the pairs; group_by_length: pairs of similar length in each step",
        choices=("random", "sequential", "group_by_length"),
    )
    gradient_checkpointing: bool | None = option(
        None, "recompute activations to save memory; off by default", nargs="?", const=True
    )
    precompute_ref_log_probs: bool = option(True, "compute the reference's log-probabilities once, before training")
    precompute_ref_batch_size: int | None = option(16, "pairs per forward pass of that, halved if they do not fit")
    logging_first_step: bool = option(True, "log the first step; its margin shows which model is the reference")
    save_steps: float = option(defaults.SAVE_STEPS, "steps between checkpoints")
    report_to: str = option("none", "tensorboard, wandb, trackio, ... or none")
    ddp_find_unused_parameters: bool | None = option(False, "not needed: every step uses all weights of the adapter")

    def __post_init__(self):
        import torch

        if not self.output_dir:
            raise UserError("--output_dir is required: the folder to save the adapter in")
        check_signs(vars(self))
        defaults.check_trackers(self.report_to)
        if self.max_steps == 0:
            raise UserError("--max_steps must be greater than 0, or -1 to train for --num_train_epochs")
        if self.max_steps > 0 and self.num_train_epochs is not None:
            raise UserError("--num_train_epochs has no effect unless --max_steps is -1")
        self.num_train_epochs = self.num_train_epochs or DPOConfig.num_train_epochs
        if self.eval_on_start:
            raise UserError("--eval_on_start needs an evaluation set, which dpo.py does not have")
        self.precision = resolve_precision(self.precision, "dpo")
        sizes = (self.per_device_train_batch_size, self.gradient_accumulation_steps)
        # The trainer then replaces both values.
        self.probes_memory = sizes == (None, None) and torch.cuda.is_available()
        sizes = step_sizes(int(os.environ.get("WORLD_SIZE", "1")), *sizes)
        self.per_device_train_batch_size, self.gradient_accumulation_steps = sizes
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.activation_offloading and self.use_cpu:
            raise UserError("--activation_offloading needs a GPU")
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise UserError("--use_liger_kernel needs a package: pip install liger-kernel")
        if self.optim == "auto":
            paged = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_FSDP") != "true"
            self.optim = "paged_adamw_32bit" if paged else "adamw_torch"
        # Train bf16 and fp32 weights without autocast; by default TRL turns bf16 autocast on.
        if self.bf16 is None:
            quantized = self.precision not in DTYPES
            self.bf16 = quantized and not self.fp16 and compute_dtype() == torch.bfloat16
            self.fp16 = self.fp16 or self.precision == "fp16" or (quantized and not self.bf16)
        # A user's accelerate configuration may differ; what is recorded here is used.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if self.bf16 else "fp16" if self.fp16 else "no"
        os.environ.pop("ACCELERATE_FP8_BACKEND", None)
        os.environ["ACCELERATE_DYNAMO_BACKEND"] = "no"  # --torch_compile sets it again
        super().__post_init__()
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        # One process uses one GPU even if it sees several: `DPOTrainer` refuses `nn.DataParallel`.
        self._n_gpu = min(self.n_gpu, 1)


def step_sizes(processes, batch=None, accumulation=None):
    """Return (pairs per forward pass, forward passes per step) of each process; a size that is given is kept.

    By default each process takes the largest power of 2 with which all have at most `PAIRS_PER_STEP`, and at least one.
    """
    own = 2 ** (max(1, PAIRS_PER_STEP // processes).bit_length() - 1)
    batch = batch or (4 if accumulation else min(4, own))
    return batch, accumulation or max(1, own // batch)


def check_signs(values):
    """Raise `UserError` for a NaN in `values` (dict), or a number that is too small; None is skipped."""
    for name in POSITIVE:
        if values.get(name) is not None and not 0 < values[name] < float("inf"):
            raise UserError(f"--{name} must be greater than 0, not {values[name]}")
    for name in NOT_NEGATIVE:
        if values.get(name) is not None and not values[name] >= 0:
            raise UserError(f"--{name} must not be negative, not {values[name]}")
    if nan := [name for name, value in values.items() if isinstance(value, float) and isnan(value)]:
        raise UserError(f"--{nan[0]} must be a number, not nan")
