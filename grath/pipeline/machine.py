"""Check the machine for a run: packages, GPU, driver and memory."""

import os
import re
import shutil
import socket
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from grath.common.errors import PACKAGE, UserError
from grath.common.paths import DATASETS_ROOT, PROJECT
from grath.modeling.devices import check_devices, describe_device
from grath.modeling.precision import DTYPES

# Bytes per parameter in memory.
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "nf4": 0.6, "fp4": 0.6}
# Bytes in addition to the weights: KV cache, activations, gradients of the LoRA matrices.
ROOM = 2e9
SLOW_ON_A_CPU = 2e9


def hub_is_reachable():
    """Whether the hub accepts a connection within five seconds, or a proxy is configured."""
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    if DATASETS_ROOT or os.environ.get("HF_HUB_OFFLINE"):
        return False
    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        return bool(getproxies())
    return True


def check_packages(precisions):
    """Compare the packages with the pinned versions; on a GPU, look for a C compiler and Python's headers too."""
    import torch
    from packaging.requirements import Requirement

    differing = []
    for line in (PROJECT / "requirements.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        optional = requirement.name == "bitsandbytes" and set(precisions) <= set(DTYPES)
        if optional or (requirement.marker and not requirement.marker.evaluate()):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            raise UserError(f"{requirement.name} is missing: {PACKAGE}") from None
        if found.partition("+")[0] not in requirement.specifier:
            differing.append(f"{requirement.name} is {found}, tested is {str(requirement.specifier).lstrip('=')}")
    if torch.cuda.is_available():
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            raise UserError(
                "there is no C compiler, which Triton needs for TRL's loss on a GPU: install gcc, or set CC"
            )
        header = Path(sysconfig.get_paths()["include"]) / "Python.h"
        if not header.is_file():
            raise UserError(f"there is no {header}, which Triton needs for TRL's loss on a GPU: install python3-dev")
    return "; ".join(differing) or "as pinned in requirements.txt"


def check_device(num_processes):
    """Describe the driver, the CUDA version of torch, and the compute capability of the GPU side by side."""
    import torch

    check_devices(num_processes)
    if not torch.cuda.is_available():
        return describe_device()
    major, minor = torch.cuda.get_device_capability(0)
    built = [arch for arch in torch.cuda.get_arch_list() if re.fullmatch(r"sm_\d+[a-z]?", arch)]
    driver = torch._C._cuda_getDriverVersion()
    text = (
        f"{describe_device()}, compute capability {major}.{minor}; "
        f"driver for CUDA {driver // 1000}.{driver % 1000 // 10}; "
        f"torch {torch.__version__} for CUDA {torch.version.cuda} ({', '.join(built)})"
    )
    # Code for a compute capability also runs on later ones of the same major number.
    if built and not any(int(re.sub(r"\D", "", arch)) // 10 == major for arch in built):
        raise UserError(f"{text}: this torch has no code for the GPU; install the build for it from pytorch.org")
    return text


def check_memory(parameters, precisions, num_processes):
    """Check that the model fits into the memory of the GPUs or the machine in its widest precision."""
    import psutil
    import torch

    need = parameters * max(BYTES[precision] for precision in precisions) * 1.1
    kinds = f"{format_size(need)} of weights in {', '.join(dict.fromkeys(precisions))}"
    if torch.cuda.is_available():
        check_devices(num_processes)
        for device in range(num_processes):
            free = torch.cuda.mem_get_info(device)[0]
            if free < need + ROOM:
                raise UserError(
                    f"GPU {device} has {format_size(free)} free, and {kinds} need about {format_size(need + ROOM)}: "
                    "end other programs on it, or lower EVAL_PRECISION, PAIRS_PRECISION, DPO_PRECISION"
                )
        return f"{torch.cuda.get_device_name(0)}, {format_size(free)} free, for {kinds}"
    if parameters > SLOW_ON_A_CPU:
        raise UserError(f"torch sees no GPU, and {kinds} would take weeks on a CPU: check nvidia-smi")
    free = psutil.virtual_memory().available
    if free < num_processes * (need + ROOM / 4):
        raise UserError(f"{format_size(free)} of memory are free, and {kinds} need more: choose a smaller model")
    return f"no GPU; {format_size(free)} of main memory free, for {kinds}"


def format_size(count):
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
