"""Pair files: JSON lines with `question`, `correct` and `incorrect`, and what is done to their rows."""

import json
import re

from grath.cli import UserError, read_json_lines, write_whole

FIELDS = ("question", "correct", "incorrect")
CORRECT, INCORRECT = "Correct answer:", "Incorrect answer:"


def pair_file_name(save_prefix, num_query, use_gt, use_fs):
    """The name of the pairs written for `num_query` questions."""
    return f"{save_prefix}_num_{num_query}_useGT_{use_gt}_useFS_{use_fs}.json"


def read_pairs(path, what="the pair file"):
    """The rows of a pair file, in order.

    Raises:
        UserError: the file is missing or empty, or a row lacks a field or has an empty one.
    """
    rows = read_json_lines(path, what)
    for number, row in enumerate(rows, start=1):
        for field in FIELDS:
            if not isinstance(row.get(field), str) or not row[field].strip():
                raise UserError(f"{what} {path}, row {number}: {field!r} must be a string that is not empty")
    return [{field: row[field] for field in FIELDS} for row in rows]


def write_pairs(path, rows):
    """Write rows as a pair file that appears whole."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def parse_reply(reply):
    """Take the two answers out of a model's reply.

    The correct answer is what stands between the two labels, the incorrect one what stands behind the second on its
    line.

    Returns:
        ((correct, incorrect), None), or (None, reason) if the reply does not parse.
    """
    if CORRECT not in reply:
        return None, "no correct answer"
    rest = reply.split(CORRECT, 1)[1]
    if INCORRECT not in rest:
        return None, "no incorrect answer"
    correct, incorrect = rest.split(INCORRECT, 1)
    correct, incorrect = correct.strip(), re.split(r"[\r\n]", incorrect.strip(" \t"), maxsplit=1)[0].strip()
    if not correct or not incorrect:
        return None, "empty answer"
    if re.search(r"[\r\n]", correct):
        return None, "correct answer of several lines"
    return (correct, incorrect), None


def is_complete(reply):
    """Whether the line of the incorrect answer has ended: nothing that follows can change what `parse_reply` takes."""
    _, label, rest = reply.partition(CORRECT)[2].partition(INCORRECT)
    return bool(label) and "\n" in rest.strip(" \t")


def splice(new_rows, ori_rows):
    """New correct answers onto the original incorrect ones (paper, section 3.3).

    Returns:
        (rows, missing): one row for each original row, in its order, with the first new correct answer to its
        question, or its own where there is none; and how many had none.
    """
    first = {}
    for row in new_rows:
        first.setdefault(row["question"], row["correct"])
    rows = [{**row, "correct": first.get(row["question"], row["correct"])} for row in ori_rows]
    return rows, sum(row["question"] not in first for row in ori_rows)
