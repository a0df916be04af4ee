"""Pair files: JSON lines with `question`, `correct` and `incorrect`, and what is done to their rows."""

import json
import re
from contextlib import contextmanager

from grath.cli import UserError, read_json_lines, write_whole

FIELDS = ("question", "correct", "incorrect")
CORRECT, INCORRECT = "Correct answer:", "Incorrect answer:"
LINE_END = re.compile(r"[\r\n]")


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

    The correct answer is what stands between the two labels, the incorrect one what stands behind the second: one line
    each.

    Returns:
        ((correct, incorrect), None), or (None, reason) if the reply does not parse.
    """
    _, label, rest = reply.partition(CORRECT)
    if not label:
        return None, "no correct answer"
    correct, label, incorrect = rest.partition(INCORRECT)
    correct, incorrect = correct.strip(), LINE_END.split(incorrect.strip(" \t"), maxsplit=1)[0].strip()
    if LINE_END.search(correct) or (correct and not label):
        return None, "no incorrect answer behind the correct one"
    if not correct or not incorrect:
        return None, "empty answer"
    return (correct, incorrect), None


def splice(new_rows, ori_rows):
    """New correct answers onto the original incorrect ones: the paper's gradual refinement of its data.

    Returns:
        (rows, missing): one row for each original row, in its order, with the first new correct answer to its
        question, or its own where there is none; and how many had none.
    """
    first = {}
    for row in new_rows:
        first.setdefault(row["question"], row["correct"])
    rows = [{**row, "correct": first.get(row["question"], row["correct"])} for row in ori_rows]
    return rows, sum(row["question"] not in first for row in ori_rows)


def _kept(path):
    """The files of replies kept for the pair file `path`: a merged one, and what each process has added.

    They are `.{pair file}.replies` and `.{pair file}.replies.{process}`. The first line of each holds the settings that
    the replies belong to, every further one `[index, reply]`.
    """
    return [file for file in path.parent.iterdir() if file.name.startswith(f".{path.name}.replies")]


def open_replies(path, settings, merge):
    """The replies that an interrupted run of these settings has left behind.

    Args:
        path: the pair file.
        settings: str that names all that the replies depend on.
        merge: whether to write what is found as one file (in the first process, before the others look).

    Returns:
        dict: index -> reply.
    """
    replies, strange = {}, False
    for file in _kept(path) if path.parent.is_dir() else []:
        try:
            # A line without its end was cut short by the interruption.
            first, *lines = file.read_text(encoding="utf-8").split("\n")[:-1] or [""]
            found = dict(json.loads(line) for line in lines) if first == settings else None
        except (ValueError, TypeError):  # what a failing machine may leave
            found = None
        if found is None:
            strange = True
        else:
            replies |= found
    if merge:
        if strange:
            print("Kept replies with other settings, or damaged ones, are dropped: asking for them afresh")
        lines = [settings, *(json.dumps(item) for item in sorted(replies.items()))]
        merged = path.with_name(f".{path.name}.replies")
        write_whole(merged, "".join(f"{line}\n" for line in lines))
        for file in _kept(path):
            if file != merged:
                file.unlink()
    return replies


@contextmanager
def keep_replies(path, settings, process):
    """A function (index, reply) that keeps a reply on disk at once."""
    with path.with_name(f".{path.name}.replies.{process}").open("w", encoding="utf-8") as file:
        file.write(f"{settings}\n")

        def keep(index, reply):
            file.write(json.dumps([index, reply]) + "\n")
            file.flush()

        yield keep


def remove_replies(path):
    """Remove what was kept: the pair file is written."""
    for file in _kept(path):
        file.unlink()
