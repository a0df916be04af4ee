"""The settings of the loop: one entry for each environment variable; their lines for the shell, and their page."""

import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from grath.common import defaults, layout
from grath.common.arguments import batch_size, limit, matching
from grath.common.errors import UserError, first_line
from grath.modeling.chat import MODEL_TYPES
from grath.modeling.devices import check_devices, describe_device
from grath.modeling.precision import PRECISIONS, SERVER, resolve_precision
from grath.pairs.prompts import demos_file
from grath.serving.client import server_urls


def one_of(*choices):
    """Return a check that accepts one of `choices`."""
    return matching("|".join(choices), f"one of {', '.join(choices)}")


COUNT = matching("[1-9][0-9]{0,8}", "a whole number of at least 1")
NATURAL = matching("0|[1-9][0-9]{0,8}", "a whole number")
FLAG = matching("[01]", "0 or 1")
POSITIVE = matching(r"(?=[0-9.]*[1-9])[0-9]*\.?[0-9]*([eE][-+]?[0-9]{1,2})?", "a number greater than 0")


@dataclass(frozen=True)
class Setting:
    """One setting, an environment variable."""

    name: str
    default: str | float | None  # if it is not set or empty; None if it must be set
    check: Callable[[str], object]  # raises `ArgumentTypeError` or `UserError` for a value that is not valid
    stage: str | None  # the first stage that compares it with its record
    help: str  # a line of docs/configuration.md
    paper: str = ""  # the paper's value, if it has one


