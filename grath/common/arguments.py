"""Command-line parsers of the scripts and modules: one-line errors, shown defaults, exact flag names."""

import argparse
import re

from grath.common.errors import UserError, program_name


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show every default except None and False; keep the line breaks of a module's docstring."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser with exact flag names and one-line errors; the module's docstring is its description."""

    def __init__(self, description, **options):
        options |= {"prog": program_name(), "formatter_class": HelpFormatter, "allow_abbrev": False}
        super().__init__(description=description, **options)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def matching(pattern, what, convert=str):
    """Return an `argparse` type for text that matches the regular expression `pattern`; `what` describes it."""

    def check(text):
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"must be {what}" + (f", not {text!r}" if text else ""))
        return convert(text)

    return check


positive_int = matching("0*[1-9][0-9]{0,8}", "a whole number of at least 1", int)
# Questions of each task, and contexts in a batch of scores.
limit = matching(
    r"[1-9][0-9]{0,8}|0?\.(?!0+$)[0-9]{1,9}",
    "a number of questions or a share below 1",
    lambda text: float(text) if "." in text else int(text),
)
batch_size = matching(
    "[1-9][0-9]{0,8}|auto(:[1-9][0-9]{0,8})?",
    "a whole number of at least 1, or auto",
    lambda text: text if text.startswith("auto") else int(text),
)
