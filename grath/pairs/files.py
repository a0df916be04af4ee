"""Read, write and combine pair files: JSON lines with `question`, `correct` and `incorrect`."""

import json
from pathlib import Path

from grath.common.errors import UserError
from grath.common.files import atomic_write_text, read_json_lines
from grath.common.layout import record_path
from grath.common.record import check_files, read_record

FIELDS = ("question", "correct", "incorrect")


def read_pairs(path, what="the pair file"):
    """Read the rows of a pair file, in order.

    Raises:
        UserError: the file is missing or empty, it is not the file that its record names, or a field of a row is
            missing or empty; `what` names the file's role.
    """
    of_path = record_path(Path(path))
    if record := read_record(of_path):
        check_files(record, of_path.parent, f"write the pairs again, or remove {of_path.name} to use it as it is")
    rows = read_json_lines(path, what)
    for number, row in enumerate(rows, start=1):
        for field in FIELDS:
            if not isinstance(row.get(field), str) or not row[field].strip():
                raise UserError(f"{what} {path}, row {number}: {field!r} must be a non-empty string")
    return [{field: row[field] for field in FIELDS} for row in rows]


def write_pairs(path, rows):
    """Write rows as a pair file, atomically."""
    atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def combine(new_rows, ori_rows):
    """Combine new correct answers with the original incorrect ones: the paper's gradual refinement of its data.

    Returns:
        (rows, missing): one row for each original row, in the same order, and the number of original rows whose
        question has no new answer. A row's correct answer is the first new one to its question, or the original one
        if there is none.
    """
    first = {}
    for row in new_rows:
        first.setdefault(row["question"], row["correct"])
    rows = [{**row, "correct": first.get(row["question"], row["correct"])} for row in ori_rows]
    return rows, sum(row["question"] not in first for row in ori_rows)
