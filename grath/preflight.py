"""What a night's run needs, checked in seconds: packages, GPU, disk, model and data. Run by `CHECK=1 ./run_*.sh`.

    python -m grath.preflight RUN --model MODEL --num_query 1119 ... -- NAME=TITLE ...

Behind `--` stand the stages of the plan. Sizes are estimates: from the weights, the LoRA matrices of `dpo.py`'s
defaults and the kept checkpoints.
"""

import json
import os
import re
import shutil
import socket
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from grath.cli import (
    LORA_R,
    PACKAGE,
    PROJECT,
    ROOT,
    Parser,
    UserError,
    check_writable,
    first_line,
    in_root,
    positive_int,
    run,
)
from grath.devices import check_devices, machine
from grath.models import DTYPES, check_weights, resolve_precision, split_adapter
from grath.questions import load_hub_split, load_questions
from grath.scores import SETS

# Bytes a parameter in memory.
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "nf4": 0.6, "fp4": 0.6}
# Beside the weights: caches, activations, gradients of the LoRA matrices.
ROOM = 2e9
SLOW_ON_A_CPU = 2e9
PAIR = 500
SCORES = 100_000


def hub_is_there():
    """Whether the hub's machine answers within some seconds; behind a proxy it is taken to."""
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    if ROOT or os.environ.get("HF_HUB_OFFLINE"):
        return False
    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        return bool(getproxies())
    return True


def check_packages(precisions):
    """The pinned packages and their versions, and on a GPU a C compiler and Python's headers."""
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
            raise UserError("no C compiler, which Triton needs for TRL's loss on a GPU: install gcc, or set CC")
        header = Path(sysconfig.get_paths()["include"]) / "Python.h"
        if not header.is_file():
            raise UserError(f"there is no {header}, which Triton needs for TRL's loss on a GPU: install python3-dev")
    return "; ".join(differing) or "as pinned in requirements.txt"


def read_model(name):
    """A model's configuration and size: (what to print, config dict, parameters)."""
    base = split_adapter(name)[0]
    folder = Path(base)
    check_weights(base)
    try:
        if folder.is_dir():
            config, parameters = folder / "config.json", _parameters(folder)
        else:
            from huggingface_hub import get_safetensors_metadata, hf_hub_download

            config = Path(hf_hub_download(base, "config.json"))
            parameters = _parameters(config.parent) or sum(get_safetensors_metadata(base).parameter_count.values())
        text = f"{base}, {parameters / 1e6:,.0f} M parameters"
        return text, json.loads(config.read_text(encoding="utf-8")), parameters
    except Exception as error:  # the hub client raises many kinds
        reason = first_line(error)
        raise UserError(f"{base}: {reason} (fetch it with prefetch.sh, or log in with `hf auth login`)") from None


def _parameters(folder):
    """The number of parameters in a folder's safetensors files, from their headers."""
    from math import prod

    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        total += sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total


