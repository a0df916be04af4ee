"""Score a model with lm-evaluation-harness: all tasks and the sample answers in one process, from one load."""

import contextlib
import gc
import json
import os
import re
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

from grath.common.errors import UserError
from grath.common.files import atomic_write_text, sha256
from grath.common.local_data import load_dataset
from grath.common.paths import ADAPTER, PROJECT
from grath.evaluation.harness import MODEL_NAME, patch_fewshot_sampling, register_shared_context_model
from grath.evaluation.results import (
    QUESTIONS,
    check_numbers,
    is_scored,
    local_dataset_hashes,
    question_scores,
    record_settings,
    split_by_task,
)
from grath.evaluation.samples import SAMPLES, write_samples
from grath.evaluation.tasks import TASKS, get_task
from grath.modeling.chat import template_for
from grath.modeling.devices import check_devices
from grath.modeling.loading import check_model, load_tokenizer, resolve_base_and_adapter, weights_identity
from grath.modeling.precision import DTYPES, SERVER, resolve_precision
from grath.serving.served import serve

NO_SCORE = "is not a task with a score of its own: name its members in TASKS"


def score_model(
    model,
    output,
    tasks,
    precision="auto",
    batch_size=None,
    limit=None,
    backend=MODEL_NAME,
    chat_template=False,
    log_samples=False,
    samples=False,
    model_type="auto",
    dry_run=False,
    processes=None,
    servers=(),
    server_timeout=600,
):
    """Score a model on tasks and write one result file a task; a task that has its file is skipped.

    Args:
        model: hub name, model folder or adapter folder.
        output: folder of the result files.
        tasks: list of task names.
        precision: one of `PRECISIONS`; for the backend `hf`, `auto` or one of `DTYPES`.
        batch_size: maximum number of contexts in a batch (int), the harness's "auto", or None: `hf-shared` counts only
            tokens, and `hf` takes 16. For `server`, the most requests in flight at each server (int).
        limit: questions of each task (int), a share below 1 (float), or None for all.
        backend: `hf-shared`, `hf` for the harness's own model class, or `server` for inference servers.
        chat_template: whether to apply the chat template.
        log_samples: whether to write every question and its log-likelihoods to samples_{task}.jsonl too.
        samples: whether to write the model's own answers to five questions to samples.jsonl too.
        model_type: the chat template, of these questions too.
        dry_run: check the model and print the plan only.
        processes: number of processes; None: as many as the launcher started.
        servers: addresses for the backend `server`, whose precision is the servers'.
        server_timeout: seconds to wait for a server that does not respond.

    Raises:
        UserError: there is no such model, task or chat template, or the folder has scores made with other settings.
    """
    import torch

    if backend != SERVER:
        check_devices(processes)
    processes = processes or int(os.environ.get("WORLD_SIZE", "1"))
    if backend == SERVER:
        _check_server_settings(servers, precision, processes)
    check_model(model, weights=backend != SERVER)
    if backend == "hf" and processes > 1 and not torch.cuda.is_available():
        raise UserError("without a GPU, BACKEND=hf scores every question in every process: set NUM_PROCESSES=1")
    main_process = os.environ.get("RANK", "0") == "0"
    output = Path(output)
    precision = SERVER if backend == SERVER else resolve_precision(precision, "scores")
    if backend == "hf" and precision not in DTYPES:
        raise UserError(f"BACKEND=hf scores in {', '.join(DTYPES)} only, not {precision}: use {MODEL_NAME}")
    missing = [task for task in dict.fromkeys(tasks) if not is_scored(output, task, log_samples)]
    sampled = samples and not (output / SAMPLES).is_file()
    template = template_for(load_tokenizer(model), model_type) if chat_template else None
    if missing or sampled:
        _prepare_harness()
    manager = _task_manager(missing) if missing else None
    if main_process:
        settings = _settings_of(model, precision, tasks)
        template_name = model_type if chat_template and model_type != "auto" else str(int(chat_template))
        settings |= {"limit": str(limit or "none"), "backend": backend, "chat_template": template_name}
        record_settings(output, settings, write=not dry_run)
    # MC1 and MC2 of a data set ask the same, so they are scored together. Every other task is saved on its own.
    groups = {}
    for task in missing:
        groups.setdefault(re.sub(r"_mc[12]$", "", task), []).append(task)
    if main_process:
        for task in tasks:
            if task not in missing:
                print(f"{output / task}.json is up to date")
        for group in groups.values():
            print(f"{model}: {' '.join(group)}, {get_task(group[0]).shots}-shot, {precision}, {backend}", flush=True)
    if dry_run or not (missing or sampled):
        return
    if backend == "hf":
        batch_size = batch_size or 16
    from grath.generation.engines import generate_here, generate_on_servers

    with contextlib.ExitStack() as stack:
        if backend == SERVER:
            from grath.evaluation.server import ServerLM

            served = stack.enter_context(serve(model, servers, server_timeout))
            engine = partial(generate_on_servers, served, model)
            loaded = ServerLM(served, model, batch_size if isinstance(batch_size, int) else None)
            arguments = {"model": served.name, "servers": list(served.urls)}
        else:
            loaded, arguments = _load_harness(model, precision, batch_size, backend)
            engine = partial(generate_here, "shared_prefix", loaded.model, precision)
        if chat_template:
            loaded.tokenizer.chat_template = template
        evaluate = partial(_evaluate, loaded, backend, arguments, batch_size, manager)
        for group in groups.values():
            start = time.monotonic()
            results = evaluate(
                tasks=group,
                num_fewshot=get_task(group[0]).shots,
                limit=limit,
                log_samples=True,
                apply_chat_template=chat_template,
                fewshot_as_multiturn=chat_template,
            )
            if results:  # None in all processes but the first
                results["total_evaluation_time_seconds"] = round(time.monotonic() - start, 1)
                _write_results(output, group, results, log_samples)
        if sampled and main_process:
            write_samples(engine, load_tokenizer(model), model_type, output / SAMPLES)
    # Another model may be next in this process: two do not fit on a GPU.
    del loaded, evaluate, engine
    gc.collect()
    torch.cuda.empty_cache()


