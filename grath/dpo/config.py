"""TRL's `DPOConfig` with the paper's settings as defaults."""

import os
from dataclasses import dataclass, field

from trl import DPOConfig

from grath.common.errors import UserError
from grath.dpo.defaults import check_signs, check_trackers, step_sizes
from grath.modeling.devices import print_once
from grath.modeling.loading import load_shape
from grath.modeling.memory import PAIR_TOKENS, REFERENCE_BATCH, USABLE, fitting_pairs
from grath.modeling.precision import DTYPES, PRECISIONS, compute_dtype, resolve_precision

EPOCHS = DPOConfig.num_train_epochs


@dataclass
class GrathDPOConfig(DPOConfig):
    """TRL's `DPOConfig` with the defaults of the paper's code, plus `precision`."""

    output_dir: str = field(
        default="", metadata={"help": "folder for the adapter, its record and its checkpoints (required)"}
    )
    precision: str = field(
        default="auto",
        metadata={
            "help": "precision of the base model's weights; auto: fp4 on a CUDA GPU, bf16 on a CPU",
            "choices": PRECISIONS,
        },
    )
    seed: int = field(
        default=0,
        metadata={
            "help": "seed of the adapter's initial weights, the order of the pairs and the drawn incorrect answers"
        },
    )
    beta: float = field(
        default=0.1, metadata={"help": "strength of the KL penalty towards the reference (DPO, equation 7)"}
    )
    learning_rate: float = field(default=5e-4, metadata={"help": "peak learning rate"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "learning rate schedule"})
    warmup_steps: float = field(default=100, metadata={"help": "warm-up steps; below 1: a fraction of all steps"})
    optim: str = field(
        default="auto",
        metadata={"help": "optimizer; auto: paged_adamw_32bit on a CUDA GPU, adamw_torch on a CPU or with FSDP"},
    )
    per_device_train_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "pairs per device and forward pass; by default as many as the GPU's memory takes, at most 16; 4 on "
            "a CPU or with --gradient_accumulation_steps"
        },
    )
    gradient_accumulation_steps: int | None = field(
        default=None,
        metadata={
            "help": "forward passes per optimizer step; by default so many that all devices together use 16 pairs"
        },
    )
    max_steps: int = field(default=1000, metadata={"help": "optimizer steps"})
    max_length: int | None = field(default=1024, metadata={"help": "drop pairs with more tokens"})
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "order of the pairs; group_by_length: pairs of similar length in each step",
            "choices": ("random", "sequential", "group_by_length"),
        },
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "recompute activations to save memory; off by default, because the sequences are short"},
    )
    precompute_ref_log_probs: bool = field(
        default=True, metadata={"help": "compute the reference's log-probabilities once, before training"}
    )
    precompute_ref_batch_size: int | None = field(
        default=REFERENCE_BATCH, metadata={"help": "pairs per forward pass of that"}
    )
    logging_first_step: bool = field(
        default=True, metadata={"help": "log the first step; its margin shows which model is the reference"}
    )
    save_steps: float = field(default=100, metadata={"help": "steps between checkpoints"})
    report_to: str = field(default="none", metadata={"help": "tensorboard, wandb, trackio, ... or none"})

    def __post_init__(self):
        import torch

        if not self.output_dir:
            raise UserError("--output_dir is required: the folder to save the adapter in")
        check_signs(vars(self))
        check_trackers(self.report_to)
        if self.max_steps > 0 and self.num_train_epochs != EPOCHS:
            raise UserError("--num_train_epochs has no effect unless --max_steps is -1")
        self.precision = resolve_precision(self.precision, "dpo")
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        batch, accumulation = self.per_device_train_batch_size, self.gradient_accumulation_steps
        # `fit_batch_size` replaces both values when the model is known.
        self.fits_batch_size = batch is None and accumulation is None and torch.cuda.is_available()
        sizes = step_sizes(processes, batch, accumulation)
        self.per_device_train_batch_size, self.gradient_accumulation_steps = sizes
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


def fit_batch_size(config, name, dataset):
    """Let a forward pass take as many pairs as the GPU's memory does, and fill the step to 16 pairs by accumulation.

    Changes nothing on a CPU, if the batch size or the accumulation is given, or if the sizes of the model or the pairs
    are not known.

    Args:
        config: `GrathDPOConfig`.
        name: hub name, model folder or adapter folder.
        dataset: the pairs; if they are not tokenized, their lengths are not known.

    Returns:
        dict of the settings that it changed.
    """
    import torch

    if not config.fits_batch_size or "prompt_ids" not in dataset.column_names:
        return {}
    try:
        shape = load_shape(name)
    except UserError:  # a model that cannot be loaded gets its message when it is loaded
        return {}
    longest = max(len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in dataset)
    # All processes must choose the same: the free memory differs between them, the total memory of their GPUs does not.
    gpus = range(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    total = min(torch.cuda.get_device_properties(i).total_memory for i in gpus)
    fitting = fitting_pairs(shape, config.precision, USABLE * total, tokens=max(PAIR_TOKENS, longest)) or 1
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    batch, accumulation = step_sizes(processes, fitting=fitting)
    config.per_device_train_batch_size, config.gradient_accumulation_steps = batch, accumulation
    print_once(
        f"{batch} pairs per forward pass, chosen for a GPU of {total / 1e9:.0f} GB, and {accumulation} passes per step"
    )
    return {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
