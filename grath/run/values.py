"""What a setting's value may be: each check takes the value and returns what it must be, or None if it is valid."""

import re
from pathlib import Path

from grath.serving.client import server_urls


def matches(pattern, what):
    """A check: the value must match the regular expression `pattern`; `what` says so in words."""
    return lambda value: None if re.fullmatch(pattern, value) else what


def one_of(*choices):
    """A check: the value must be one of `choices`."""
    return lambda value: None if value in choices else f"one of {', '.join(choices)}"


def positive(value):
    """A check: the value must be a number above 0."""
    try:
        return None if 0 < float(value) < float("inf") else "a number greater than 0"
    except ValueError:
        return "a number greater than 0"


def file_or_empty(value):
    """A check: the value must be an existing file, or empty."""
    return None if not value or Path(value).is_file() else "an existing file, or empty"


def addresses(value):
    """A check: the value must be addresses of servers. Unlike the others it raises, because one may have a password."""
    server_urls(value.split())


COUNT = matches(r"[1-9][0-9]{0,8}", "a whole number of at least 1")
COUNT_OR_EMPTY = matches(r"([1-9][0-9]{0,8})?", "a whole number of at least 1, or empty")
# The settings name every file of every iteration.
ITERATIONS = matches(r"[1-9][0-9]{0,2}", "a whole number from 1 to 999")
NATURAL = matches(r"[0-9]{1,9}", "a whole number")
FLAG = matches("[01]", "0 or 1")
LIMIT = matches(r"([1-9][0-9]{0,8}|0?\.0*[1-9][0-9]*)?", "a number of questions, a share below 1, or empty")
BATCH = matches(r"([1-9][0-9]{0,8}|auto(:[1-9][0-9]{0,8})?)?", "a whole number of at least 1, auto, or empty")
PLAIN_NAME = matches(r"[^/]+", "a plain name (use RUNS_DIR for the folder)")
REQUIRED = matches(r"(?s).+", "set; the presets run_*.sh set it")
ANYTHING = matches(r"(?s).*", "anything")
