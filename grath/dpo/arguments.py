"""The parser of `dpo.py`: flags, and a YAML file of the same options."""

import argparse
import json
import sys

from trl import TrlParser
from yaml import YAMLError

from grath.common.arguments import HelpFormatter, OneLineErrors
from grath.common.errors import UserError


class YamlParser(OneLineErrors, TrlParser):
    """TRL's parser for dataclasses, with exact flag names and one-line errors.

    `--config FILE.yaml` replaces the defaults; flags override the file. Both are checked in the same way.
    """

    def __init__(self, dataclass_types, description):
        super().__init__(dataclass_types, description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def parse(self):
        """Parse the command line and the file that `--config` names.

        Returns:
            list of instances of the dataclasses, in their order.

        Raises:
            UserError: the file cannot be read or is not a YAML mapping, an option is unknown, or a value is invalid.
        """
        if sys.argv[-1] == "--config":
            self.error("argument --config: expected one argument")
        try:
            *parsed, unknown_keys, unknown_flags = self.parse_args_and_config(
                return_remaining_strings=True, separate_remaining_strings=True
            )
        except OSError as error:
            if error.filename not in sys.argv:
                raise
            raise UserError(f"cannot read --config {error.filename}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError("the --config file is not UTF-8 text") from None
        except YAMLError as error:
            raise UserError(f"the --config file is not YAML: {error}") from None
        except (ValueError, TypeError, ImportError) as error:
            raise UserError(str(error)) from None
        if unknown_keys:
            self.error(f"unknown keys in the --config file: {', '.join(key[2:] for key in unknown_keys[::2])}")
        if unknown_flags:
            self.error(f"unrecognized arguments: {' '.join(unknown_flags)}")
        return parsed

    def set_defaults_with_config(self, **config):
        """Convert and check the values of the YAML file as if they were flags; argparse does not check defaults."""
        actions = {action.dest: action for action in reversed(self._actions)}
        for name in config.keys() & actions.keys():
            if config[name] is None:  # `null` is for the options that may be None
                continue
            several = isinstance(config[name], list) and actions[name].nargs == "+"
            values = config[name] if several else [config[name]]
            strings = [value if isinstance(value, str) else json.dumps(value) for value in values]
            try:
                config[name] = self._get_values(actions[name], strings)
            except argparse.ArgumentError as error:
                self.error(f"in the --config file: {error}")
        return super().set_defaults_with_config(**config)
