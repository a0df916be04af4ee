"""Score a model with lm-evaluation-harness: all tasks and the sample answers in one process, from one load."""

import contextlib
import os
import re
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from grath.common.defaults import SERVER_TIMEOUT
from grath.common.errors import UserError
from grath.common.files import check_writable, sha256
from grath.common.layout import PROJECT, SAMPLES, SCORES_RECORD, resolve_local
from grath.common.local_data import content_hash, load_dataset
from grath.common.record import check_inputs, read_record, recording, write_record
from grath.evaluation.results import EDITED, NO_SCORE, is_scored, read_scores, write_results
from grath.evaluation.samples import MAX_NEW_TOKENS, write_samples
from grath.evaluation.tasks import KNOWN_TASKS, get_task
from grath.modeling.chat import template_for
from grath.modeling.devices import init_distributed
from grath.modeling.identity import model_identity
from grath.modeling.loading import check_model, load_tokenizer
from grath.modeling.precision import DTYPES, SERVER, resolve_precision
from grath.serving.client import server_urls
from grath.serving.served import serve

BACKENDS = ("hf-shared", "hf", SERVER)
ADVICE = "choose another folder, or remove it"


@dataclass(frozen=True)
class ScoreConfig:
    """What to score, and how: the flags of `python -m grath.evaluation`, which says what they mean."""

    model: str
    output: Path
    tasks: tuple
    precision: str = "auto"
    batch_size: int | str | None = None
    limit: int | float | None = None
    backend: str = "hf-shared"
    chat_template: bool = False
    log_samples: bool = False
    samples: bool = False
    model_type: str = "auto"
    servers: tuple = ()
    server_timeout: int = SERVER_TIMEOUT
    dry_run: bool = False


def score_model(config):
    """Score a model on tasks and write one result file a task; what the folder's record names is not scored again.

    Args:
        config: `ScoreConfig`.

    Raises:
        UserError: there is no such model, task or chat template, or the folder contains scores that were made with
            other settings, or edited.
    """
    _check_settings(config)
    main_process, path = os.environ.get("RANK", "0") == "0", config.output / SCORES_RECORD
    record, tasks = read_record(path), list(dict.fromkeys(config.tasks))
    files = _finished_files(config.output, record)
    missing = [task for task in tasks if not is_scored(config.output, task, config.log_samples, files)]
    sampled = config.samples and SAMPLES not in files
    # Without torch, to say quickly that all is done, `auto` is what it was.
    precision = record["inputs"].get("precision") if files and config.precision == "auto" else config.precision
    if missing or sampled:
        precision = SERVER if config.backend == SERVER else resolve_precision(config.precision, "scores")
        check_model(config.model, weights=config.backend != SERVER)
        tokenizer = load_tokenizer(config.model)
        template = _template(config, tokenizer)
        sampled = sampled and template is not None
        manager = _task_manager(missing)
    inputs = _inputs(config, tasks, precision)
    if files:
        inputs = _check_inputs(record, inputs, config.output)
    elif unknown := [task for task in tasks if not record and (config.output / f"{task}.json").exists()]:
        raise UserError(f"{config.output / unknown[0]}.json has no {SCORES_RECORD} beside it: {ADVICE}")
    if not (missing or sampled):
        if main_process:
            print(f"{config.output} is up to date ({' '.join(tasks)}); next: python -m grath.report {config.output}")
        return
    # MC1 and MC2 of a data set ask the same, so they are scored together. Every other task is saved on its own.
    groups = {}
    for task in missing:
        groups.setdefault(re.sub(r"_mc[12]$", "", task), []).append(task)
    if main_process:
        for task in [task for task in tasks if task not in missing]:
            print(f"{config.output / task}.json is up to date")
        how = f"{precision}, {config.backend}{', chat template' if config.chat_template else ''}"
        for group in groups.values():
            print(f"{config.model}: {' '.join(group)}, {get_task(group[0]).shots}-shot, {how}", flush=True)
    if config.dry_run:
        return
    check_writable(config.output)
    # All processes decide by the same record: the first one writes it when all have read it.
    init_distributed().wait_for_everyone()
    content = {"model": config.model, "files": files}
    with recording(path, inputs, record, main_process, **content) as record, contextlib.ExitStack() as stack:
        lm, generator = _load(config, precision, tokenizer, stack)
        if config.chat_template:
            lm.tokenizer.chat_template = template

        def finish(names):
            record["files"] |= {name: sha256(config.output / name) for name in names}
            write_record(path, record)

        for group in groups.values():
            results = _evaluate(config, precision, lm, group, manager)
            if main_process:
                finish(write_results(config.output, group, results, config.log_samples))
        if sampled and main_process:
            write_samples(generator, tokenizer, template, config.output / SAMPLES)
            finish([SAMPLES])
        record["batch_tokens"] = getattr(lm, "batch_tokens", None)
    if main_process:
        for task, score in read_scores(config.output).items():
            if task in tasks:
                error = "" if score["stderr"] is None else f" ± {score['stderr']:.2f}"
                print(f"{task:<16}{score['score']:6.2f}{error} (version {score['version']})")
        print(f"Wrote the results to {config.output}; next: python -m grath.report {config.output}", flush=True)


