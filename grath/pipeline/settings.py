"""The settings of the loop: one entry for each environment variable, and everything that is derived from them."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from grath.common.errors import UserError
from grath.common.paths import DATASETS_ROOT, PROJECT
from grath.dpo.defaults import step_sizes
from grath.modeling.chat import MODEL_TYPES
from grath.modeling.precision import DTYPES, PRECISIONS, SERVER, resolve_precision
from grath.pairs.prompts import demos_file
from grath.pairs.questions import labeled_split
from grath.pipeline.checks import (
    ANYTHING,
    BATCH,
    COUNT,
    COUNT_OR_EMPTY,
    FLAG,
    LIMIT,
    NATURAL,
    PLAIN_NAME,
    REQUIRED,
    addresses,
    file_or_empty,
    gold_or_empty,
    one_of,
    positive,
)

EVERY_STAGE = "every stage"
TASKS = "arc_challenge hellaswag mmlu truthfulqa_mc1 truthfulqa_mc2"


@dataclass(frozen=True)
class Setting:
    """One setting.

    Args:
        name: the environment variable.
        default: its value if it is not set.
        check: takes a value; returns what the value must be, or None if it is valid.
        stage: the first stage whose output the setting changes; None if it changes no output.
        help: one line for docs/configuration.md.
        paper: the paper's value, if it has one.
        path: whether it is a path or a name, which must not look like an option.
        empty: whether an empty value differs from no value.
    """

    name: str
    default: str
    check: Callable[[str], str | None]
    stage: str | None
    help: str
    paper: str = ""
    path: bool = False
    empty: bool = False


GROUPS = {
    "Model and run": [
        Setting("MODEL_NAME_OR_PATH", "", REQUIRED, EVERY_STAGE,
                "required (the presets set it): hub name or folder of a model or an adapter",
                "Llama-2-7b-chat-hf, zephyr-7b-beta", path=True),
        Setting("MODEL_TYPE", "auto", one_of(*MODEL_TYPES), EVERY_STAGE,
                "chat template: `auto` is the tokenizer's own; `llama2`, `zephyr` and `smollm2` are built in"),
        Setting("RUN_NAME", "grath", PLAIN_NAME, None, "the run is saved in `RUNS_DIR/{RUN_NAME}_seed_{SEED}`"),
        Setting("RUNS_DIR", "runs", REQUIRED, None, "folder of all runs", path=True),
        Setting("SEED", "0", NATURAL, EVERY_STAGE, "seed of every random draw", "0"),
        Setting("ITERATIONS", "2", COUNT, None, "iterations of pairs, combine and DPO", "2 rolling, 10 fixed"),
        Setting("REFERENCE", "rolling", one_of("rolling", "fixed"), "dpo",
                "reference model of DPO: the iteration's starting model (`rolling`) or the base (`fixed`)",
                "rolling; fixed against overfitting"),
        Setting("NUM_PROCESSES", "1", COUNT, None, "processes, one for each GPU, in every stage", "1"),
    ],
    "Pairs": [
        Setting("NUM_QUERY", "", COUNT, "pairs", "required (the presets set it): number of questions to ask", "1119"),
        Setting("DATA_NAME", "allenai/ai2_arc", REQUIRED, "pairs", "hub data set of the questions, in the ARC schema",
                "allenai/ai2_arc"),
        Setting("SUBDATA_NAME", "ARC-Challenge", ANYTHING, "pairs", "its configuration", "ARC-Challenge"),
        Setting("SPLIT", "train", REQUIRED, "pairs", "its split", "train"),
        Setting("DATA_PATH", "", ANYTHING, "pairs", "local JSON-lines file of questions, instead of `DATA_NAME`",
                path=True),
        Setting("USE_FS", "1", FLAG, "pairs", "1: few-shot examples in the prompt", "1"),
        Setting("USE_GT", "0", FLAG, "pairs", "1: ground-truth candidates in the prompt", "0"),
        Setting("DEMOS", "truthfulqa", REQUIRED, "pairs",
                "few-shot examples: `truthfulqa`, `halueval`, `misconceptions` or a JSON file",
                "TruthfulQA's", path=True),
        Setting("MAX_NEW_TOKENS", "100", COUNT, "pairs", "maximum number of tokens of a response", "100"),
        Setting("PAIRS_BATCH_SIZE", "", COUNT_OR_EMPTY, None,
                "questions at once on this machine (in int8, responses depend on it); empty: as many as the GPU's "
                "memory takes, at most 256; 64 on a CPU and with `generate`; 512 at each server", "1"),
        Setting("PAIRS_PRECISION", "auto", one_of(*PRECISIONS), "pairs",
                "precision of generation; `auto`: int8 on a GPU, bf16 on a CPU", "int8"),
    ],
    "DPO": [
        Setting("GOLD_PAIRS", "", gold_or_empty, EVERY_STAGE,
                "train on gold answers instead of the model's own pairs, as a positive control: "
                "`truthful_qa`, `ai2_arc/ARC-Challenge`, `ai2_arc/ARC-Easy`, or rows of one (`truthful_qa[:200]`)"),
        Setting("MAX_STEPS", "1000", COUNT, "dpo", "optimizer steps an iteration", "1000 (Zephyr rolling: 500)"),
        Setting("WARMUP_STEPS", "100", NATURAL, "dpo", "warm-up steps of the cosine schedule", "100"),
        Setting("LEARNING_RATE", "5e-4", positive, "dpo", "peak learning rate", "5e-4"),
        Setting("BETA", "0.1", positive, "dpo", "DPO's beta", "0.1"),
        Setting("DPO_BATCH_SIZE", "", COUNT_OR_EMPTY, "dpo",
                "pairs in a forward pass of each process; empty: as many as the GPU's memory takes, at most 16; 4 "
                "on a CPU, or with `GRADIENT_ACCUMULATION_STEPS`", "4"),
        Setting("GRADIENT_ACCUMULATION_STEPS", "", COUNT_OR_EMPTY, "dpo",
                "forward passes in a step; empty: as many as give at most 16 pairs over all processes", "4"),
        Setting("MAX_LENGTH", "1024", COUNT, "dpo", "pairs with more tokens are dropped", "1024"),
        Setting("SAVE_STEPS", "100", COUNT, None, "steps between checkpoints", "100"),
        Setting("DPO_PRECISION", "auto", one_of(*PRECISIONS), "dpo",
                "precision of the base in training; `auto`: fp4 on a GPU, bf16 on a CPU", "4 bit"),
        Setting("ACCELERATE_CONFIG", "", file_or_empty, "dpo",
                "configuration of `accelerate launch`, such as `accelerate_configs/fsdp.yaml`; empty: one GPU, or data "
                "parallel", path=True),
        Setting("REPORT_TO", "none", REQUIRED, None,
                "also send the training log to `wandb`, `tensorboard` or `trackio` (install it and log in first)"),
    ],
    "Scores": [
        Setting("TASKS", TASKS, ANYTHING, None, "tasks of lm-evaluation-harness; empty: no scores", TASKS, empty=True),
        Setting("EVAL_BATCH_SIZE", "", BATCH, None,
                "contexts at once, at most; empty: by their tokens (`hf-shared`), 16 (`hf`), or 512 (`server`)", "16"),
        Setting("EVAL_PRECISION", "auto", one_of(*PRECISIONS), "scores",
                "precision of scoring; `auto`: fp16 on a GPU, fp32 on a CPU", "fp16"),
        Setting("LIMIT", "", LIMIT, "scores", "questions of each task; empty: all"),
        Setting("BACKEND", "hf-shared", one_of("hf", "hf-shared", SERVER), "scores",
                "`hf-shared` computes every context once; `hf` is the harness's own model class; `server`: on "
                "`SERVER_URL`, and the default if that is set", "hf"),
        Setting("CHAT_TEMPLATE", "0", FLAG, "scores", "1: apply the chat template (the leaderboard does not)", "0"),
        Setting("SAMPLES", "1", FLAG, None, "1: also write the model's own answers to five questions"),
    ],
    "Inference servers": [
        Setting("SERVER_URL", "", addresses, None,
                "servers with the OpenAI completions API for pairs and scores, separated by spaces; empty: this "
                "machine. A run that has started stays with servers, or without"),
        Setting("SERVER_TIMEOUT", "600", COUNT, None, "seconds to wait for a server that does not respond"),
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
    "OPENAI_API_KEY": "key of the servers in `SERVER_URL`, if they want one; it is never recorded",
    "GRATH_DEBUG": "1: print the traceback of every error",
    "STAGE_SECONDS": "durations to announce before the first iteration, as in `pairs=40 dpo=80`",
}
STEP_SETTINGS = ("DPO_BATCH_SIZE", "NUM_PROCESSES", "GRADIENT_ACCUMULATION_STEPS")
STAGE_OF_PRECISION = {"PAIRS_PRECISION": "pairs", "DPO_PRECISION": "dpo", "EVAL_PRECISION": "scores"}
EFFECTIVE_BATCH = "EFFECTIVE_BATCH"
FIRST_AFFECTED_STAGE = {name: setting.stage for name, setting in SETTINGS.items()} | {EFFECTIVE_BATCH: "dpo"}
EVALUATION = (
    "MODEL_TYPE", "NUM_PROCESSES", "RUNS_DIR", "DRY_RUN",
    *(setting.name for group in ("Scores", "Inference servers") for setting in GROUPS[group]),
)  # fmt: skip


def read_settings(names=tuple(SETTINGS), environment=os.environ):
    """Read settings from the environment: dict of str with the settings called `names`.

    Raises:
        UserError: a value is not valid.
    """
    if DATASETS_ROOT and not Path(DATASETS_ROOT).is_dir():
        raise UserError(f"DATASETS_ROOT: there is no folder '{DATASETS_ROOT}'")
    if environment.get("ROUNDS"):
        raise UserError("ROUNDS is called ITERATIONS now")
    values = {}
    for setting in map(SETTINGS.get, names):
        given = environment.get(setting.name)
        value = setting.default if given is None or not (given or setting.empty) else given
        if setting.path and value.startswith("-"):
            value = f"./{value}"
        if wanted := setting.check(value):
            raise UserError(f"{setting.name} must be {wanted}" + (f", not '{value}'" if value else ""))
        values[setting.name] = value
    if values.get("SERVER_URL") and not environment.get("BACKEND"):
        values["BACKEND"] = SERVER
    if values.get("BACKEND") == SERVER and not values["SERVER_URL"]:
        raise UserError("BACKEND=server needs SERVER_URL=http://host:port")
    for name in STAGE_OF_PRECISION.keys() & values.keys():
        if STAGE_OF_PRECISION[name] in served_stages(values):
            values[name] = "auto"  # the servers' own
    if values.get("BACKEND") == "hf" and values["EVAL_PRECISION"] not in ("auto", *DTYPES):
        raise UserError(f"BACKEND=hf scores in {', '.join(DTYPES)} only, not in {values['EVAL_PRECISION']}")
    if "TASKS" in values:
        values["TASKS"] = " ".join(values["TASKS"].split())
    return values


def served_stages(values):
    """Return the stages that run on servers: set of `pairs` and `scores`."""
    return {
        stage for stage, served in (("pairs", values["SERVER_URL"]), ("scores", values["BACKEND"] == SERVER)) if served
    }


def run_folder(values):
    """Return the folder of the run: Path."""
    return Path(values["RUNS_DIR"]) / f"{values['RUN_NAME']}_seed_{values['SEED']}"


def normalize_settings(values):
    """Return the settings that two starts of a run must share: dict of str.

    Settings that change no output are left out. `auto` becomes the precision that it means on this machine, a path in
    the project is relative to it, and the three settings that make up a step become its number of pairs, so that a run
    can be resumed with another number of GPUs or another batch size.
    """
    normalized = {name: value for name, value in values.items() if SETTINGS[name].stage and name not in STEP_SETTINGS}
    batch, processes, accumulation = (int(values[name] or 0) for name in STEP_SETTINGS)
    normalized[EFFECTIVE_BATCH] = str(processes * prod(step_sizes(processes, batch, accumulation)))
    for name, stage in STAGE_OF_PRECISION.items():
        normalized[name] = SERVER if stage in served_stages(values) else resolve_precision(values[name], stage)
    for name in ("MODEL_NAME_OR_PATH", "DATA_PATH", "DEMOS", "ACCELERATE_CONFIG"):
        path = Path(values[name])
        if path.is_absolute() and path.is_relative_to(PROJECT):
            normalized[name] = path.relative_to(PROJECT).as_posix()
    return normalized


def question_inputs(values):
    """Return (files, data sets) that the pairs, or the gold pairs, are made from: two lists of str.

    Raises:
        UserError: a file does not exist.
    """
    if values["GOLD_PAIRS"]:
        return [], [labeled_split(values["GOLD_PAIRS"])[0]]
    files, datasets = [], []
    if values["DATA_PATH"]:
        files.append(values["DATA_PATH"])
        if not Path(values["DATA_PATH"]).is_file():
            raise UserError(f"DATA_PATH: there is no file '{values['DATA_PATH']}'")
    else:
        datasets.append(values["DATA_NAME"])
    if values["USE_FS"] == "1":
        files.append(str(demos_file(values["DEMOS"])))
        if not Path(files[-1]).is_file():
            raise UserError(f"DEMOS: there is no set or file '{values['DEMOS']}'")
    return files, datasets
