"""The truth signal of pairs: of known pairs, and at the command line."""

import random

import pytest
from support import BUNDLED, asking, call_here, pair, rows, write_rows

from grath.pairs.questions import load_questions
from grath.pairs.stats import pair_stats
from grath.pairs.truth import nearest_choice, truth_signal

CHOICES = ["the wind", "the Sun", "a magnet", "moving water and wind"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("It is the SUN.", 1),
        ("Magnets? No: a magnet!", 2),
        ("A magnet near the Sun", None),  # a tie
        ("Because of gravity", None),  # no common word
        ("It is the", None),  # stop words only
        ("wind", 0),
        ("water that moves, moving with wind", 3),
    ],
)
def test_the_nearest_choice(answer, expected):
    assert nearest_choice(answer, CHOICES) == expected


WORDS = ["iron", "water", "wood", "glass"]
QUESTIONS = [{"question": f"What is it? {i}", "choices": WORDS, "answer": i % 4} for i in range(200)]
# The correct answers mean the gold one in 60 of 100 cases, the incorrect ones in 20.
SIDES = [[WORDS[(i + (i % 100 >= right)) % 4] for i in range(200)] for right in (60, 20)]
PAIRS = [pair(f"What is it? {i}", f"the {a}", f"some {b}") for i, (a, b) in enumerate(zip(*SIDES, strict=True))]


def test_the_signal_and_its_interval():
    pairs = PAIRS + [pair("What is it? 0", "stone", "iron or water"), pair("unknown", "iron", "wood")]
    pairs += [pair("What is it? 1", "water", "water")] * 50  # DPO drops it
    found = truth_signal(pairs, QUESTIONS)
    assert (found["correct"], found["incorrect"]) == (pytest.approx(0.6), pytest.approx(0.2))
    assert found["decided"] == [200, 200] and found["undecided"] == [1, 1]
    assert found["signal"] == pytest.approx(0.4)
    low, high = found["interval"]
    # Both sides are right in 20 of 100 pairs and one is in 40, so a pair's difference has the deviation 0.49.
    width = 2 * 1.96 * 0.49 / 200**0.5
    assert low < 0.4 < high and high - low == pytest.approx(width, rel=0.1)
    assert truth_signal(pairs, QUESTIONS) == found
    shuffled = random.Random(1).sample(pairs, len(pairs))
    assert truth_signal(shuffled, QUESTIONS)["signal"] == pytest.approx(0.4)


def test_no_decided_answer_gives_none():
    assert truth_signal([], QUESTIONS) is None
    assert truth_signal(PAIRS, []) is None
    assert truth_signal([{**row, "incorrect": "stone"} for row in PAIRS], QUESTIONS) is None


def test_it_is_printed_after_the_pairs_are_written(tiny_llama, tmp_path):
    """The tiny model gives every question the same answers, each of which names a choice. Choices have any labels."""
    texts = ["light to grow", "a", "b", "c", "small stones"]
    kinds = ({"text": texts, "label": list("12345")}, {"text": texts[::4], "label": list("AE")})
    data = [{**row, "answerKey": "1E"[i % 2], "choices": kinds[i % 2]} for i, row in enumerate(rows(BUNDLED)[:6])]
    questions = write_rows(tmp_path / "q.jsonl", data)
    done = call_here(*asking(tiny_llama, tmp_path, "--data_path", questions, count=6))
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("truth signal +0.000 [")]
    assert "0.500 of 6 correct answers and 0.500 of 6 incorrect answers mean" in line


def test_it_is_of_the_pairs_that_dpo_trains_on(tmp_path):
    questions = load_questions(data_path=BUNDLED)[:6]
    texts = [(row["question"], row["choices"][row["answer"]], row["choices"][row["answer"] - 1]) for row in questions]
    write_rows(tmp_path / "x_True.json", [pair(question, wrong, wrong) for question, _, wrong in texts])
    assert pair_stats(tmp_path / "x_True.json", questions)["signal"] is None
    write_rows(tmp_path / "x_True_combined.json", [pair(*row) for row in texts])
    stats = pair_stats(tmp_path / "x_True.json", questions)
    assert stats["signal"] == "+1.000 [+1.000, +1.000]" and stats["identical"] == 6
    assert not stats["echoed"]


def test_answers_in_another_script_do_not_repeat_the_question(tmp_path):
    write_rows(tmp_path / "x_True.json", [pair("Почему небо синее?", "Из-за рассеяния света.", "Не знаю.")])
    assert pair_stats(tmp_path / "x_True.json")["echoed"] == 0
