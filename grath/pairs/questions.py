"""Load questions in the ARC schema, draw candidates from their choices, and make pairs from gold answers.

A question is a dict: `question` (str), `choices` (list of str), `answer` (index of the gold answer).
"""

import random
import re
import sys

from grath.common.errors import UserError
from grath.common.files import fits, read_json_lines
from grath.common.local_data import load_dataset

TRUTHFULQA = "truthful_qa"
# Data sets with gold answers: name on the command line -> (hub name, configuration, split).
LABELED_DATASETS = {
    "ai2_arc/ARC-Challenge": ("allenai/ai2_arc", "ARC-Challenge", "train"),
    "ai2_arc/ARC-Easy": ("allenai/ai2_arc", "ARC-Easy", "train"),
    TRUTHFULQA: ("truthfulqa/truthful_qa", "multiple_choice", "validation"),
}
# One of these names, and which of its rows: `truthful_qa[:200]`, as in `datasets`.
LABELED = re.compile(rf"({'|'.join(LABELED_DATASETS)})(\[\d*:\d*\])?")


def load_questions(data_name=None, subdata_name=None, split="train", data_path=None):
    """Load all questions of a hub data set in the ARC schema, or of the local JSON-lines file `data_path`.

    Raises:
        UserError: the data set cannot be loaded or is empty, or a row does not have the schema.
    """
    if data_path:
        rows, where = read_json_lines(data_path, "the question file"), str(data_path)
    else:
        where = "/".join(part for part in (data_name, subdata_name) if part)
        rows = load_dataset(data_name, subdata_name or None, split=split)
    return [_question(row, f"{where}, row {number}") for number, row in enumerate(rows, start=1)]


def load_preferences(name, seed):
    """Load pairs of gold answers (a list, see `gold_pairs`), or a hub data set in TRL's preference format."""
    if LABELED.fullmatch(name):
        return gold_pairs(name, seed)
    rows = load_dataset(name, split="train")
    kinds = (str, [{"role": re.compile("system|developer|user|assistant|tool|function"), "content": str}])
    shapes = [{"chosen": turns, "rejected": turns, "prompt?": turns} for turns in kinds]
    for number, row in enumerate(rows, start=1):
        shapes = [shape for shape in shapes if fits(row, shape)]
        if not (shapes and row["chosen"] and row["rejected"]):
            raise UserError(
                f"{name}, row {number}: prompt, chosen and rejected must be all texts, or all messages of the system, "
                "the user and the assistant, as in TRL's format"
            )
    return rows


def _question(row, where):
    sound = fits(row, {"question": str, "choices": {"text": [str], "label": [object]}, "answerKey": object})
    texts = [row["question"], *row["choices"]["text"]] if sound else [""]
    if not all(text.strip() for text in texts) or len(texts) != 1 + len(row["choices"]["label"]):
        raise UserError(f"{where}: not in the ARC schema (question, choices with text and label, answerKey)")
    (question, *choices), labels, gold = texts, row["choices"]["label"], row["answerKey"]
    if labels.count(gold) != 1:
        raise UserError(f"{where}: answerKey {gold!r} must be one of the labels {labels}, and only once")
    if len(choices) < 2:
        raise UserError(f"{where}: has only one choice")
    return {"question": question.strip(), "choices": choices, "answer": labels.index(gold)}


def draw_candidates(question, seed):
    """Return the gold answer and one of the other choices, drawn by `seed` and the question's text alone.

    Returns:
        (correct, incorrect): two strings.
    """
    others = [text for i, text in enumerate(question["choices"]) if i != question["answer"]]
    drawn = random.Random(f"{seed}\n{question['question']}").choice(others)
    return question["choices"][question["answer"]], drawn


def load_labeled(name):
    """Load the questions of a name that matches `LABELED`, those of TruthfulQA with MC1's choices."""
    found = LABELED.fullmatch(name)
    hub_name, configuration, split = LABELED_DATASETS[found[1]]
    where = (hub_name, configuration, split + (found[2] or ""))
    if found[1] != TRUTHFULQA:
        return load_questions(*where)
    questions = []
    for number, row in enumerate(load_dataset(hub_name, configuration, split=where[2]), start=1):
        if not fits(row, {"question": str, "mc1_targets": {"choices": [str], "labels": [int]}}):
            raise UserError(f"{hub_name} is not TruthfulQA: a row has no question with mc1_targets")
        targets = row["mc1_targets"]
        of_arc = {"choices": {"text": targets["choices"], "label": targets["labels"]}, "answerKey": 1}
        questions.append(_question(row | of_arc, f"{hub_name}, row {number}"))
    return questions


def gold_pairs(name, seed):
    """Make pairs from a set that matches `LABELED`: the gold answer is correct; `seed` draws the incorrect one."""
    if name.startswith(TRUTHFULQA):
        print(
            "warning: truthful_qa is the TruthfulQA test set: scores on what was trained on mean nothing",
            file=sys.stderr,
        )
    pairs = [(question["question"], *draw_candidates(question, seed)) for question in load_labeled(name)]
    return [{"question": question, "correct": right, "incorrect": wrong} for question, right, wrong in pairs]
