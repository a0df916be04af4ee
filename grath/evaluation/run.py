"""Score a model with lm-evaluation-harness: all tasks and the sample answers in one process, from one load."""

import os
import re
import time
import traceback
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

from grath.common.errors import UserError, first_line
from grath.common.files import check_writable, file_hash, hash_of, sha256
from grath.common.layout import SAMPLES, SCORES_RECORD, resolve_local
from grath.common.local_data import OPENED, content_hash
from grath.common.record import add_warnings, check_files, check_inputs, read_record, recording, write_record
from grath.evaluation.results import EDITED, read_scores, samples_file, write_results
from grath.evaluation.samples import BUNDLED, MAX_NEW_TOKENS, ask_samples, write_samples
from grath.evaluation.tasks import KNOWN_TASKS, get_task, own_files, task_manager
from grath.modeling.chat import render, template_for
from grath.modeling.devices import check_shared, init_distributed, print_once
from grath.modeling.identity import model_identity
from grath.modeling.loading import check_model, check_tokenizer, load_tokenizer
from grath.modeling.precision import SERVER, resolve_precision
from grath.serving.client import server_urls
from grath.serving.served import serve

BACKENDS = ("hf-shared", "hf", SERVER)
ADVICE = "choose another folder, or remove it"


def score_model(args):
    """Score a model on tasks and write one result file per task; what the folder's record names is not scored again.

    `args` are the flags of `python -m grath.evaluation`.

    Raises:
        UserError: there is no such model, task or chat template, or the folder contains scores that were made with
            other settings, or edited.
    """
    start = time.monotonic()
    _check_settings(args)
    main_process, path = os.environ.get("RANK", "0") == "0", args.output / SCORES_RECORD
    tasks, record = list(dict.fromkeys(args.tasks)), read_record(path) or {}
    files = _finished_files(args.output, record, tasks)
    missing = [
        task for task in tasks if f"{task}.json" not in files or args.log_samples and samples_file(task) not in files
    ]
    sampled, precision = args.samples and SAMPLES not in files, args.precision
    asked = None
    if missing or sampled:
        precision = SERVER if args.backend == SERVER else resolve_precision(precision, "scores")
        check_model(args.model, weights=args.backend != SERVER)
        tokenizer = load_tokenizer(args.model)
        check_tokenizer(tokenizer)
        try:
            template = template_for(tokenizer, args.model_type) if args.chat_template or sampled else None
            asked = ask_samples(args.model, tokenizer, template) if sampled else None
        except UserError as error:
            if args.chat_template:
                raise
            if main_process:
                print(f"no sample answers: {error}")
        manager = task_manager(missing)
    elif precision == "auto":  # the recorded precision: resolving it would need torch, which loads slowly
        precision = record["inputs"].get("precision")
    earlier = record["inputs"] if files else None
    if earlier and SAMPLES not in files:
        earlier = earlier | {"samples": False}
    inputs = _inputs(args, tasks, precision, earlier)
    check_shared(tuple(files), args.output)
    if not (missing or asked):
        if main_process:
            print(f"{args.output} is up to date ({' '.join(tasks)}); next: python -m grath.report {args.output}")
        return
    # MC1 and MC2 of a data set ask the same questions, so they are scored together. Other tasks are saved on their own.
    groups = {}
    for task in missing:
        groups.setdefault(re.sub(r"_mc[12]$", "", task), []).append(task)
    if main_process:
        for task in [task for task in tasks if task not in missing]:
            print(f"{args.output / task}.json is up to date")
        how = f"{precision}, {args.backend}{', chat template' if args.chat_template else ''}"
        for group in groups.values():
            print(f"{args.model}: {' '.join(group)}, {get_task(group[0]).shots}-shot, {how}", flush=True)
    if args.dry_run:
        return
    check_writable(args.output)
    # All processes decide by the same record: the first one writes it when all have read it.
    init_distributed().wait_for_everyone()
    content = {"model": args.model, "files": files}
    with (
        _loaded(args, precision, tokenizer) as (lm, generator),
        recording(path, inputs, record if files else None, record, main_process, start, **content) as record,
    ):
        add_warnings(record, getattr(lm.model, "load_warnings", []))
        if args.chat_template:
            lm.tokenizer.chat_template = template
            lm.apply_chat_template = partial(_apply_chat_template, lm.tokenizer)

        def finish(names):
            inputs["data"] |= OPENED
            record["files"] |= {name: sha256(args.output / name) for name in names}
            write_record(path, record)

        for group in groups.values():
            results = _evaluate(args, precision, lm, group, manager)
            if main_process:
                finish(write_results(args.output, group, results, args.log_samples))
        if asked and main_process:
            write_samples(generator, *asked, args.output / SAMPLES)
            finish([SAMPLES])
        record["batch_tokens"] = getattr(lm, "batch_tokens", None)
    if main_process:
        for task, score in read_scores(args.output).items():
            if task in tasks:
                error = "" if score["stderr"] is None else f" ± {score['stderr']:.2f}"
                print(f"{task:<16}{score['score']:6.2f}{error} (version {score['version']})")
        print(f"Wrote the results to {args.output}; next: python -m grath.report {args.output}", flush=True)