def _check_settings(config):
    if not config.model:
        raise UserError("the model's name is empty; usage: ./evaluation.sh MODEL_OR_ADAPTER [OUTPUT_DIR]")
    if not config.tasks:
        raise UserError("TASKS names no task (--tasks)")
    if config.backend == "hf" and config.precision not in ("auto", *DTYPES):
        raise UserError(f"BACKEND=hf scores in {', '.join(DTYPES)} only, not {config.precision}: use hf-shared")
    if config.backend != SERVER:
        if config.servers:
            raise UserError("--server_url needs --backend server")
        return
    if not config.servers:
        raise UserError("BACKEND=server (--backend server) needs SERVER_URL=http://host:port (--server_url)")
    server_urls(config.servers)
    if config.precision != "auto":
        raise UserError(f"precision {config.precision}: with BACKEND=server, the server decides it")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("BACKEND=server scores in one process: set NUM_PROCESSES=1")


def _finished_files(folder, record):
    """Return the recorded result files that are there: name -> SHA-256. Raise `UserError` if one was edited."""
    recorded = (record or {}).get("files", {})
    files = {name: digest for name, digest in recorded.items() if (folder / name).is_file()}
    if edited := [name for name, digest in files.items() if sha256(folder / name) != digest]:
        raise UserError(f"{folder / edited[0]} {EDITED}")
    return files


def _inputs(config, tasks, precision):
    """What the scores depend on. A local model is identified by its content, so that it can be moved or copied."""
    names = {get_task(task).dataset for task in tasks} - {None}
    folders = {name: resolve_local(name) for name in sorted(names)}
    return {
        "model": model_identity(config.model),
        "precision": precision,
        "lm_eval": version("lm-eval"),
        "limit": config.limit,
        "backend": config.backend,
        "chat_template": config.chat_template and config.model_type,
        "data": {name: content_hash(folder) for name, folder in folders.items() if Path(folder).is_dir()},
    }


def _check_inputs(record, inputs, output):
    """Raise `UserError` if a record has other inputs, of the data sets only those of both; return them with all."""
    before, now = record["inputs"].get("data", {}), inputs["data"]
    data = {name: before.get(name, now.get(name)) for name in now}
    check_inputs({"inputs": record["inputs"] | {"data": data}}, inputs, output, ADVICE)
    return inputs | {"data": before | now}


def _template(config, tokenizer):
    """Return the chat template of the model; None, with a message, if only the sample answers would need it."""
    try:
        return template_for(tokenizer, config.model_type)
    except UserError as error:
        if config.chat_template:
            raise
        if config.samples:
            print(f"no sample answers: {error}", file=sys.stderr)
        return None


def _task_manager(tasks):
    """Prepare the harness; return its `TaskManager`. Raise `UserError` if one of the tasks is not known."""
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "WARNING")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    import datasets
    import lm_eval.tasks
    import lm_eval.utils

    lm_eval.utils.setup_logging()
    datasets.load_dataset = load_dataset
    # The harness needs 14 seconds to read the files of all its tasks, so it reads those of the known ones only.
    builtin = Path(lm_eval.tasks.__file__).parent
    folders = {str(builtin / KNOWN_TASKS[task].folder) for task in KNOWN_TASKS.keys() & tasks if get_task(task).folder}
    manager = lm_eval.tasks.TaskManager(
        include_path=[str(PROJECT / "tasks"), *sorted(folders)], include_defaults=not set(tasks) <= set(KNOWN_TASKS)
    )
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UserError(f"{unknown[0]} is not a task of lm-evaluation-harness: see `lm-eval ls tasks`")
    if tags := [task for task in tasks if task in manager.all_tags]:
        raise UserError(f"{tags[0]} {NO_SCORE}")
    return manager


def _load(config, precision, tokenizer, stack):
    """Load the model, or find it on servers; return it as the harness's model, and as a generator.

    Args:
        stack: `ExitStack` that leaves the servers.
    """
    from grath.generation.select import LocalGenerator, ServerGenerator

    if config.backend == SERVER:
        from grath.evaluation.server import ServerLM

        served = stack.enter_context(serve(config.model, config.servers, config.server_timeout))
        lm = ServerLM(served, config.model, config.batch_size if isinstance(config.batch_size, int) else None)
        return lm, ServerGenerator(served, config.model, tokenizer, MAX_NEW_TOKENS)
    from grath.evaluation.harness import load_local

    lm = load_local(config.backend, config.model, precision, config.batch_size)
    return lm, LocalGenerator(lm.model, tokenizer, MAX_NEW_TOKENS)


def _evaluate(config, precision, lm, tasks, manager):
    """Return the results of the harness's `simple_evaluate`; None in all processes of a machine but the first."""
    from lm_eval import simple_evaluate

    results = simple_evaluate(
        lm,
        tasks=tasks,
        num_fewshot=get_task(tasks[0]).shots,
        batch_size=config.batch_size,
        limit=config.limit,
        log_samples=True,
        task_manager=manager,
        apply_chat_template=config.chat_template,
        fewshot_as_multiturn=config.chat_template,
    )
    if results:
        model_args = {"pretrained": config.model, "precision": precision}
        results["config"] |= {"model": config.backend, "model_args": model_args}
        results["chat_template"] = lm.chat_template(True) if config.chat_template else None
    return results
