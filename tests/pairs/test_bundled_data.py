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
DEMOS = ("truthfulqa", "halueval", "misconceptions")


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


@pytest.mark.parametrize("name", DEMOS)
def test_few_shot_examples(name):
    demos = load_demos(name)
    assert len(demos) == 6
    assert all(demo["correct"] != demo["incorrect"] for demo in demos)
    if name == "halueval":
        assert all(len(demo["correct"].split()) < 4 < len(demo["incorrect"].split()) for demo in demos)
    if name == "misconceptions":  # incorrect answers contain a negation no more often than correct ones
        assert negated([demo["correct"] for demo in demos]) == 0.5
        assert negated([demo["incorrect"] for demo in demos]) <= 0.5


def sequences(text):
    """Every eight words in a row."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}


@needs_hub
def test_nothing_comes_from_arc_or_truthfulqa():
    theirs = [text for file in HUB.rglob("*.parquet") for text in pandas.read_parquet(file)["question"]]
    demos = [demo for name in DEMOS for demo in load_demos(name)]
    ours = [row["question"] for row in (*rows(BUNDLED), *rows(TRUTHFULNESS), *demos)]
    known = set().union(*map(sequences, theirs))
    assert not [question for question in ours if question in theirs or sequences(question) & known]
