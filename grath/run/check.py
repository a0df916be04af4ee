"""Check in seconds what a run needs: packages, GPU, model, data, servers, disk. `CHECK=1 ./run_llama2.sh` runs it."""

import ctypes
import os
import re
import shutil
import socket
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from packaging.requirements import Requirement

from grath.common.defaults import LORA_LAYERS, LORA_R
from grath.common.errors import PACKAGE, UserError, first_line
from grath.common.files import check_writable
from grath.common.layout import PROJECT, resolve_local, run_folder
from grath.evaluation.tasks import KNOWN_TASKS, get_task, task_manager
from grath.modeling.chat import prompt_ids, template_for
from grath.modeling.devices import check_devices, describe_device
from grath.modeling.identity import model_identity
from grath.modeling.loading import (
    check_tokenizer,
    check_unquantized,
    check_vocabulary,
    check_weights,
    context_window,
    load_tokenizer,
    resolve_base_and_adapter,
)
from grath.modeling.precision import SERVER
from grath.pairs.prompts import build_messages, load_demos
from grath.pairs.questions import load_questions
from grath.run.settings import read_settings
from grath.serving.served import describe_servers

SECONDS_TO_ANSWER = 5
FOR_TRITON = "which Triton needs for TRL's loss on a GPU"
# Bytes of a pair, of the result files of a task, and of a tokenizer.
PAIR, SCORES, TOKENIZER = 500, 100_000, 4_000_000


def hub_is_reachable():
    """Whether the hub accepts a connection within five seconds, or a proxy is configured."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    hub = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    address = (hub.hostname, hub.port or (80 if hub.scheme == "http" else 443))
    try:
        socket.create_connection(address, timeout=SECONDS_TO_ANSWER).close()
    except OSError:
        return bool(getproxies())
    return True


def check_packages():
    """Compare the packages with the pinned versions; on a GPU, look for a C compiler and Python's headers too."""
    differing = []
    for line in (PROJECT / "requirements.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            raise UserError(f"{requirement.name} is missing: {PACKAGE}") from None
        if found.partition("+")[0] not in requirement.specifier:
            differing.append(f"{requirement.name} is {found}, tested with {str(requirement.specifier).lstrip('=')}")
    if torch.cuda.is_available():
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            raise UserError(f"there is no C compiler, {FOR_TRITON}: install gcc, or set CC")
        header = Path(sysconfig.get_paths()["include"]) / "Python.h"
        if not header.is_file():
            raise UserError(f"there is no {header}, {FOR_TRITON}: install python3-dev")
    return "; ".join(differing) or "as pinned in requirements.txt"


def check_device(num_processes):
    """Describe the driver, the CUDA version of torch, and the compute capability of the GPU side by side."""
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
    found = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(found))
    return found.value


def read_model(name):
    """Read the configuration of a model, whose weights must be here or on the hub: (what to print, configuration).

    A model that is no adapter must have layers that a new one is for.
    """
    from huggingface_hub import get_local_safetensors_metadata, get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import NotASafetensorsRepoError
    from transformers import AutoConfig, AutoModelForCausalLM

    base, adapter = resolve_base_and_adapter(name)
    check_weights(base)
    try:
        folder = Path(base) if Path(base).is_dir() else Path(hf_hub_download(base, "config.json")).parent
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        try:
            get_local_safetensors_metadata(folder)
        except (FileNotFoundError, NotASafetensorsRepoError):  # not downloaded, or not all of them
            get_safetensors_metadata(base)
    except Exception as error:  # the hub client raises many kinds of errors
        reason = first_line(error)
        raise UserError(f"{base}: {reason} (fetch it with prefetch.sh, or log in with `hf auth login`)") from None
    check_unquantized(base, config)
    if adapter:
        model_identity(name)  # that its base is the one that it was trained on
        return base, config.get_text_config()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # the model classes raise many kinds of errors
        raise UserError(f"{config.model_type}: {first_line(error)[:200]}") from None
    if not {name.rpartition(".")[2] for name, _ in model.named_modules()} & {*LORA_LAYERS}:
        raise UserError(f"{config.model_type} has none of the layers that LoRA trains: {', '.join(LORA_LAYERS)}")
    return base, config.get_text_config()