GROUPS = {
    "Model and run": [
        Setting("MODEL_NAME_OR_PATH", None, matching("(?s).+", "set; the presets run_*.sh set it"), "every stage",
                "required (the presets set it): hub name or folder of a model or an adapter",
                "Llama-2-7b-chat-hf, zephyr-7b-beta"),
        Setting("MODEL_TYPE", "auto", one_of(*MODEL_TYPES), "pairs",
                "chat template: `auto` is the tokenizer's own; `llama2`, `zephyr` and `smollm2` are built in; a preset "
                "sets its own for its model"),
        Setting("RUN_NAME", "grath", matching("[^/]{1,150}", "a plain, short name (use RUNS_DIR for the folder)"), None,
                "the run is saved in `RUNS_DIR/{RUN_NAME}_seed_{SEED}`"),
        Setting("RUNS_DIR", "runs", str, None, "folder of all runs"),
        Setting("SEED", "0", NATURAL, "pairs",
                "seed of DPO, and with `USE_GT=1` of the candidates; scores do not depend on it", "0"),
        Setting("ITERATIONS", "2", matching("[1-9][0-9]{0,2}", "a whole number from 1 to 999"), None,
                "iterations of pairs, combine and DPO", "2 rolling, 10 fixed"),
        Setting("REFERENCE", "rolling", one_of("rolling", "fixed"), "dpo",
                "reference model of DPO: the iteration's starting model (`rolling`) or the base (`fixed`)",
                "rolling; fixed against overfitting"),
        Setting("NUM_PROCESSES", "1", COUNT, None, "processes, one for each GPU, in every stage", "1"),
    ],
    "Pairs": [
        Setting("NUM_QUERY", None, COUNT, "pairs", "required (the presets set it): number of questions to ask", "1119"),
        Setting("DATA_NAME", defaults.DATA_NAME, str, "pairs", "hub data set of the questions, in the ARC schema",
                "allenai/ai2_arc"),
        Setting("SUBDATA_NAME", defaults.SUBDATA_NAME, str, "pairs", "its configuration", "ARC-Challenge"),
        Setting("SPLIT", defaults.SPLIT, str, "pairs", "its split", "train"),
        Setting("DATA_PATH", "", str, "pairs", "local JSON-lines file of questions, instead of `DATA_NAME`"),
        Setting("USE_FS", "1", FLAG, "pairs", "1: few-shot examples in the prompt", "1"),
        Setting("USE_GT", "0", FLAG, "pairs", "1: ground-truth candidates in the prompt", "0"),
        Setting("DEMOS", defaults.DEMOS, str, "pairs",
                "few-shot examples: `truthfulqa`, `halueval`, `misconceptions` or a JSON file", "TruthfulQA's"),
        Setting("MAX_NEW_TOKENS", defaults.MAX_NEW_TOKENS, COUNT, "pairs", "maximum tokens of a response", "100"),
        Setting("PAIRS_BATCH_SIZE", "", COUNT, None,
                "questions at once; empty: 256 on a GPU, halved while they do not fit in its memory; 64 on a CPU, or "
                "for models that the engine does not take; 512 at each server. In int8, responses depend on it", "1"),
        Setting("PAIRS_PRECISION", "auto", one_of(*PRECISIONS), "pairs",
                "precision of generation; `auto`: int8 on a GPU, bf16 on a CPU", "int8"),
    ],
    "DPO": [
        Setting("MAX_STEPS", defaults.MAX_STEPS, COUNT, "dpo", "optimizer steps per iteration",
                "1000 (Zephyr rolling: 500)"),
        Setting("WARMUP_STEPS", defaults.WARMUP_STEPS, NATURAL, "dpo", "warm-up steps of the cosine schedule", "100"),
        Setting("LEARNING_RATE", defaults.LEARNING_RATE, POSITIVE, "dpo", "peak learning rate", "5e-4"),
        Setting("BETA", defaults.BETA, POSITIVE, "dpo", "DPO's beta", "0.1"),
        Setting("DPO_BATCH_SIZE", "", COUNT, "dpo",
                "pairs in a forward pass of each process; empty: the largest of its share of 16, half of it, ... that "
                "fits in the GPU's memory; at most 4 on a CPU, with FSDP, or with `GRADIENT_ACCUMULATION_STEPS`", "4"),
        Setting("GRADIENT_ACCUMULATION_STEPS", "", COUNT, "dpo",
                "forward passes in a step; empty: as many as give at most 16 pairs over all processes", "4"),
        Setting("MAX_LENGTH", defaults.MAX_LENGTH, COUNT, "dpo", "pairs with more tokens are dropped", "1024"),
        Setting("SAVE_STEPS", defaults.SAVE_STEPS, COUNT, None, "steps between checkpoints", "100"),
        Setting("DPO_PRECISION", "auto", one_of(*PRECISIONS), "dpo",
                "precision of the base in training; `auto`: fp4 on a GPU, bf16 on a CPU", "4 bits"),
        Setting("ACCELERATE_CONFIG", "", str, None,
                "configuration of `accelerate launch`, such as `accelerate_configs/fsdp.yaml`; empty: one GPU, or data "
                "parallel. Do not change it during a training"),
        Setting("REPORT_TO", "none", str, None,
                "also send the training log to `wandb`, `tensorboard` or `trackio` (install it and log in first)"),
    ],
    "Scores": [
        Setting("TASKS", defaults.TASKS, matching(r"\s*([^-\s]\S*(\s+|$))*", "names of tasks"), None,
                "tasks of lm-evaluation-harness; empty: no scores",
                defaults.TASKS),
        Setting("EVAL_BATCH_SIZE", "", batch_size, None,
                "contexts at once, at most; empty: by their tokens (`hf-shared`), 16 (`hf`), or 512 (`server`)", "16"),
        Setting("EVAL_PRECISION", "auto", one_of(*PRECISIONS), "scores",
                "precision of scoring; `auto`: fp16 on a GPU, fp32 on a CPU", "fp16"),
        Setting("LIMIT", "", limit, "scores", "questions of each task (of each subject of MMLU); empty: all"),
        Setting("BACKEND", "hf-shared", one_of("hf", "hf-shared", SERVER), "scores",
                "`hf-shared` computes every context once; `hf` is the harness's own model class; `server`: on "
                "`SERVER_URL`, and the default if that is set", "hf"),
        Setting("CHAT_TEMPLATE", "0", FLAG, "scores", "1: apply the chat template (the leaderboard does not)", "0"),
        Setting("SAMPLES", "1", FLAG, None, "1: also write the model's own answers to five questions"),
    ],
    "Inference servers": [
        Setting("SERVER_URL", "", lambda urls: server_urls(urls.split()), None,
                "servers with the OpenAI completions API for pairs and scores, separated by spaces; empty: this "
                "machine. A run uses servers from start to end, or not at all"),
        Setting("SERVER_TIMEOUT", defaults.SERVER_TIMEOUT, COUNT, None,
                "seconds to wait for a server that does not respond"),
    ],
    "What the command does": [
        Setting("DRY_RUN", "0", FLAG, None, "1: print the commands and run none"),
        Setting("CHECK", "0", FLAG, None, "1: check the machine for this run in seconds and print the plan"),
        Setting("FRESH", "0", FLAG, None, "1: move an old run of this name aside and start again"),
    ],
}  # fmt: skip
SETTINGS = {setting.name: setting for group in GROUPS.values() for setting in group}
# Read by the libraries or by every command, not by the loop.
OTHER_VARIABLES = {
    "DATASETS_ROOT": "folder that `prefetch.sh` has filled with models and data sets; the hub is not used",
    "DEVICE": "`cpu`: use the CPU even if there is a GPU",
    "OPENAI_API_KEY": "key of the servers in `SERVER_URL`, if they need one; it is never recorded",
    "GRATH_DEBUG": "1: print the traceback of every error, and how fast each way to multiply matrices is on this CPU",
}
STAGE_OF_PRECISION = {"PAIRS_PRECISION": "pairs", "DPO_PRECISION": "dpo", "EVAL_PRECISION": "scores"}


