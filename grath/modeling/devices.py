"""The devices of this machine, and the processes that share the work."""

import gc
import os
import re
from datetime import timedelta
from pathlib import Path

from grath.common.errors import UserError, first_line

# This must happen before torch looks for GPUs.
if os.environ.get("DEVICE") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["ACCELERATE_USE_CPU"] = "true"
# Unless a launcher's variables are all set, this is the only process: what MPI, Slurm or a pod has set is for another
# job.
if not {"LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
    for _name in [*os.environ]:
        if re.fullmatch(r"(OMPI_COMM|PMIX?|MV2_COMM|MPI)_.*|MPI_LOCALRANKID|(LOCAL_)?(WORLD_SIZE|RANK)", _name):
            del os.environ[_name]
# This must happen before torch is imported. By default, batches of changing length leave gaps in a GPU's memory.
if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:  # torch's name, and its older one
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def check_devices(processes=None):
    """Raise `UserError` if torch cannot use this machine's GPU, or has none for a process, or DEVICE is not valid.

    Args:
        processes: number of processes on this machine; None: as many as the launcher started. A CPU takes any number.
    """
    import torch

    if os.environ.get("DEVICE", "") not in ("", "cpu"):
        raise UserError(f"DEVICE must be cpu or empty (the GPUs, if any), not '{os.environ['DEVICE']}'")
    if not torch.cuda.is_available():
        if torch.accelerator.is_available() or not (evidence := gpu_evidence()):
            return
        reason = "it sees no device"
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            reason = first_line(error).rstrip(".")
        raise UserError(
            f"this machine has a GPU ({evidence}), but torch cannot use it: {reason} (set DEVICE=cpu to use the CPU)"
        )
    processes = processes or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > max(1, torch.cuda.device_count()):
        raise UserError(
            f"NUM_PROCESSES={processes}, but torch sees {torch.cuda.device_count()} GPU(s): start one process for each "
            "GPU, or set CUDA_VISIBLE_DEVICES"
        )


def gpu_evidence():
    """Return what shows that this process has an NVIDIA GPU, without asking torch: str, or None if nothing does."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return next(map(str, Path("/dev").glob("nvidia[0-9]*")), None)
    return f"CUDA_VISIBLE_DEVICES={visible}" if visible.strip() not in ("", "-1", "NoDevFiles") else None


def describe_device():
    """Describe the device that torch uses, in words."""
    import torch

    if os.environ.get("DEVICE") == "cpu":
        return "the CPU (DEVICE=cpu)"
    if not torch.accelerator.is_available():
        return "the CPU (torch sees no GPU)"
    count = torch.accelerator.device_count()
    return f"{count} GPU(s), {torch.cuda.get_device_name(0) if torch.cuda.is_available() else 'not CUDA'}"


def init_distributed():
    """Return accelerate's `PartialState`, with a timeout of one day for the slowest process instead of 10 minutes."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))


def check_shared(seen, folder):
    """Raise `UserError` if the processes of several machines have read different things (`seen`) in a folder."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    from accelerate.utils import gather_object

    init_distributed()
    if len(set(gather_object([seen]))) > 1:
        raise UserError(f"the processes see different files in {folder}: all machines must share it")


def print_once(text):
    """Print `text` in the main process only."""
    from accelerate import PartialState

    PartialState().print(text)


def this_device():
    """Return the name of this process's device: str. A CPU has no number, which safetensors would refuse."""
    from accelerate import PartialState

    device = PartialState().device
    return "cpu" if device.type == "cpu" else str(device)


def halve_if_out_of_memory(function, size, least=1):
    """Return `function(size)`; halve `size` (int) each time the memory is full, but not below `least`."""
    import torch

    while True:
        try:
            return function(size)
        except torch.OutOfMemoryError:
            if size // 2 < least:
                raise
        size //= 2
        # Not while the error is handled: its traceback keeps the batch in memory.
        gc.collect()
        torch.cuda.empty_cache()