def check_template(values, config):
    """Check that the tokenizer has a chat template that renders the prompts, and fits the model; describe it."""
    name, demos = values["MODEL_NAME_OR_PATH"], load_demos(values["DEMOS"]) if values["USE_FS"] == "1" else []
    tokenizer = load_tokenizer(name)
    template = template_for(tokenizer, values["MODEL_TYPE"])
    turns = build_messages({"question": "What is ice?"}, 0, False, demos)
    prompt = prompt_ids(tokenizer, turns, template)
    check_vocabulary(name, tokenizer, [prompt])
    window, most = context_window(config), int(values["MAX_NEW_TOKENS"])
    if window and len(prompt) + most > window:
        raise UserError(f"a prompt of {len(prompt)} tokens and {most} new ones exceed the context window of {window}")
    if values["TASKS"]:
        check_tokenizer(tokenizer)
    return "the tokenizer's own" if values["MODEL_TYPE"] == "auto" else values["MODEL_TYPE"]


def check_data(values):
    """Check that the questions, the tasks and the data sets of the known ones exist."""
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub import HfApi

    names = [values[name] for name in ("DATA_NAME", "SUBDATA_NAME", "SPLIT", "DATA_PATH")]
    found = len(load_questions(*names))
    if found < int(values["NUM_QUERY"]):
        raise UserError(f"NUM_QUERY={values['NUM_QUERY']}, but there are only {found} questions")
    tasks = values["TASKS"].split()
    if other := [task for task in tasks if task not in KNOWN_TASKS]:
        task_manager(other)
    for name in sorted({get_task(task).dataset for task in tasks} - {None}):
        owner, _, title = name.partition("/")
        cached = Path(HF_DATASETS_CACHE) / f"{owner}___{title.lower()}"
        if Path(resolve_local(name)).is_dir() or cached.is_dir():
            continue
        try:
            HfApi().dataset_info(name, timeout=10)
        except Exception as error:  # the hub client raises many kinds of errors
            raise UserError(f"{name}: {first_line(error)} (fetch it with prefetch.sh and set DATASETS_ROOT)") from None
    return f"{found} questions; tasks: {values['TASKS'] or 'none'}"


def check_disk(config, values):
    """Check that what all iterations write, with a margin of a fifth, fits on the disk; `config` is the model's."""
    run = run_folder(values["RUNS_DIR"], values["RUN_NAME"], values["SEED"]).absolute()
    check_writable(run)
    # LoRA on q, k and v: a float32 matrix on each side of a projection, none wider than the hidden size.
    adapter = 4 * LORA_R * config.num_hidden_layers * 6 * config.hidden_size
    checkpoints = -(-int(values["MAX_STEPS"]) // int(values["SAVE_STEPS"]))
    # A checkpoint contains the adapter, AdamW's two averages, and the tokenizer.
    iteration = 2 * PAIR * int(values["NUM_QUERY"]) + adapter + checkpoints * (3 * adapter + TOKENIZER)
    scores = SCORES * len(values["TASKS"].split())
    need = 1.2 * (int(values["ITERATIONS"]) * (iteration + scores) + scores)
    existing = next(path for path in (run, *run.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < need:
        raise UserError(
            f"{free / 1e9:.1f} GB are free in {existing}, and all iterations write about {need / 1e9:.1f} GB: "
            "set RUNS_DIR to another disk"
        )
    return f"{free / 1e9:.1f} GB free, about {need / 1e6:.0f} MB to write"


def check_run(titles):
    """Check the machine for the run in the environment, print a line for each check, and print the plan.

    Args:
        titles: those of the run's stages, in order.

    Raises:
        UserError: a check failed.
    """
    values = read_settings()
    if not hub_is_reachable():
        os.environ["HF_HUB_OFFLINE"] = "1"
        print("The hub cannot be reached: only models and data sets on this machine count")
    failed = []

    def check(name, function, *arguments):
        try:
            found = function(*arguments)
        except (UserError, TimeoutError) as error:
            failed.append(name)
            print(f"FAIL  {name}: {' '.join(str(error).split())}", flush=True)
            return None
        print(f"ok    {name}: {found if isinstance(found, str) else found[0]}", flush=True)
        return found

    model_name = values["MODEL_NAME_OR_PATH"]
    check("packages", check_packages)
    check("device", check_device, int(values["NUM_PROCESSES"]))
    if values["SERVER_URL"]:
        adapters = int(values["ITERATIONS"]) > 1 or (values["TASKS"] and values["BACKEND"] == SERVER)
        check("servers", describe_servers, model_name, values["SERVER_URL"].split(), SECONDS_TO_ANSWER, adapters)
    model = check("model", read_model, model_name)
    if model:
        check("chat template", check_template, values, model[1])
    check("data", check_data, values)
    if model:
        check("disk", check_disk, model[1], values)
    print(f"The plan: {len(titles)} stages in {run_folder(values['RUNS_DIR'], values['RUN_NAME'], values['SEED'])}:")
    for title in titles:
        print(f"  {title}")
    if failed:
        raise UserError(f"not ready: {', '.join(failed)}; see above")
    print("Ready: run the same command without CHECK=1")
