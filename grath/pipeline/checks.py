"""Checks of a setting's value: each takes the value and returns what it must be, or None if it is valid."""

import re
from pathlib import Path

from grath.pairs.questions import LABELED_DATASETS, labeled_rows, labeled_split
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


def gold_or_empty(value):
    """A check: the value must name a data set with gold answers, or be empty."""
    if not value or (labeled_split(value) and range(10**9)[labeled_rows(value)]):
        return None
    return f"empty, or one of {', '.join(LABELED_DATASETS)}, or rows of one, as in truthful_qa[:200]"


def addresses(value):
    """A check: the value must be addresses of servers. Unlike the others it raises, because one may have a password."""
    server_urls(value.split())


COUNT = matches(r"[1-9]\d{0,8}", "a whole number of at least 1")
COUNT_OR_EMPTY = matches(r"([1-9]\d{0,8})?", "a whole number of at least 1, or empty")
NATURAL = matches(r"\d{1,9}", "a whole number")
FLAG = matches("[01]", "0 or 1")
LIMIT = matches(r"([1-9]\d{0,8}|0?\.\d+)?", "a number of questions, a share below 1, or empty")
BATCH = matches(r"([1-9]\d{0,8}|auto(:[1-9]\d{0,8})?)?", "a whole number of at least 1, auto, or empty")
PLAIN_NAME = matches(r"[^/]+", "a plain name (use RUNS_DIR for the folder)")
REQUIRED = matches(r"(?s).+", "set; the presets run_*.sh set it")
ANYTHING = matches(r"(?s).*", "anything")
