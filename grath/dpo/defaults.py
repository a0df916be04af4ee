"""Training defaults of the paper that other stages need too, and checks of numbers; does not import TRL."""

from grath.common.errors import UserError

PAPER_EFFECTIVE_BATCH = 16
LORA_ALPHA, LORA_DROPOUT = 16, 0.05
POSITIVE = (
    "num_sample", "lora_r", "lora_alpha", "learning_rate", "beta", "num_train_epochs", "per_device_train_batch_size",
    "gradient_accumulation_steps", "max_length", "save_steps", "logging_steps",
)  # fmt: skip
NOT_NEGATIVE = ("lora_dropout", "seed", "warmup_steps")


def step_sizes(processes, batch=None, accumulation=None, fitting=4):
    """Return (pairs per forward pass, accumulation steps) of each process.

    What is not given makes 16 pairs per step, or fewer where the processes cannot share 16 equally. The pairs of a step
    do not depend on `fitting`, nor on a `batch` that divides them, so a training resumes on another GPU.

    Args:
        batch, accumulation: int, or None if not given.
        fitting: pairs that fit into the memory at once, a power of 2.
    """
    own = 2 ** (max(1, PAPER_EFFECTIVE_BATCH // processes).bit_length() - 1)
    if batch or accumulation:
        batch = batch or 4
        return batch, accumulation or max(1, own // batch)
    return min(fitting, own), own // min(fitting, own)


def check_trackers(names):
    """Raise `UserError` if transformers cannot report to one of the trackers (str or list of str) on this machine."""
    names = {names} if isinstance(names, str) else set(names or ())
    if names <= {"none", "all"}:
        return
    from transformers.integrations import get_available_reporting_integrations

    if missing := sorted(names - {"none", "all", *get_available_reporting_integrations()}):
        raise UserError(f"report_to: there is no tracker {missing[0]}, or its package is not installed")


def check_signs(values):
    """Raise `UserError` if a number in `values` (dict) is negative, or 0 where it must be positive. None is skipped."""
    for name in POSITIVE:
        if values.get(name) is not None and not 0 < values[name] < float("inf"):
            raise UserError(f"--{name} must be greater than 0, not {values[name]}")
    for name in NOT_NEGATIVE:
        if values.get(name) is not None and not values[name] >= 0:
            raise UserError(f"--{name} must not be negative, not {values[name]}")