def check_device(num_processes):
    """Driver, the CUDA that torch was built for, and compute capability, side by side."""
    import torch

    check_devices(num_processes)
    if not torch.cuda.is_available():
        return machine()
    major, minor = torch.cuda.get_device_capability(0)
    built = [arch for arch in torch.cuda.get_arch_list() if re.fullmatch(r"sm_\d+[a-z]?", arch)]
    driver = torch._C._cuda_getDriverVersion()
    text = (
        f"{machine()}, compute capability {major}.{minor}; driver for CUDA {driver // 1000}.{driver % 1000 // 10}; "
        f"torch {torch.__version__} for CUDA {torch.version.cuda} ({', '.join(built)})"
    )
    # Code for a capability runs on the later ones of its major number, which need not be named.
    if built and not any(int(re.sub(r"\D", "", arch)) // 10 == major for arch in built):
        raise UserError(f"{text}: this torch has no code for the GPU; install the one for it from pytorch.org")
    return text


def check_memory(parameters, precisions, num_processes):
    """Whether GPU or main memory holds the model in the widest of the precisions."""
    import psutil
    import torch

    need = parameters * max(BYTES[precision] for precision in precisions) * 1.1
    kinds = f"{_size(need)} of weights in {', '.join(dict.fromkeys(precisions))}"
    if torch.cuda.is_available():
        check_devices(num_processes)
        for device in range(num_processes):
            free = torch.cuda.mem_get_info(device)[0]
            if free < need + ROOM:
                raise UserError(
                    f"GPU {device} has {_size(free)} free, and {kinds} need about {_size(need + ROOM)}: "
                    "end what else runs there, or lower EVAL_PRECISION, PAIRS_PRECISION, DPO_PRECISION"
                )
        return f"{torch.cuda.get_device_name(0)}, {_size(free)} free, for {kinds}"
    if parameters > SLOW_ON_A_CPU:
        raise UserError(f"no GPU is seen, and {kinds} would take weeks on a CPU: look at nvidia-smi")
    free = psutil.virtual_memory().available
    if free < num_processes * (need + ROOM / 4):
        raise UserError(f"{_size(free)} of memory are free, and {kinds} need more: take a smaller model")
    return f"no GPU; {_size(free)} of main memory free, for {kinds}"


def check_data(args):
    """Whether the questions are there, and the sets that the tasks are made from."""
    if args.data_path:
        found = len(load_questions(data_path=args.data_path))
    else:
        found = len(load_hub_split(args.data_name, args.subdata_name, args.split))
    if found < args.num_query:
        raise UserError(f"NUM_QUERY={args.num_query}, but there are only {found} questions")
    for task in args.tasks.split():
        if task in SETS:
            _check_set(SETS[task])
    return f"{found} questions; tasks: {args.tasks or 'none'}"


def _check_set(name):
    if Path(in_root(name)).is_dir():
        return
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub import HfApi

    if (Path(HF_DATASETS_CACHE) / name.replace("/", "___").lower()).is_dir():
        return
    try:
        HfApi().dataset_info(name, timeout=10)
    except Exception as error:  # the hub client raises many kinds
        raise UserError(f"{name}: {first_line(error)} (fetch it with prefetch.sh and set DATASETS_ROOT)") from None


def sizes(config, args, tokenizer):
    """An estimate of the bytes that each kind of stage writes.

    Args:
        config: dict of the model's config.json.
        tokenizer: bytes of the tokenizer's files, which lie in every checkpoint.
    """
    config = config.get("text_config", config)
    if not {"hidden_size", "num_attention_heads", "num_hidden_layers"} <= config.keys():
        raise UserError("the model's config.json does not tell its sizes")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    wide, narrow = heads * head, (config.get("num_key_value_heads") or heads) * head
    adapter = 4 * LORA_R * config["num_hidden_layers"] * (3 * hidden + wide + 2 * narrow)
    checkpoints = -(-args.max_steps // args.save_steps)
    pairs = PAIR * args.num_query
    # A checkpoint holds the adapter and AdamW's two averages.
    dpo = adapter + checkpoints * (3 * adapter + tokenizer)
    return {"pairs": pairs, "splice": pairs, "dpo": dpo, "scores": SCORES * len(args.tasks.split()), "samples": 2000}


def check_disk(folder, need):
    """Whether all rounds find room."""
    check_writable(folder)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < 1.2 * need:
        raise UserError(f"{_size(free)} are free in {existing}, and all rounds write about {_size(need)}: set RUNS_DIR")
    return f"{_size(free)} free, about {_size(need)} to write"


def _size(count):
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def main():
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--model", required=True, help="hub name, model folder or LoRA adapter's folder")
    parser.add_argument("--num_query", type=positive_int, required=True, help="questions asked in a round")
    parser.add_argument("--max_steps", type=positive_int, required=True, help="DPO steps of a round")
    parser.add_argument("--save_steps", type=positive_int, required=True, help="DPO steps between checkpoints")
    parser.add_argument("--data_path", help="local questions")
    parser.add_argument("--data_name", help="hub data set of the questions")
    parser.add_argument("--subdata_name", help="its configuration")
    parser.add_argument("--split", default="train", help="its split")
    parser.add_argument("--tasks", default="", help="what is scored")
    parser.add_argument("--num_processes", type=positive_int, default=1, help="processes, one a GPU")
    parser.add_argument("--precisions", nargs=3, required=True, help="of pairs, DPO and scores")
    args = parser.parse_with_rest()
    stages = [stage.split("=", 1) for stage in args.rest]
    if not hub_is_there():
        os.environ["HF_HUB_OFFLINE"] = "1"
        print("The hub cannot be reached: what is on this machine counts")

    failed = []

    def check(name, function, *arguments):
        try:
            found = function(*arguments)
        except UserError as error:
            failed.append(name)
            print(f"FAIL  {name}: {' '.join(str(error).split())}", flush=True)
            return None
        print(f"ok    {name}: {found if isinstance(found, str) else found[0]}", flush=True)
        return found

    precisions = [check_precision(*pair) for pair in zip(args.precisions, ("pairs", "dpo", "scores"), strict=True)]
    check("packages", check_packages, precisions)
    check("device", check_device, args.num_processes)
    model = check("model", read_model, args.model)
    if model:
        check("memory", check_memory, model[2], precisions, args.num_processes)
    check("data", check_data, args)
    each = {}
    if model:
        base = Path(split_adapter(args.model)[0])
        tokenizer = sum(file.stat().st_size for file in base.glob("tokenizer*")) or 4_000_000
        found = check("sizes", lambda: (f"{len(stages)} stages", sizes(model[1], args, tokenizer)))
        each = found[1] if found else {}
    if each:
        check("disk", check_disk, args.run, sum(each[name] for name, _ in stages))
    print(f"The plan, {len(stages)} stages in {args.run}, and about what each writes:")
    for name, title in stages:
        print(f"  {title:60}{_size(each[name]) if each else '?':>10}")
    if failed:
        raise UserError(f"not ready: {', '.join(failed)}; see above")
    print("Ready: start the same command without CHECK=1")


def check_precision(precision, stage):
    """What a precision means here; `UserError` where bitsandbytes is needed and missing."""
    if precision not in ("auto", *BYTES):
        raise UserError(f"there is no precision {precision!r}: choose auto, {', '.join(BYTES)}")
    return resolve_precision(precision, stage)


if __name__ == "__main__":
    run(main)
