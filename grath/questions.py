"""Questions of the ARC schema, the candidates drawn from their choices, and the request that is put to the model.

A question is a dict: `question` (str), `choices` (list of str), `answer` (index of the correct choice).
"""

import json
import random
import sys
from pathlib import Path

from grath.cli import PROJECT, UserError, explain_system_error, first_line, in_root, read_json_lines

DEMO_FIELDS = ("question", "candidate_correct", "candidate_incorrect", "correct", "incorrect")

# The sets whose key tells the chosen answer: name on the command line -> (hub name, configuration, split).
KEYED_SETS = {
    "ai2_arc/ARC-Challenge": ("allenai/ai2_arc", "ARC-Challenge", "train"),
    "ai2_arc/ARC-Easy": ("allenai/ai2_arc", "ARC-Easy", "train"),
    "truthful_qa": ("truthfulqa/truthful_qa", "multiple_choice", "validation"),
}

REQUEST = (
    "Answer the question below twice, once correctly and once incorrectly. Write three lines that begin with "
    '"Question:", "Correct answer:" and "Incorrect answer:".\n\nQuestion: {question}'
)
CANDIDATES = "\nCandidate correct answer: {correct}\nCandidate incorrect answer: {incorrect}"
REPLY = "Question: {question}\nCorrect answer: {correct}\nIncorrect answer: {incorrect}"


def load_questions(data_name=None, subdata_name=None, split="train", data_path=None):
    """All questions of a hub data set in ARC's schema, or of the local JSON-lines file `data_path`.

    Raises:
        UserError: the data set cannot be had, is empty, or a row does not have the schema.
    """
    if data_path:
        rows, where = read_json_lines(data_path, "the question file"), str(data_path)
    else:
        where = "/".join(part for part in (data_name, subdata_name) if part)
        rows = load_hub_split(data_name, subdata_name, split)
    return [_question(row, f"{where}, row {number}") for number, row in enumerate(rows, start=1)]


def load_hub_split(data_name, subdata_name, split):
    """One split of a hub data set, or of a local folder of that name, as `datasets.Dataset`."""
    from grath.local_data import load_dataset

    try:
        return load_dataset(in_root(data_name), subdata_name or None, split=split)
    except Exception as error:  # the hub client, the file readers and the builders each raise their own kinds
        if explain_system_error(error):
            raise
        raise UserError(
            f"cannot load the split {split} of {data_name} {subdata_name or ''}: {first_line(error)} "
            "(give a hub name, or set DATASETS_ROOT to a folder that prefetch.sh has filled)"
        ) from error


def _question(row, where):
    try:
        question, choices, key = row["question"], row["choices"]["text"], row["answerKey"]
        labels = row["choices"]["label"]
        texts = [question, *choices]
        sound = all(isinstance(text, str) and text.strip() for text in texts) and len(choices) == len(labels)
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise UserError(f"{where}: not in ARC's schema (question, choices with text and label, answerKey)")
    if key not in labels:
        raise UserError(f"{where}: the answer key {key!r} is none of its labels {list(labels)}")
    if len(choices) < 2:
        raise UserError(f"{where}: has one choice only")
    return {"question": question.strip(), "choices": list(choices), "answer": list(labels).index(key)}


def draw_candidates(question, seed):
    """The keyed choice, and one of the others drawn by `seed` and the question's text alone.

    Returns:
        (correct, incorrect): two strings.
    """
    others = [text for i, text in enumerate(question["choices"]) if i != question["answer"]]
    drawn = random.Random(f"{seed}\n{question['question']}").choice(others)
    return question["choices"][question["answer"]], drawn


def load_demos(name):
    """The demonstrations of `demos/{name}.json`, or of the JSON file `name`: list of dicts with `DEMO_FIELDS`."""
    path = PROJECT / "demos" / f"{name}.json"
    path = path if path.is_file() else Path(name)
    try:
        demos = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError:
        known = ", ".join(sorted(file.stem for file in (PROJECT / "demos").glob("*.json")))
        raise UserError(f"--demos {name}: neither a known set ({known}) nor a readable file") from None
    except ValueError:
        raise UserError(f"--demos {name}: not a JSON file in UTF-8") from None
    sound = isinstance(demos, list) and demos and all(isinstance(demo, dict) for demo in demos)
    if not sound or not all(isinstance(demo.get(field), str) for demo in demos for field in DEMO_FIELDS):
        raise UserError(f"--demos {name}: must be a list of objects with the strings {', '.join(DEMO_FIELDS)}")
    return demos


def request(question, candidates=None):
    """The user turn that asks for a pair of answers; `candidates` is (correct, incorrect) or None."""
    text = REQUEST.format(question=question)
    if candidates:
        text += CANDIDATES.format(correct=candidates[0], incorrect=candidates[1])
    return text


def build_messages(question, seed, use_gt, demos=()):
    """The conversation that asks for a pair: one user and one assistant turn a demonstration, then the request."""
    messages = []
    for demo in demos:
        drawn = (demo["candidate_correct"], demo["candidate_incorrect"]) if use_gt else None
        messages.append({"role": "user", "content": request(demo["question"], drawn)})
        messages.append({"role": "assistant", "content": REPLY.format(**demo)})
    drawn = draw_candidates(question, seed) if use_gt else None
    messages.append({"role": "user", "content": request(question["question"], drawn)})
    return messages


def keyed_pairs(name, seed):
    """Pairs of a set of `KEYED_SETS`: the keyed answer as correct, a seeded draw from the others as incorrect."""
    hub = KEYED_SETS[name]
    if name == "truthful_qa":
        print("warning: truthful_qa is the TruthfulQA test set; scores on it will mean nothing", file=sys.stderr)
        questions = [
            {
                "question": row["question"],
                "choices": row["mc1_targets"]["choices"],
                "answer": row["mc1_targets"]["labels"].index(1),
            }
            for row in load_hub_split(*hub)
        ]
    else:
        questions = load_questions(*hub)
    drawn = [draw_candidates(question, seed) for question in questions]
    return [
        {"question": question["question"], "correct": correct, "incorrect": incorrect}
        for question, (correct, incorrect) in zip(questions, drawn, strict=True)
    ]
