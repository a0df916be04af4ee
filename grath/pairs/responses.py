"""The model's responses: parse them, save each one at once, and load the saved ones to resume."""

import json
import re
from collections import Counter
from contextlib import contextmanager
from glob import escape

from grath.common.files import atomic_write_text, fits, parse_json
from grath.modeling.devices import print_once

CORRECT, INCORRECT = "Correct answer:", "Incorrect answer:"
# The correct answer at the start of a line, then the incorrect one, mostly on the next line; labels may be in bold.
PAIR = re.compile(rf"^[ \t]*\**{CORRECT}\**\s*(.*?)\s*\**{INCORRECT}\**[ \t]*(.*)", re.MULTILINE)
ASKED = re.compile(r"^[ \t]*\**Question:(.*)", re.MULTILINE)
# What a reasoning model puts around its reasoning, as <think> and </think>.
REASONING = re.compile(r"[<\[](/?)\s*(?:think|thought|reason|reflect|analysis|scratchpad)\w*\s*[>\]]", re.IGNORECASE)


def parse_response(response):
    """Extract the two answers from a response: its last pair of lines about the question, after any reasoning.

    Returns:
        ((correct, incorrect), None), or (None, reason) if the response does not parse.
    """
    response = re.sub(r"\r\n?", "\n", response)
    tags = list(REASONING.finditer(response))
    if tags and not tags[-1][1]:
        return None, "reasoning without an end"
    text = response[tags[-1].end() :] if tags else response
    first = PAIR.search(text)
    if not first:
        return None, "no incorrect answer after the correct one" if CORRECT in text else "no correct answer"
    # A model may go on with a question of its own.
    asked = ASKED.findall(text[: first.start()])[-1:]
    others = (found.start() for found in ASKED.finditer(text, first.end()) if [found[1]] != asked)
    correct, incorrect = (answer.strip() for answer in PAIR.findall(text[: next(others, None)])[-1])
    if not correct or not incorrect:
        return None, "empty answer"
    if any(label in answer for label in (CORRECT, INCORRECT) for answer in (correct, incorrect)):
        return None, "a label in an answer"
    return (correct, incorrect), None


def parse_responses(questions, responses):
    """Parse the responses to questions; return the rows of the pair file, and why others were dropped (Counter)."""
    rows, dropped = [], Counter()
    for i, question in enumerate(questions):
        answers, reason = parse_response(responses[i])
        if answers:
            rows.append({"question": question["question"], "correct": answers[0], "incorrect": answers[1]})
        else:
            dropped[reason] += 1
    return rows, dropped


def _saved_file(path, process=""):
    """Return the file of the responses to a pair file: of one process, or the merged one. A line: [index, response]."""
    return path.with_name(f".{path.name}.responses{process}")


def _saved_files(path):
    return list(path.parent.glob(f"{escape(_saved_file(path).name)}*"))


def load_responses(path):
    """Load the responses to the pair file `path` that were saved: dict, index of the question -> response."""
    responses = {}
    for file in _saved_files(path):
        try:
            # An interruption can cut the last line short: it has no line end then.
            rows = [parse_json(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
            if not all(fits(index, int) and fits(text, str) for index, text in rows):
                raise ValueError(file)
            responses |= dict(rows)
        except (ValueError, TypeError):
            print_once("Discarding saved responses that are damaged; asking those questions again")
    return responses


def merge_responses(path, responses):
    """Write loaded responses to one file, and remove the others."""
    lines = [json.dumps(item) for item in sorted(responses.items())]
    atomic_write_text(_saved_file(path), "".join(f"{line}\n" for line in lines))
    for file in _saved_files(path):
        if file != _saved_file(path):
            file.unlink()


@contextmanager
def save_responses(path, process):
    """Open this process's file of saved responses; yield a function (index, response) that saves one at once."""
    with _saved_file(path, f".{process}").open("w", encoding="utf-8") as file:

        def save(index, response):
            file.write(json.dumps([index, response]) + "\n")
            file.flush()

        yield save


def remove_responses(path):
    """Remove the saved responses that belong to the pair file `path`."""
    for file in _saved_files(path):
        file.unlink(missing_ok=True)  # another process may have removed it
