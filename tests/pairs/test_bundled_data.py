"""The bundled question set, truthfulness set and few-shot examples."""

import re
from collections import Counter

import pandas
import pytest
from support import BUNDLED, HUB, PROJECT, needs_hub, rows

from grath.pairs.prompts import load_demos
from grath.pairs.questions import load_questions
from grath.pairs.stats import negated

TRUTHFULNESS = PROJECT / "data" / "truthfulness_mc.jsonl"


def test_questions():
    data = rows(BUNDLED)
    assert len(load_questions(data_path=BUNDLED)) == len({row["question"] for row in data}) == 160
    assert all(row["choices"]["label"] == list("ABCD") for row in data)
    assert all(len(set(row["choices"]["text"])) == 4 for row in data)
    assert Counter(row["answerKey"] for row in data) == dict.fromkeys("ABCD", 40)


def test_truthfulness_set():
    data = rows(TRUTHFULNESS)
    assert len({row["question"] for row in data}) == 100
    for row in data:
        one, many = row["mc1_targets"], row["mc2_targets"]
        assert one["labels"] == [1] + [0] * (len(one["labels"]) - 1)
        assert len(one["labels"]) == len(one["choices"])
        assert {0, 1} == set(many["labels"])
        assert len(many["labels"]) == len(set(many["choices"]))
        assert len({*one["choices"], *many["choices"]}) <= 8


@pytest.mark.parametrize("name", ["truthfulqa", "halueval", "misconceptions"])
def test_few_shot_examples(name):
    demos = load_demos(name)
    assert len(demos) == 6
    assert all(demo["correct"] != demo["incorrect"] for demo in demos)
    if name == "halueval":
        assert all(len(demo["correct"].split()) < 4 < len(demo["incorrect"].split()) for demo in demos)
    if name == "misconceptions":  # incorrect answers contain a negation no more often than correct ones
        assert negated([demo["correct"] for demo in demos]) == 0.5
        assert negated([demo["incorrect"] for demo in demos]) <= 0.5


def _sequences(text, length):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def bundled_texts():
    """Every question and answer of the bundled sets."""
    for row in rows(BUNDLED):
        yield from (row["question"], *row["choices"]["text"])
    for row in rows(TRUTHFULNESS):
        yield from (row["question"], *row["mc1_targets"]["choices"], *row["mc2_targets"]["choices"])


@needs_hub
def test_nothing_comes_from_arc_or_truthfulqa():
    arc = HUB / "allenai" / "ai2_arc" / "ARC-Challenge"
    theirs = [question for file in arc.glob("*.parquet") for question in pandas.read_parquet(file)["question"]]
    truthful = pandas.read_parquet(next((HUB / "truthfulqa").rglob("*.parquet")))
    theirs += list(truthful["question"])
    known = set().union(*(_sequences(question, 8) for question in theirs))
    ours = [row["question"] for row in rows(BUNDLED) + rows(TRUTHFULNESS)]
    ours += [demo["question"] for name in ("truthfulqa", "halueval", "misconceptions") for demo in load_demos(name)]
    assert not [question for question in ours if _sequences(question, 8) & known]
    assert not set(ours) & set(theirs)
    answers = {choice for row in truthful["mc2_targets"] for choice in row["choices"]}
    # The misconceptions share no five words with TruthfulQA or with the bundled sets, in questions or in answers.
    known = set().union(*(_sequences(text, 5) for text in [*truthful["question"], *answers, *bundled_texts()]))
    texts = [text for demo in load_demos("misconceptions") for text in demo.values()]
    assert not [text for text in texts if _sequences(text, 5) & known]
    assert not [c for row in rows(TRUTHFULNESS) for c in row["mc2_targets"]["choices"] if c in answers]