def read_settings(environment=os.environ):
    """Read all settings from the environment: dict of str. An empty value is the default, except for `TASKS`.

    Raises:
        UserError: a value is not valid.
    """
    if layout.DATASETS_ROOT and not Path(layout.DATASETS_ROOT).is_dir():
        raise UserError(f"DATASETS_ROOT: there is no folder '{layout.DATASETS_ROOT}'")
    values = {}
    for setting in SETTINGS.values():
        value = environment.get(setting.name, "")
        if not value and not (setting.name == "TASKS" and "TASKS" in environment):
            value = str(setting.default or "")
        try:
            if value or setting.default is None:
                setting.check(value)
        except ArgumentTypeError as error:
            raise UserError(f"{setting.name} {error}") from None
        if str(Path(value)).startswith("-"):
            raise UserError(f"{setting.name}: a command would take '{Path(value)}' for an option")
        values[setting.name] = value
    values["RUNS_DIR"] = os.path.expanduser(values["RUNS_DIR"])  # noqa: PTH111
    if values["SERVER_URL"] and not environment.get("BACKEND"):
        values["BACKEND"] = SERVER
    if values["BACKEND"] == SERVER and not values["SERVER_URL"]:
        raise UserError("BACKEND=server needs SERVER_URL=http://host:port")
    for name in STAGE_OF_PRECISION.keys() - stages_here(values):
        values[name] = "auto"  # the servers' own
    values["TASKS"] = " ".join(values["TASKS"].split())
    return values


def stages_here(values):
    """Return the settings of the precisions that this machine computes in, not a server: name -> stage."""
    served = {"pairs": values["SERVER_URL"], "scores": values["BACKEND"] == SERVER}
    return {name: stage for name, stage in STAGE_OF_PRECISION.items() if not served.get(stage)}


def run_and_asked(values):
    """Return the run's folder, and what the names of its pairs and models say: NUM_QUERY, USE_GT and USE_FS."""
    run = layout.run_folder(values["RUNS_DIR"], values["RUN_NAME"], values["SEED"])
    return run, values["NUM_QUERY"], values["USE_GT"] == "1", values["USE_FS"] == "1"


def check_start(values):
    """Check at the start of a run what a setting's value alone does not show: files, folder, devices, trackers.

    Returns:
        The settings, with the precisions that `auto` means on this machine, and MACHINE, which describes its device.

    Raises:
        UserError: a check failed.
    """
    run, *asked = run_and_asked(values)
    made = {layout.find_pairs(run, 0): layout.pairs_path(run, 0, *asked)}
    made[layout.find_model(run, 1)] = layout.model_path(run, 1, *asked)
    for found in [found for found, own in made.items() if found not in (None, own) and values["FRESH"] == "0"]:
        raise UserError(f"{found} has another NUM_QUERY, USE_GT or USE_FS: set another RUN_NAME, or FRESH=1")
    for name in ("DATA_PATH", "ACCELERATE_CONFIG"):
        if values[name] and not Path(values[name]).is_file():
            raise UserError(f"{name}: there is no file '{values[name]}'")
    for name in ("MODEL_NAME_OR_PATH", "DATA_PATH", "DEMOS") if values["FRESH"] == "1" else ():
        if values[name] and Path(values[name]).resolve().is_relative_to(run.resolve()):
            raise UserError(f"{name}: FRESH=1 would move {values[name]}: set another RUN_NAME")
    if values["ACCELERATE_CONFIG"]:
        check_launch_config(values["ACCELERATE_CONFIG"])
    if values["USE_FS"] == "1" and not demos_file(values["DEMOS"]).is_file():
        raise UserError(f"DEMOS: there is no set or file '{values['DEMOS']}'")
    check_devices(int(values["NUM_PROCESSES"]))
    defaults.check_trackers(values["REPORT_TO"])
    precisions = {name: resolve_precision(values[name], stage) for name, stage in stages_here(values).items()}
    return values | precisions | {"MACHINE": describe_device()}


