"""The settings of the paper's DPO, as defaults of TRL's `DPOConfig`."""

import os
from dataclasses import dataclass, field

from trl import DPOConfig

from grath.cli import UserError, check_ranges, papers_accumulation
from grath.models import DTYPES, PRECISIONS, resolve_precision


@dataclass
class GrathDPOConfig(DPOConfig):
    """Every option of TRL's `DPOConfig`, with the defaults of the paper's code, and `precision`."""

    output_dir: str = field(default="", metadata={"help": "where the adapter is saved (required)"})
    precision: str = field(
        default="auto",
        metadata={"help": "the base's weights; auto: fp4 on a CUDA GPU, bf16 on a CPU", "choices": PRECISIONS},
    )
    seed: int = field(default=0, metadata={"help": "seed of the adapter's start, the order and the draws"})
    beta: float = field(default=0.1, metadata={"help": "strength of the tie to the reference (DPO, equation 7)"})
    learning_rate: float = field(default=5e-4, metadata={"help": "peak learning rate"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "learning rate schedule"})
    warmup_steps: float = field(default=100, metadata={"help": "warm-up steps; below 1, a share of all steps"})
    optim: str = field(
        default="auto",
        metadata={"help": "optimiser; auto: paged_adamw_32bit on a CUDA GPU, adamw_torch on a CPU"},
    )
    per_device_train_batch_size: int = field(default=4, metadata={"help": "pairs a device and forward pass"})
    gradient_accumulation_steps: int | None = field(
        default=None,
        metadata={"help": "forward passes an optimiser step; by default as many as make 16 pairs over all devices"},
    )
    max_steps: int = field(default=1000, metadata={"help": "optimiser steps"})
    max_length: int | None = field(default=1024, metadata={"help": "pairs with more tokens are dropped"})
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "order of the pairs; group_by_length: those of one step are about equally long",
            "choices": ("random", "sequential", "group_by_length"),
        },
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "recompute activations to save memory; off: these sequences are short"}
    )
    precompute_ref_log_probs: bool = field(
        default=True, metadata={"help": "compute the reference's log-probabilities once, before training"}
    )
    precompute_ref_batch_size: int | None = field(default=16, metadata={"help": "pairs a forward pass of that"})
    logging_first_step: bool = field(default=True, metadata={"help": "log the first step, whose margin tells most"})
    save_steps: float = field(default=100, metadata={"help": "steps between checkpoints"})
    report_to: str = field(default="none", metadata={"help": "tensorboard, wandb, trackio, ... or none"})

    def __post_init__(self):
        import torch

        if not self.output_dir:
            raise UserError("--output_dir is required: where is the adapter to be saved?")
        check_ranges(vars(self))
        self.precision = resolve_precision(self.precision, "dpo")
        if self.gradient_accumulation_steps is None:
            processes = int(os.environ.get("WORLD_SIZE", "1"))
            self.gradient_accumulation_steps = papers_accumulation(self.per_device_train_batch_size, processes)
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.optim == "auto":
            self.optim = "paged_adamw_32bit" if torch.cuda.is_available() else "adamw_torch"
        # bf16 and fp32 weights are trained as they are, without autocast; TRL would turn bf16 autocast on wherever
        # nothing is said.
        if self.bf16 is None:
            quantised = self.precision not in DTYPES
            self.bf16 = (
                quantised
                and not self.fp16
                and (not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False))
            )
            self.fp16 = self.fp16 or self.precision == "fp16" or (quantised and not self.bf16)
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # the adapter's weights are used at every step
        super().__post_init__()
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        # One process trains on one GPU, also where several are in sight: `DPOTrainer` refuses `nn.DataParallel`.
        self._n_gpu = min(self.n_gpu, 1)
