"""Command-line parsers of the scripts and modules: one-line errors, shown defaults, exact flag names."""

import argparse
import re

from grath.common.errors import UserError, program_name


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show every default except None and False; keep the line breaks of a module's docstring."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class OneLineErrors:
    """Mixin for `argparse.ArgumentParser` that raises `UserError` instead of printing the usage."""

    def error(self, message):
        raise UserError(f"{message} (see --help)")


class Parser(OneLineErrors, argparse.ArgumentParser):
    """A parser that takes exact flag names only and shows the module's docstring as its description."""

    def __init__(self, description, **options):
        options = {"prog": program_name(), **options}
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False, **options)


def positive_int(text):
    """Convert `text` to an integer of at least 1; an `argparse` type."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)