def _check_server_settings(servers, precision, processes):
    if not servers:
        raise UserError("BACKEND=server (--backend server) needs SERVER_URL=http://host:port (--server_url)")
    if precision not in ("auto", SERVER):
        raise UserError(f"precision {precision}: with BACKEND=server, the server decides it")
    if processes > 1:
        raise UserError("BACKEND=server scores in one process: set NUM_PROCESSES=1")


def _settings_of(model, precision, tasks):
    """What the scores depend on. A local model is identified by its weights, so that it can be moved or copied."""
    base, adapter = resolve_base_and_adapter(model)
    return {
        "weights_sample": weights_identity(base),
        "adapter": sha256(Path(adapter) / ADAPTER)[:16] if adapter else "none",
        "dtype": DTYPES.get(precision, precision),
        "lm_eval": version("lm-eval"),
        **{name: value[:16] for name, value in local_dataset_hashes(tasks).items()},
    }


def _prepare_harness():
    """Register our model class with the harness, and let it read local data sets by their content."""
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "WARNING")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    import datasets
    import lm_eval.utils

    lm_eval.utils.setup_logging()
    if datasets.load_dataset is not load_dataset:
        datasets.load_dataset = load_dataset
        register_shared_context_model()
        patch_fewshot_sampling()


def _task_manager(tasks):
    """Return the harness's `TaskManager`; raise `UserError` if one of the tasks is not known."""
    import lm_eval.tasks

    # The harness needs 14 seconds to read the files of all its tasks, so it reads those of the known ones only.
    builtin = Path(lm_eval.tasks.__file__).parent
    folders = {str(builtin / TASKS[task].folder) for task in tasks if task in TASKS and TASKS[task].folder}
    manager = lm_eval.tasks.TaskManager(
        include_path=[str(PROJECT / "tasks"), *sorted(folders)], include_defaults=not set(tasks) <= set(TASKS)
    )
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UserError(f"{unknown[0]} is not a task of lm-evaluation-harness: see `lm-eval ls tasks`")
    if tags := [task for task in tasks if task in manager.all_tags]:
        raise UserError(f"{tags[0]} {NO_SCORE}")
    return manager


def _load_harness(model, precision, batch_size, backend):
    """Load the model once; return it as the harness's model, and the arguments that the results record (dict)."""
    import torch
    from lm_eval.api.registry import get_model

    base, adapter = resolve_base_and_adapter(model)
    options = {"pretrained": base} | ({"peft": adapter} if adapter else {})
    if backend == MODEL_NAME:
        options["precision"] = precision
    else:
        options |= {"dtype": DTYPES[precision], "use_safetensors": True}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return get_model(backend).create_from_arg_obj(options, {"batch_size": batch_size, "device": device}), options


def _evaluate(loaded, backend, model_args, batch_size, manager, **arguments):
    """Return the results of the harness's `simple_evaluate`; None in all processes but the first."""
    from lm_eval import simple_evaluate

    results = simple_evaluate(model=loaded, batch_size=batch_size, task_manager=manager, **arguments)
    if results:
        template = loaded.chat_template(True) if arguments["apply_chat_template"] else None
        results["config"] |= {"model": backend, "model_args": model_args}
        results |= {"chat_template": template, "fewshot_as_multiturn": arguments["fewshot_as_multiturn"]}
    return results


def _write_results(output, tasks, results, log_samples):
    from lm_eval.utils import handle_non_serializable

    samples = results.pop("samples", {})
    check_numbers(samples)
    by_task = split_by_task(results)
    for task, rows in samples.items() if log_samples else ():
        lines = [json.dumps(row, default=handle_non_serializable, ensure_ascii=False) + "\n" for row in rows]
        atomic_write_text(output / f"samples_{task}.jsonl", "".join(lines))
    for task in tasks:
        if task not in by_task:  # a group whose scores the harness does not average
            raise UserError(f"{task} {NO_SCORE}")
        by_task[task][QUESTIONS] = question_scores(samples, task, by_task[task])
        text = json.dumps(by_task[task], indent=2, default=handle_non_serializable, ensure_ascii=False)
        atomic_write_text(output / f"{task}.json", text + "\n")
