"""The parser of `dpo.py`: flags, and a YAML file of the same options."""

import json
from dataclasses import fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from grath.common.arguments import Parser
from grath.common.errors import UserError
from grath.common.files import check_regular


class YamlParser(Parser, HfArgumentParser):
    """A parser for the fields of dataclasses.

    The options in `--config FILE.yaml` are parsed as flags before those of the command line, which override them.
    """

    def parse(self):
        """Parse the command line and the file that `--config` names: list of instances of the dataclasses.

        Raises:
            UserError: the file cannot be read or is not a YAML mapping, an option is unknown, or a value is invalid.
        """
        first = Parser(None, add_help=False)
        first.add_argument("--config", type=Path)
        found, flags = first.parse_known_args()
        options = read_options(found.config) if found.config else {}
        names = {field.name for dataclass in self.dataclass_types for field in fields(dataclass)}
        if unknown := [str(name) for name in options if name not in names]:
            self.error(f"unknown keys in the --config file: {', '.join(unknown)}")
        of_file = []
        for name, value in options.items():
            values = value if isinstance(value, list) else [value]
            values = [one if isinstance(one, str) else json.dumps(one, default=str) for one in values]
            if value is None:  # `null` is for the options that may be None
                self.set_defaults(**{name: None})
            else:
                of_file += [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *values]
        try:
            *parsed, unknown = self.parse_args_into_dataclasses([*of_file, *flags], True, look_for_args_file=False)
        except (ValueError, TypeError, ImportError) as error:
            raise UserError(str(error)) from None
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed


def read_options(path):
    """Read the options in a YAML file: dict."""
    check_regular(path)
    try:
        options = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read --config {path}: {error.strerror}") from None
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as error:  # of its constructors
        raise UserError(f"the --config file is not YAML: {error}") from None
    if not isinstance(options, dict):
        raise UserError(f"the --config file {path} must contain a YAML mapping")
    return options