def check_launch_config(path):
    """Raise `UserError` if a file is not a configuration of `accelerate launch`."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import is_deepspeed_available

    try:
        config = load_config_from_file(path)
    except Exception as error:  # YAML, and the classes of accelerate, raise many kinds of errors
        raise UserError(f"ACCELERATE_CONFIG: {path} is not for accelerate launch: {first_line(error)[:200]}") from None
    if config.distributed_type == "DEEPSPEED" and not is_deepspeed_available():
        raise UserError(f"ACCELERATE_CONFIG: {path} needs the package deepspeed, which is not installed")


def shell_lines(values):
    """Return the settings as lines for bash, quoted: all settings, and the paths of the run.

    RUN is the run's folder, MACHINE describes the device, OTHERS names the settings that differ from the defaults.
    PREFIXES, PAIRS, COMBINED, MODELS and RESULTS are arrays with an element for each M_i: the prefix and the path of
    the pair file that it writes, the combined file, its name or folder, the folder of its scores.
    """
    run, *asked = run_and_asked(values)
    numbers = range(int(values["ITERATIONS"]) + 1)
    pairs = [layout.pairs_path(run, i, *asked) for i in numbers]
    arrays = {
        "PREFIXES": [layout.save_prefix(i) for i in numbers],
        "PAIRS": pairs,
        "COMBINED": [layout.combined_path(path) for path in pairs],
        "MODELS": [values["MODEL_NAME_OR_PATH"], *(layout.model_path(run, i, *asked) for i in numbers[1:])],
        "RESULTS": [layout.results_path(run, i) for i in numbers],
    }
    differing = [name for name, setting in SETTINGS.items() if values[name] != str(setting.default or "")]
    others = " ".join(f"{name}={quote(values[name])}" for name in differing)
    plain = values | {"OTHERS": others, "RUN": str(run)}
    lines = [f"{name}={quote(value)}\n" for name, value in plain.items()]
    lines += [f"{name}=({' '.join(quote(str(path)) for path in paths)})\n" for name, paths in arrays.items()]
    return "".join(lines)


def configuration_page():
    """Return docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "Every setting of the loop is an environment variable: `MAX_STEPS=500 ./run_llama2.sh`. A preset sets those of",
        "its model; what you set wins over the preset. An empty value is the default, except for `TASKS`.",
        "",
        "*Compared by* is the first stage that compares the setting with the record next to its output. If that stage",
        "has saved anything with another value, it refuses to start again and names the difference. A dash means that",
        "no stage compares the setting, so you can change it between two starts of a run. It does not mean that every",
        "output stays the same: in int8, responses depend on `PAIRS_BATCH_SIZE`, and scores on `EVAL_BATCH_SIZE`.",
        "`RUN_NAME`, `RUNS_DIR` and `SEED` choose the run. Of `DPO_BATCH_SIZE`, `GRADIENT_ACCUMULATION_STEPS` and",
        "`NUM_PROCESSES`, only the number of pairs in a step is compared.",
        "",
        "This page is generated: `python -m grath.run configuration > docs/configuration.md`.",
    ]
    for title, group in GROUPS.items():
        lines += ["", f"## {title}", "", "| variable | default | paper | compared by | meaning |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for setting in group:
            default = f"`{setting.default}`" if setting.default else "empty"
            cells = [f"`{setting.name}`", default, setting.paper or "-", setting.stage or "-", setting.help]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Other variables", "", "| variable | meaning |", "| --- | --- |"]
    lines += [f"| `{name}` | {text} |" for name, text in OTHER_VARIABLES.items()]
    return "\n".join(lines) + "\n"