def _apply_chat_template(tokenizer, messages, add_generation_prompt=True):
    options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
    try:
        return render(tokenizer, messages, tokenizer.chat_template, **options)
    except UserError:
        others = [turn for turn in messages if turn["role"] != "system"]
        if others == messages:
            raise
        return render(tokenizer, others, tokenizer.chat_template, **options)  # as the harness does


def _check_settings(args):
    if args.backend != SERVER:
        if args.servers:
            raise UserError("--server_url needs --backend server")
        return
    if not args.servers:
        raise UserError("BACKEND=server (--backend server) needs SERVER_URL=http://host:port (--server_url)")
    server_urls(args.servers)
    if args.precision != "auto":
        raise UserError(f"precision {args.precision}: with BACKEND=server, the server decides it")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("BACKEND=server scores in one process: set NUM_PROCESSES=1")


def _finished_files(folder, record, tasks):
    """Return the recorded files that are there: name -> SHA-256. Raise `UserError` for an edited or unrecorded one."""
    if not record and (unknown := [task for task in tasks if (folder / f"{task}.json").exists()]):
        raise UserError(f"{folder / unknown[0]}.json has no {SCORES_RECORD} next to it: {ADVICE}")
    check_files(record, folder, EDITED)
    return {name: digest for name, digest in record.get("files", {}).items() if (folder / name).is_file()}


def _inputs(args, tasks, precision, earlier):
    """What the scores depend on. A local model is identified by its content, so that it can be moved or copied.

    Args:
        earlier: the inputs of the finished files, or None.

    Raises:
        UserError: the earlier ones differ. Only data sets and templates of sample answers that both have are compared;
            those of all are returned.
    """
    before, known = (earlier or {}).get("data", {}), [get_task(task) for task in tasks]
    names = {task.dataset for task in known} - {None}
    if any(task.name not in KNOWN_TASKS for task in known):
        names |= before.keys()  # which include theirs
    paths = {name: Path(resolve_local(name)) for name in sorted(names)}
    data = {name: content_hash(path) for name, path in paths.items() if path.is_dir()}
    data |= {name: file_hash(path) for name, path in paths.items() if path.is_file()}
    if any(task.name in KNOWN_TASKS and not task.dataset for task in known):
        data[BUNDLED.name] = file_hash(BUNDLED)
    data |= {f"task {task}": hash_of(map(file_hash, sorted({*files}))) for task in tasks if (files := own_files(task))}
    inputs = {
        "model": model_identity(args.model),
        "precision": precision,
        "lm_eval": version("lm-eval"),
        "limit": args.limit,
        "backend": args.backend,
        "chat_template": args.chat_template and args.model_type,
        "samples": args.samples and args.model_type,
        "data": data,
    }
    if earlier:
        inputs["data"] = before | data
        inputs["samples"] = inputs["samples"] or earlier.get("samples", False)
        made = {"data": data | before, "samples": earlier.get("samples") or inputs["samples"]}
        check_inputs({"inputs": earlier | made}, inputs, args.output, ADVICE)
    return inputs


@contextmanager
def _loaded(args, precision, tokenizer):
    """Load the model, or find it on servers; yield it as the harness's model, and as a generator."""
    from grath.generation.select import LocalGenerator, ServerGenerator

    if args.backend != SERVER:
        from grath.evaluation.harness import load_local

        lm = load_local(args.backend, args.model, precision, args.batch_size)
        yield lm, LocalGenerator(lm.model, tokenizer, MAX_NEW_TOKENS)
        return
    from grath.evaluation.server import ServerLM

    with serve(args.model, args.servers, args.server_timeout) as served:
        lm = ServerLM(served, args.model, args.batch_size if isinstance(args.batch_size, int) else None)
        yield lm, ServerGenerator(served, args.model, tokenizer, MAX_NEW_TOKENS)


def _evaluate(args, precision, lm, tasks, manager):
    """Return the results of the harness's `simple_evaluate`; None in all processes of a machine but the first."""
    from accelerate.utils import gather_object
    from lm_eval import simple_evaluate

    lm.truncated = 0
    options = {"batch_size": args.batch_size, "limit": args.limit, "task_manager": manager}
    chat = {"apply_chat_template": args.chat_template, "fewshot_as_multiturn": args.chat_template}
    try:
        results = simple_evaluate(lm, tasks=tasks, num_fewshot=get_task(tasks[0]).shots, **options, **chat)
    except (AssertionError, ValueError, ArithmeticError, NotImplementedError) as error:
        if "lm_eval" not in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parts:
            raise
        raise UserError(f"{' '.join(tasks)}: the harness cannot score this: {first_line(error)[:300]}") from error
    if truncated := sum(gather_object([lm.truncated])):
        cut = f"{truncated} contexts exceed the model's window, and are cut on the left"
        print_once(f"Warning: {' '.join(tasks)}: {cut}")
    if results:
        results["truncated"] = truncated
        results["config"] |= {"model": args.backend, "model_args": {"pretrained": args.model, "precision": precision}}
        results["chat_template"] = lm.chat_template(True) if args.chat_template else None
    return results
