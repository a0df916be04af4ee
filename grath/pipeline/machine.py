"""Check the machine for a run: packages, GPU, driver and memory."""

import ctypes
import os
import re
import shutil
import socket
import sysconfig
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from grath.common.errors import PACKAGE, UserError
from grath.common.paths import DATASETS_ROOT, PROJECT
from grath.dpo.defaults import step_sizes
from grath.modeling.chat import template_for
from grath.modeling.devices import check_devices, describe_device
from grath.modeling.loading import load_shape, load_tokenizer
from grath.modeling.memory import (
    BATCH_TOKENS,
    BYTES,
    CONTEXT,
    PAIRS,
    PAIRS_PROMPT,
    ROWS,
    SCORES_ROW,
    USABLE,
    dpo_memory,
    fitting,
    fitting_batch_tokens,
    fitting_pairs,
    fitting_rows,
    pairs_memory,
    scores_memory,
)
from grath.modeling.precision import DTYPES, resolve_precision
from grath.pipeline.settings import STEP_SETTINGS

# Stage: the settings of its precision and its batch, its formula, what its batch is chosen from, and in what unit.
PLANS = {
    "pairs": ("PAIRS_PRECISION", "PAIRS_BATCH_SIZE", pairs_memory, ROWS, "rows"),
    "dpo": ("DPO_PRECISION", "DPO_BATCH_SIZE", dpo_memory, PAIRS, "pairs"),
    "scores": ("EVAL_PRECISION", "EVAL_BATCH_SIZE", scores_memory, BATCH_TOKENS, "tokens"),
}
# On a CPU, bytes in addition to the weights: KV cache, activations, gradients of the LoRA matrices.
ROOM = 0.5e9
SLOW_ON_A_CPU = 2e9
# Milliseconds of a decoding step of 7B with 64 rows, measured on an H200.
STEP_MS = {"int8": 155, "fp16": 38}


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
    driver = driver_cuda_version()
    text = (
        f"{describe_device()}, compute capability {major}.{minor}; "
        f"driver for CUDA {driver // 1000}.{driver % 1000 // 10}; "
        f"torch {torch.__version__} for CUDA {torch.version.cuda} ({', '.join(built)})"
    )
    # Code for a compute capability also runs on later ones of the same major number.
    if built and not any(int(re.sub(r"\D", "", arch)) // 10 == major for arch in built):
        raise UserError(f"{text}: this torch has no code for the GPU; install the build for it from pytorch.org")
    return text


def driver_cuda_version():
    """Return the newest CUDA version that NVIDIA's driver runs: int, 1000 times the major and 10 times the minor."""
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def check_memory(parameters, precisions, num_processes):
    """Check that the model fits into the main memory of a machine without a GPU in its widest precision."""
    import psutil

    need = parameters * max(BYTES[precision] for precision in precisions) * 1.1
    kinds = f"{format_size(need)} of weights in {', '.join(dict.fromkeys(precisions))}"
    if parameters > SLOW_ON_A_CPU:
        raise UserError(f"torch sees no GPU, and {kinds} would take weeks on a CPU: check nvidia-smi")
    free = psutil.virtual_memory().available
    if free < num_processes * (need + ROOM):
        raise UserError(f"{format_size(free)} of memory are free, and {kinds} need more: choose a smaller model")
    return f"no GPU; {format_size(free)} of main memory free, for {kinds}"


def gpu_memory(num_processes):
    """Return (free, total) bytes of the GPU that has the least of them free, of those that the processes use."""
    import torch

    check_devices(num_processes)
    return min(torch.cuda.mem_get_info(device) for device in range(num_processes))


def planned_batch(stage, shape, values, precision, total):
    """Return the batch of a stage with these settings, in the unit of `PLANS`; `total`: bytes of the GPU's memory."""
    given = values[PLANS[stage][1]]
    if stage == "dpo":
        given, processes, accumulation = (int(values[name] or 0) for name in STEP_SETTINGS)
        fitting_batch = fitting_pairs(shape, precision, USABLE * total) or 1
        return step_sizes(processes, given, accumulation, fitting_batch)[0]
    if stage == "scores":  # a number of contexts limits the tokens
        tokens = fitting_batch_tokens(shape, precision, USABLE * total) or BATCH_TOKENS[-1]
        return min(tokens, int(given) * SCORES_ROW) if given.isdigit() else tokens
    rows = int(given or 0) or fitting_rows(shape, precision, USABLE * total, own=_own_tokens(values)) or 1
    return min(rows, int(values["NUM_QUERY"]))


def _own_tokens(values):
    """Return the tokens of a row of the pairs after the few-shot examples, with its response."""
    return PAIRS_PROMPT + int(values["MAX_NEW_TOKENS"])


def check_gpu_memory(stage, shape, values):
    """Check that a stage fits into the free memory of the GPUs; describe what it needs by part.

    Args:
        shape: `ModelShape`.
        values: what `read_settings` returned.

    Raises:
        UserError: it does not fit; the message names the setting and the value that does.
    """
    name, batch_name, memory, batches, unit = PLANS[stage]
    precision = resolve_precision(values[name], stage)
    free, total = gpu_memory(int(values["NUM_PROCESSES"]))
    room = free + CONTEXT - (1 - USABLE) * total  # this process has opened a context too
    batch = planned_batch(stage, shape, values, precision, total)
    if stage == "pairs":
        memory = partial(memory, own=_own_tokens(values))
    parts = memory(shape, precision, batch)
    need = sum(parts.values())
    plan = f"{precision}, {batch:,} {unit}: {format_size(need)} of {format_size(free)} free"
    if need <= room:
        return f"{plan} ({', '.join(f'{part} {format_size(size)}' for part, size in parts.items())})"
    others = [] if stage == "scores" and values["BACKEND"] == "hf" else ["int8", "nf4"]
    for smaller in (precision, *(other for other in others if BYTES[other] < BYTES[precision])):
        fitting_batch = min(batch, fitting(memory, batches, shape, smaller, room))
        if fitting_batch:
            advice = [f"{name}={smaller}"] if smaller != precision else []
            if fitting_batch < batch:
                contexts = max(1, fitting_batch // SCORES_ROW)
                advice.append(f"{batch_name}={contexts if stage == 'scores' else fitting_batch}")
            raise UserError(f"{plan}, too much: set {' and '.join(advice)}")
    raise UserError(f"{plan}, and no smaller setting fits: end other programs on the GPU, or use a larger one")


def precision_hint(name, values):
    """Return a line that says what fp16 would save in stage 1, where int8 is used and fp16 is faster; else None.

    Args:
        name: the model's name.
        values: what `read_settings` returned.
    """
    import torch

    if not torch.cuda.is_available() or resolve_precision(values["PAIRS_PRECISION"], "pairs") != "int8":
        return None
    try:
        shape = load_shape(name)
        check_gpu_memory("pairs", shape, {**values, "PAIRS_PRECISION": "fp16"})
        total = gpu_memory(int(values["NUM_PROCESSES"]))[1]
    except (UserError, RuntimeError):  # torch raises the latter where the memory cannot be asked
        return None
    int8, fp16 = (planned_batch("pairs", shape, values, kind, total) / STEP_MS[kind] for kind in ("int8", "fp16"))
    if fp16 <= int8:  # too few rows fit
        return None
    return (
        "PAIRS_PRECISION=fp16 fits too, and is faster: the host limits decoding in int8 (for 7B, "
        f"{STEP_MS['int8']} ms a step against {STEP_MS['fp16']} ms in fp16, measured on an H200)"
    )


def format_size(count):
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def check_template(values):
    """Check that the model's tokenizer has the chat template that pairs, DPO and sample answers need.

    Returns:
        str that says which one it is.

    Raises:
        UserError: there is no such template.
    """
    model_type = values["MODEL_TYPE"]
    template_for(load_tokenizer(values["MODEL_NAME_OR_PATH"]), model_type)
    return "the tokenizer's own" if model_type == "auto" else model_type
