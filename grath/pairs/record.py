"""The record of a pair file: what the pairs depend on, and whether an earlier start has finished them."""

import json
from pathlib import Path

from grath.common.errors import UserError
from grath.common.files import hash_of
from grath.common.layout import PROJECT
from grath.common.record import check_files, check_inputs
from grath.modeling.identity import model_identity, tokenizer_identity
from grath.modeling.precision import AUTO, SERVER, resolve_precision

SETTINGS = ("data_path", "data_name", "subdata_name", "split", "useFS", "useGT", "demos", "seed", "engine")


def describe_pairs(args, questions, messages, earlier):
    """Return the inputs of the record of a pair file: everything that the pairs depend on.

    Args:
        args: the arguments of create_pair_responses.py.
        questions, messages: the questions, and the conversation that asks each of them.
        earlier: the record of an earlier start, or None.
    """
    inputs = {"model": model_identity(args.model_name_or_path)}
    if args.tokenizer_name:
        inputs["tokenizer"] = tokenizer_identity(args.tokenizer_name)
    inputs |= {"precision": _precision(args, earlier or {}), "model_type": args.model_type}
    inputs |= {"max_new_tokens": args.max_new_tokens}
    inputs |= {"demos": Path(args.demos).stem} if args.useFS else {}  # messages have their content
    inputs |= {"seed": args.seed} if args.useGT else {}
    return inputs | {"questions": hash_rows(questions), "messages": hash_rows(messages)}


def _precision(args, earlier):
    if args.engine == SERVER:
        return SERVER
    recorded = earlier.get("inputs", {}).get("precision")
    same = args.precision == recorded or (args.precision == "auto" and recorded in AUTO["pairs"])
    # A finished file needs no check of the devices, which would import torch.
    return recorded if same and earlier.get("files") else resolve_precision(args.precision, "pairs")


def hash_rows(rows):
    """Return the SHA-256 of rows (what JSON can write) in hexadecimal."""
    return hash_of(json.dumps(row) for row in rows)


def is_finished(path, earlier, inputs):
    """Return whether an earlier start, with the record `earlier` or None, has finished the pair file `path`.

    Raises:
        UserError: the file was made from something else, or is not the file that was written.
    """
    advice = "pass --overwrite to replace it, or choose another --save_prefix or --save_dir"
    if earlier is None:
        if path.exists():
            raise UserError(f"{path} has no record of what it was made from: {advice}")
        return False
    check_inputs(earlier, inputs, path, advice)
    return check_files(earlier, path.parent, advice)


def settings_of(args):
    """Return the arguments that the report needs: dict. A path in the project is relative to it."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    if args.data_path and Path(args.data_path).resolve().is_relative_to(PROJECT):
        settings["data_path"] = Path(args.data_path).resolve().relative_to(PROJECT).as_posix()
    return settings
