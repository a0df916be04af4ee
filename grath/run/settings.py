"""The settings of the loop: one entry for each environment variable, and their lines for the shell."""

import os
from argparse import ArgumentTypeError
from pathlib import Path
from shlex import quote

from grath.common import defaults, layout
from grath.common.arguments import batch_size, limit, matching
from grath.common.errors import UserError
from grath.modeling.chat import MODEL_TYPES
from grath.modeling.devices import check_devices, describe_device
from grath.modeling.precision import PRECISIONS, SERVER, resolve_precision
from grath.pairs.prompts import demos_file
from grath.serving.client import server_urls


def one_of(*choices):
    """Return a check that accepts one of `choices`."""
    return matching("|".join(choices), f"one of {', '.join(choices)}")


COUNT = matching("[1-9][0-9]{0,8}", "a whole number of at least 1")
NATURAL = matching("[0-9]{1,9}", "a whole number")
FLAG = matching("[01]", "0 or 1")
POSITIVE = matching(r"(?=[0-9.]*[1-9])[0-9]*\.?[0-9]*([eE][-+]?[0-9]{1,2})?", "a number greater than 0")


# Of each environment variable: its default, or None if it must be set, and a check of its value, which raises
# `ArgumentTypeError` or `UserError`. docs/configuration.md says what each one does.
SETTINGS = {
    # Model and run.
    "MODEL_NAME_OR_PATH": (None, matching("(?s).+", "set; the presets run_*.sh set it")),
    "MODEL_TYPE": ("auto", one_of(*MODEL_TYPES)),
    "RUN_NAME": ("grath", matching("[^/]+", "a plain name (use RUNS_DIR for the folder)")),
    "RUNS_DIR": ("runs", str),
    "SEED": ("0", NATURAL),
    "ITERATIONS": ("2", matching("[1-9][0-9]{0,2}", "a whole number from 1 to 999")),
    "REFERENCE": ("rolling", one_of("rolling", "fixed")),
    "NUM_PROCESSES": ("1", COUNT),
    # Pairs.
    "NUM_QUERY": (None, COUNT),
    "DATA_NAME": (defaults.DATA_NAME, str),
    "SUBDATA_NAME": (defaults.SUBDATA_NAME, str),
    "SPLIT": (defaults.SPLIT, str),
    "DATA_PATH": ("", str),
    "USE_FS": ("1", FLAG),
    "USE_GT": ("0", FLAG),
    "DEMOS": (defaults.DEMOS, str),
    "MAX_NEW_TOKENS": (defaults.MAX_NEW_TOKENS, COUNT),
    "PAIRS_BATCH_SIZE": ("", COUNT),
    "PAIRS_PRECISION": ("auto", one_of(*PRECISIONS)),
    # DPO.
    "MAX_STEPS": (defaults.MAX_STEPS, COUNT),
    "WARMUP_STEPS": (defaults.WARMUP_STEPS, NATURAL),
    "LEARNING_RATE": (defaults.LEARNING_RATE, POSITIVE),
    "BETA": (defaults.BETA, POSITIVE),
    "DPO_BATCH_SIZE": ("", COUNT),
    "GRADIENT_ACCUMULATION_STEPS": ("", COUNT),
    "MAX_LENGTH": (defaults.MAX_LENGTH, COUNT),
    "SAVE_STEPS": (defaults.SAVE_STEPS, COUNT),
    "DPO_PRECISION": ("auto", one_of(*PRECISIONS)),
    "ACCELERATE_CONFIG": ("", str),
    "REPORT_TO": ("none", str),
    # Scores.
    "TASKS": (defaults.TASKS, str),
    "EVAL_BATCH_SIZE": ("", batch_size),
    "EVAL_PRECISION": ("auto", one_of(*PRECISIONS)),
    "LIMIT": ("", limit),
    "BACKEND": ("hf-shared", one_of("hf", "hf-shared", SERVER)),
    "CHAT_TEMPLATE": ("0", FLAG),
    "SAMPLES": ("1", FLAG),
    # Inference servers.
    "SERVER_URL": ("", lambda urls: server_urls(urls.split())),
    "SERVER_TIMEOUT": (defaults.SERVER_TIMEOUT, COUNT),
    # What the command does.
    "DRY_RUN": ("0", FLAG),
    "CHECK": ("0", FLAG),
    "FRESH": ("0", FLAG),
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
    for name, (default, check) in SETTINGS.items():
        value = environment.get(name, "")
        if not value and not (name == "TASKS" and "TASKS" in environment):
            value = str(default or "")
        try:
            if value or default is None:
                check(value)
        except ArgumentTypeError as error:
            raise UserError(f"{name} {error}") from None
        if str(Path(value)).startswith("-"):  # a command would take it for an option
            raise UserError(f"{name} must not start with a hyphen, like '{value}'")
        values[name] = value
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
    found = layout.find_pairs(run, 0)
    if values["FRESH"] == "0" and found and found != layout.pairs_path(run, 0, *asked):
        raise UserError(f"{found} has another NUM_QUERY, USE_GT or USE_FS: set another RUN_NAME, or FRESH=1")
    for name in ("DATA_PATH", "ACCELERATE_CONFIG"):
        if values[name] and not Path(values[name]).is_file():
            raise UserError(f"{name}: there is no file '{values[name]}'")
    if values["USE_FS"] == "1" and not demos_file(values["DEMOS"]).is_file():
        raise UserError(f"DEMOS: there is no set or file '{values['DEMOS']}'")
    check_devices(int(values["NUM_PROCESSES"]))
    defaults.check_trackers(values["REPORT_TO"])
    precisions = {name: resolve_precision(values[name], stage) for name, stage in stages_here(values).items()}
    return values | precisions | {"MACHINE": describe_device()}


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
    differing = [name for name, (default, _) in SETTINGS.items() if values[name] != str(default or "")]
    others = " ".join(f"{name}={quote(values[name])}" for name in differing)
    plain = values | {"OTHERS": others, "RUN": str(run)}
    lines = [f"{name}={quote(value)}\n" for name, value in plain.items()]
    lines += [f"{name}=({' '.join(quote(str(path)) for path in paths)})\n" for name, paths in arrays.items()]
    return "".join(lines)
