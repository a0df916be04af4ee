"""lm-evaluation-harness with a model class that computes every context once.

    python -m grath.harness run --model hf-shared --model_args pretrained=MODEL --tasks truthfulqa_mc1 ...
    python -m grath.harness describe [--precision auto] [--output FOLDER ...] MODEL_OR_ADAPTER
    python -m grath.harness split RESULTS FOLDER

The first is the harness's own command line; `--model hf` next to it is its own way. The second prints the harness's
`--model_args` as JSON, which holds any folder's name, and refuses a FOLDER that has scores of something else, or keeps
what its scores depend on in FOLDER/settings.txt. The third makes one result file a task in FOLDER out of a file of
several tasks.
"""

import errno
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

from grath.cli import Parser, UserError, check_writable, positive_int, run, write_whole
from grath.devices import check_devices
from grath.local_data import load_dataset
from grath.models import ADAPTER, DTYPES, check_model, hash_of, resolve_precision, sha256, split_adapter, weight_files
from grath.scores import local_sets

NAME = "hf-shared"
# Tokens from which on a common beginning of contexts, or a lone context, is worth a forward pass of its own.
SHORTEST_PREFIX = 32
LONG_CONTEXT = 256


def model_args(name, precision):
    """The harness's model arguments for a model, or for a LoRA adapter on its base."""
    base, adapter = split_adapter(name)
    precision = resolve_precision(precision, "scores")
    args = {"pretrained": base, "dtype": DTYPES[precision], "use_safetensors": True}
    return {**args, "peft": adapter} if adapter else args


