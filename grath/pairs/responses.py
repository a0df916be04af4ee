"""The model's responses: parse them, save each one at once, and load the saved ones to resume."""

import json
import re
from collections import Counter
from contextlib import contextmanager
from glob import escape

from grath.common.files import fits, parse_json
from grath.modeling.devices import print_once

QUESTION, CORRECT, INCORRECT = "Question:", "Correct answer:", "Incorrect answer:"
# What a reasoning model puts around its reasoning: <think>, [THINK], <|begin_of_thought|>, and how it ends.
_KIND = r"(?:think|thought|reason|reflect|analysis|scratchpad)\w*\|?[>\]]"
OPENING = re.compile(rf"^[ \t]*[<\[]\|?(?:begin_of_)?{_KIND}", re.IGNORECASE | re.MULTILINE)
CLOSING = re.compile(rf"[<\[]\|?(?:/|end_of_){_KIND}", re.IGNORECASE)


def opens_reasoning(prompt):
    """Return the line with which a prompt (str) begins the model's reasoning, or an empty string."""
    last = prompt.rstrip().rpartition("\n")[2]
    return f"{last}\n" if OPENING.fullmatch(last) else ""


def parse_response(response):
    """Extract the two answers from a response: its last pair of lines about the question, after any reasoning.

    Returns:
        ((correct, incorrect), None), or (None, reason) if the response does not parse.
    """
    start = max((tag.end() for tag in CLOSING.finditer(response)), default=0)
    if OPENING.search(response, start):
        return None, "reasoning without an end"
    lines = [line.strip().lstrip("*") for line in re.split(r"[\r\n]", response[start:]) if line.strip()]
    pairs = [(number, *found) for number in range(len(lines)) if (found := _pair_at(lines, number))]
    if not pairs:
        found = any(CORRECT in line for line in lines)
        return None, "no incorrect answer after the correct one" if found else "no correct answer"
    # A model may go on with a question of its own.
    asked = [number for number, line in enumerate(lines) if line.startswith(QUESTION)]
    own = next((lines[number] for number in reversed(asked) if number < pairs[0][0]), None)
    end = next((number for number in asked if number > pairs[0][0] and lines[number] != own), len(lines))
    correct, incorrect = next(answers for number, *answers in reversed(pairs) if number < end)
    if not correct or not incorrect:
        return None, "empty answer"
    if any(label in answer for label in (CORRECT, INCORRECT) for answer in (correct, incorrect)):
        return None, "a label in an answer"
    return (correct, incorrect), None


def _pair_at(lines, number):
    """Return the answers of the pair that begins in a line, or None; both can be in one line."""
    if not lines[number].startswith(CORRECT):
        return None
    correct, label, incorrect = lines[number].removeprefix(CORRECT).partition(INCORRECT)
    following = lines[number + 1 : number + 3]
    if not label:
        if not correct.strip("* ") and following and not following[0].startswith(INCORRECT):
            correct = following.pop(0)
        if not following or not following[0].startswith(INCORRECT):
            return None
        incorrect = following[0].removeprefix(INCORRECT)
    return correct.lstrip("*").strip(), incorrect.lstrip("*").strip()


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


def _saved_files(path):
    """Return the files of the responses to a pair file. Each line: [index, response]."""
    return list(path.parent.glob(f".{escape(path.name)}.responses*"))


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


@contextmanager
def save_responses(path, name):
    """Open a new file of saved responses; yield a function (index, response) that saves one at once.

    Each process of each start gives its own `name` for the file.
    """
    with path.with_name(f".{path.name}.responses.{name}").open("w", encoding="utf-8") as file:

        def save(index, response):
            file.write(json.dumps([index, response]) + "\n")
            file.flush()

        yield save


def remove_responses(path):
    """Remove the saved responses that belong to the pair file `path`."""
    for file in _saved_files(path):
        file.unlink(missing_ok=True)  # another process may have removed it
