"""Which devices this machine has, and whether torch can use what is plainly there."""

import os
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

from grath.cli import UserError


def check_devices(processes=None):
    """Refuse a GPU that is plainly there and that torch cannot use, and more processes than GPUs.

    Args:
        processes: processes on this machine; None for as many as the launcher has started.

    Raises:
        UserError: in either case. On a CPU any number of processes will do.
    """
    import torch

    if os.environ.get("DEVICE", "") not in ("", "cpu"):
        raise UserError(f"DEVICE must be cpu, or empty for the GPUs if there are any, not '{os.environ['DEVICE']}'")
    if not torch.cuda.is_available():
        if not torch.accelerator.is_available() and (sign := sign_of_a_gpu()):
            raise UserError(
                f"there is a GPU here ({sign}), but torch cannot use it: {_torchs_reason()} "
                "(DEVICE=cpu says that the CPU is meant)"
            )
        return
    processes = processes or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > max(1, torch.cuda.device_count()):
        raise UserError(
            f"NUM_PROCESSES={processes}, but {torch.cuda.device_count()} GPU(s) are seen: set CUDA_VISIBLE_DEVICES, or "
            "start a process for each of them"
        )


@lru_cache(maxsize=1)
def sign_of_a_gpu():
    """What shows that there is a GPU of NVIDIA for this process, whatever torch says; None where nothing does."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES={visible}" if visible.strip() not in ("", "-1", "NoDevFiles") else None
    if device := next(Path("/dev").glob("nvidia[0-9]*"), None):
        return str(device)
    if not shutil.which("nvidia-smi"):
        return None
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return "nvidia-smi" if listed.startswith("GPU ") else None


def _torchs_reason():
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0].rstrip(".")
    return "it sees no device"


def machine():
    """The GPUs that torch uses, in words, or that there are none."""
    import torch

    if not torch.accelerator.is_available() or os.environ.get("DEVICE") == "cpu":
        return "the CPU, as DEVICE=cpu says" if os.environ.get("DEVICE") == "cpu" else "the CPU: no GPU is seen"
    count = torch.accelerator.device_count()
    return f"{count} GPU(s), {torch.cuda.get_device_name(0) if torch.cuda.is_available() else 'not of CUDA'}"