def register():
    """Make `--model hf-shared` known to the harness, and return its class."""
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

    @register_model(NAME)
    class SharedContextLM(HFLM):
        """`HFLM` that computes what requests have in common once: equal requests, contexts, and their beginnings."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if self.world_size == 1 and hasattr(self, "accelerator"):
                # On CPUs `HFLM` lets every process score everything.
                self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

        def _create_model(self, pretrained, peft=None, **options):
            super()._create_model(pretrained, **options)
            if peft:
                from peft import PeftModel

                # With no device named, PEFT opens a context on the first GPU in every process.
                self._model = PeftModel.from_pretrained(self._model, peft, torch_device=str(self.device))

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
            from tqdm import tqdm

            windows = [_window(context, answer, self.max_length) for _, context, answer in requests]
            reason = self._cannot_share(max((len(c) + len(a) for c, a in windows), default=0))
            if not all(context and answer for context, answer in windows):
                reason = "an answer is empty or longer than the model's window"
            if reason or not requests:
                if reason and self.rank == 0 and not disable_tqdm:
                    print(f"{NAME} scores like hf: {reason}", file=sys.stderr)
                return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            batch_size = override_bs or (self.batch_size if isinstance(self.batch_size, int) else 16)
            bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Scoring requests")
            results = [None] * len(requests)
            with bar:
                for places, result in score_windows(self.model, windows, batch_size):
                    for place in places:
                        results[place] = result
                        if requests[place][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[place][0], result)
                    bar.update(len(places))
            return results

        def _cannot_share(self, length):
            from grath.shared_prefix import unsupported

            if self.backend != "causal":
                return "it is no decoder-only model"
            if self.softmax_dtype or self.mixed_precision_dtype:
                return "softmax_dtype and mixed_precision_dtype are left to it"
            if len(set((getattr(self.model, "hf_device_map", None) or {"": 0}).values())) > 1:
                return "it is spread over several devices"
            if any(config.is_prompt_learning for config in getattr(self.model, "peft_config", {}).values()):
                return "its adapter adds virtual tokens"
            return unsupported(self.model, length)

    return SharedContextLM


def build_alike():
    """Let every process draw the few-shot examples of all questions in order, and then keep its own questions.

    The harness draws in each process for its own questions only, so that with other numbers of processes a question
    gets other examples, and another score.
    """
    from lm_eval.api.task import Task

    build = Task.build_all_requests

    def build_own(task, *args, rank=0, world_size=1, **kwargs):
        build(task, *args, **kwargs)
        task._instances = [request for request in task._instances if request.doc_id % world_size == rank]
        if not task._instances:
            raise UserError(f"there are fewer questions than processes ({world_size}): lower NUM_PROCESSES")

    Task.build_all_requests = build_own


def _window(context, answer, max_length):
    """What of a request fits the model, cut from the left as in `HFLM`: (context, answer), tuples of ids."""
    kept = (context + answer)[-(max_length + 1) :]
    return tuple(kept[: -len(answer)]), tuple(answer)


def score_windows(model, windows, batch_size):
    """Scores of (context, answer) requests, tuples of token ids.

    Yields:
        (the places of equal requests in `windows`, (log-probability, whether greedy decoding gives the answer)).
    """
    from grath.shared_prefix import score

    contexts = {}
    for place, (context, answer) in enumerate(windows):
        contexts.setdefault(context, {}).setdefault(answer, []).append(place)
    for length, members in group_by_prefix(list(contexts)):
        trees = [(context[length:], list(contexts[context])) for context in members]
        for i, found in score(model, list(members[0][:length]), trees, batch_size):
            yield from zip(contexts[members[i]].values(), found, strict=True)


def group_by_prefix(contexts):
    """Group contexts so that each group computes what all of it begins with once.

    Args:
        contexts: list of different tuples of token ids, none empty.

    Returns:
        list of (tokens that the group's contexts begin with, list of contexts); at least one token of each is left.
    """
    from grath.shared_prefix import common_prefix

    groups = []
    for context in sorted(contexts):
        if groups:
            length, members = groups[-1]
            common = min(length, common_prefix([members[-1], context]))
            # A shorter prefix for one context more must not cost more than it saves.
            if common >= SHORTEST_PREFIX and common * len(members) >= length * (len(members) - 1):
                groups[-1] = (common, [*members, context])
                continue
        groups.append((len(context) - 1, [context]))
    lone = [members[0] for _, members in groups if len(members) == 1 and len(members[0]) < LONG_CONTEXT]
    groups = [group for group in groups if len(group[1]) > 1 or len(group[1][0]) >= LONG_CONTEXT]
    return [*groups, (0, lone)] if lone else groups


def describe(arguments):
    """Print the model's arguments; compare what the scores in a folder depend on, and keep it there."""
    import torch

    parser = Parser(__doc__)
    add = parser.add_argument
    add("model", help="hub name, model folder or LoRA adapter's folder")
    add("--precision", choices=("auto", *DTYPES), default="auto", help="auto: fp16 on a GPU, fp32 on a CPU")
    add("--num_processes", type=positive_int, default=1, help="processes, one a GPU")
    add("--output", type=Path, help="folder of the scores")
    add("--tasks", default="", help="what is scored, separated by blanks")
    add("--limit", default="", help="questions a task")
    add("--backend", default=NAME, help="the model class")
    add("--chat_template", default="0", help="1: inside the chat tags")
    args = parser.parse_args(arguments)
    check_devices(args.num_processes)
    if args.backend == "hf" and args.num_processes > 1 and not torch.cuda.is_available():
        raise UserError("on a CPU BACKEND=hf scores everything in every process: set NUM_PROCESSES=1")
    check_model(args.model)
    options = model_args(args.model, args.precision)
    if args.output:
        # A local model is known by its weight files, not by its place, so that it can be moved.
        base, adapter = split_adapter(args.model)
        settings = {
            "weights": hash_of(weight_files(base))[:16] if Path(base).is_dir() else base,
            "adapter": sha256(Path(adapter) / ADAPTER)[:16] if adapter else "none",
            "dtype": options["dtype"],
            "lm_eval": version("lm-eval"),
            "limit": args.limit or "none",
            "backend": args.backend,
            "chat_template": args.chat_template,
        }
        settings |= {name: value[:16] for name, value in local_sets(args.tasks.split()).items()}
        keep_settings(args.output, settings)
    print(json.dumps(options))


def keep_settings(folder, settings):
    """Write what the scores of a folder depend on, a dict of str, as NAME=VALUE lines to its settings.txt.

    Raises:
        UserError: the folder has scores, and one of the settings was another one. What only one of the two names, as
            the data of a task that is scored later, is added.
    """
    file = folder / "settings.txt"
    text = file.read_text(encoding="utf-8") if file.is_file() and any(folder.glob("*.json")) else ""
    before = dict(part.split("=", 1) for part in text.split() if "=" in part)
    for name, value in settings.items():
        if before.get(name, value) != value:
            raise UserError(
                f"{folder} holds scores with {name}={before[name]}, not {value}: choose another folder, or remove it"
            )
    now = "".join(f"{name}={value}\n" for name, value in (before | settings).items())
    if now != text:
        check_writable(folder)
        write_whole(file, now)


def split(arguments):
    """Write the results of each task, or group of tasks, of a result file to a file of its own."""
    parser = Parser(__doc__)
    parser.add_argument("results", type=Path, help="a result file of the harness")
    parser.add_argument("folder", type=Path, help="where the files go")
    args = parser.parse_args(arguments)
    try:
        content = json.loads(args.results.read_text(encoding="utf-8"))
    except ValueError:  # the harness only logs that it could not write
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {args.results} is cut off") from None
    members = {task for tasks in content.get("group_subtasks", {}).values() for task in tasks}
    for task in content["results"]:
        if task in members:
            continue
        own = {task, *_members(task, content.get("group_subtasks", {}))}
        alone = {
            key: {name: entry for name, entry in value.items() if name in own} if _by_task(value, content) else value
            for key, value in content.items()
        }
        write_whole(args.folder / f"{task}.json", json.dumps(alone, indent=2) + "\n")


def _members(task, groups):
    return [name for member in groups.get(task, ()) for name in (member, *_members(member, groups))]


def _by_task(value, content):
    return isinstance(value, dict) and bool(value) and set(value) <= set(content["results"]) | set(content["versions"])


def main():
    own = {"describe": describe, "split": split}
    if sys.argv[1:] and sys.argv[1] in own:
        own[sys.argv[1]](sys.argv[2:])
        return
    import datasets
    from lm_eval.__main__ import cli_evaluate

    datasets.load_dataset = load_dataset
    register()
    build_alike()
    cli_evaluate()


if __name__ == "__main__":
    run(main)
