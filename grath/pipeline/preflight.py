"""Check in seconds what a run needs: packages, GPU, memory, disk, model and data. `CHECK=1 ./run_llama2.sh` runs it."""

import json
import os
import shutil
from pathlib import Path

from grath.common.errors import UserError, first_line
from grath.common.files import check_writable
from grath.common.paths import resolve_local
from grath.evaluation.tasks import get_task
from grath.modeling.loading import check_weights, missing_shards, resolve_base_and_adapter
from grath.modeling.memory import LORA_R, read_shape
from grath.modeling.precision import resolve_precision
from grath.pairs.questions import labeled_split, load_hub_split, load_questions
from grath.pipeline.machine import (
    PLANS,
    check_device,
    check_gpu_memory,
    check_memory,
    check_packages,
    check_template,
    format_size,
    hub_is_reachable,
)
from grath.pipeline.settings import STAGE_OF_PRECISION, run_folder, served_stages
from grath.serving.served import describe_servers

SECONDS_TO_ANSWER = 5
PAIR = 500
SCORES = 100_000


def read_model(name):
    """Read the configuration and size of a model: (what to print, config dict, parameters)."""
    base = resolve_base_and_adapter(name)[0]
    folder = Path(base)
    check_weights(base)
    try:
        if folder.is_dir():
            config, parameters = folder / "config.json", _parameters(folder)
        else:
            from huggingface_hub import get_safetensors_metadata, hf_hub_download

            config = Path(hf_hub_download(base, "config.json"))
            downloaded = not missing_shards(config.parent)[0] and _parameters(config.parent)
            parameters = downloaded or sum(get_safetensors_metadata(base).parameter_count.values())
        text = f"{base}, {parameters / 1e6:,.0f} M parameters"
        return text, json.loads(config.read_text(encoding="utf-8")), parameters
    except Exception as error:  # the hub client raises many kinds
        reason = first_line(error)
        raise UserError(f"{base}: {reason} (fetch it with prefetch.sh, or log in with `hf auth login`)") from None


def _parameters(folder):
    """Count the parameters in a folder's safetensors files, from their headers."""
    from math import prod

    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        total += sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total


def check_data(values):
    """Check that the questions and the data sets of the tasks exist."""
    if values["GOLD_PAIRS"]:
        found = len(load_hub_split(*labeled_split(values["GOLD_PAIRS"])))
        if not found:
            raise UserError(f"GOLD_PAIRS={values['GOLD_PAIRS']} has no row")
    elif values["DATA_PATH"]:
        found = len(load_questions(data_path=values["DATA_PATH"]))
    else:
        found = len(load_hub_split(values["DATA_NAME"], values["SUBDATA_NAME"], values["SPLIT"]))
    if not values["GOLD_PAIRS"] and found < int(values["NUM_QUERY"]):
        raise UserError(f"NUM_QUERY={values['NUM_QUERY']}, but there are only {found} questions")
    for name in sorted({get_task(task).dataset for task in values["TASKS"].split()} - {None}):
        _check_dataset(name)
    return f"{found} questions; tasks: {values['TASKS'] or 'none'}"


def _check_dataset(name):
    if Path(resolve_local(name)).is_dir():
        return
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub import HfApi

    if (Path(HF_DATASETS_CACHE) / name.replace("/", "___").lower()).is_dir():
        return
    try:
        HfApi().dataset_info(name, timeout=10)
    except Exception as error:  # the hub client raises many kinds
        raise UserError(f"{name}: {first_line(error)} (fetch it with prefetch.sh and set DATASETS_ROOT)") from None


def disk_needed(config, values, tokenizer):
    """Estimate the bytes that all iterations write, with a margin of a fifth.

    Args:
        config: dict of the model's config.json.
        values: what `read_settings` returned.
        tokenizer: bytes of the tokenizer's files, which every checkpoint contains.
    """
    config = config.get("text_config", config)
    if not {"hidden_size", "num_hidden_layers"} <= config.keys():
        raise UserError("the model's config.json does not contain its sizes")
    # LoRA on q, k and v: a float32 matrix on each side of a projection, none wider than the hidden size.
    adapter = 4 * LORA_R * config["num_hidden_layers"] * 6 * config["hidden_size"]
    checkpoints = -(-int(values["MAX_STEPS"]) // int(values["SAVE_STEPS"]))
    # A checkpoint contains the adapter and AdamW's two averages.
    iteration = 2 * PAIR * int(values["NUM_QUERY"]) + adapter + checkpoints * (3 * adapter + tokenizer)
    scores = SCORES * len(values["TASKS"].split())
    return 1.2 * (int(values["ITERATIONS"]) * (iteration + scores) + scores)


def check_disk(model, values):
    """Check that the outputs of all iterations fit on the disk.

    Args:
        model: what `read_model` returned.
    """
    run = run_folder(values)
    check_writable(run)
    base = Path(resolve_base_and_adapter(values["MODEL_NAME_OR_PATH"])[0])
    tokenizer = sum(file.stat().st_size for file in base.glob("tokenizer*")) or 4_000_000
    need = disk_needed(model[1], values, tokenizer)
    existing = next(path for path in (run.absolute(), *run.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < need:
        raise UserError(
            f"{format_size(free)} are free in {existing}, and all iterations write about {format_size(need)}: "
            "set RUNS_DIR to another disk"
        )
    return f"{format_size(free)} free, about {format_size(need)} to write"


def check_stages(check, model, values, precisions):
    """Check the memory of each stage on a GPU, or of the widest precision on a CPU.

    Args:
        check: takes the name of a check, a function and its arguments.
        model: what `read_model` returned.
        precisions: the precisions of the stages.
    """
    import torch

    if not torch.cuda.is_available():
        check("memory", check_memory, model[2], precisions, int(values["NUM_PROCESSES"]))
        return
    for stage in PLANS:
        if stage not in _stages_elsewhere(values) and (stage != "scores" or values["TASKS"]):
            check(f"memory, {stage}", lambda stage=stage: check_gpu_memory(stage, read_shape(*model[1:]), values))


def _stages_elsewhere(values):
    """Return the stages that need nothing of this machine: set of str."""
    return served_stages(values) | ({"pairs"} if values["GOLD_PAIRS"] else set())


def check_run(values, stages):
    """Check the machine for a run, print a line for each check, and print the plan.

    Args:
        values: what `read_settings` returned.
        stages: list of [stage, title], in order.

    Raises:
        UserError: a check failed.
    """
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

    processes = int(values["NUM_PROCESSES"])
    here = {name: stage for name, stage in STAGE_OF_PRECISION.items() if stage not in _stages_elsewhere(values)}
    precisions = [resolve_precision(values[name], stage) for name, stage in here.items()]
    check("packages", check_packages, precisions)
    check("device", check_device, processes)
    if values["SERVER_URL"]:
        urls = values["SERVER_URL"].split()
        adapters = bool(values["TASKS"]) or int(values["ITERATIONS"]) > 1
        check("servers", describe_servers, values["MODEL_NAME_OR_PATH"], urls, SECONDS_TO_ANSWER, adapters)
    model = check("model", read_model, values["MODEL_NAME_OR_PATH"])
    if model:
        check("chat template", check_template, values)
        check_stages(check, model, values, precisions)
    check("data", check_data, values)
    if model:
        check("disk", check_disk, model, values)
    print(f"The plan: {len(stages)} stages in {run_folder(values)}:")
    for _, title in stages:
        print(f"  {title}")
    if failed:
        raise UserError(f"not ready: {', '.join(failed)}; see above")
    print("Ready: run the same command without CHECK=1")
