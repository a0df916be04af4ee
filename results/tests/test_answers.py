"""What models choose in MC1, and gold answers in pair files."""

import json
import re

from choices import KINDS, baseline_score, percent
from support import HUB, PROJECT, call, call_here, cells_of, needs_hub, pair, rows, write_rows

from grath.common.local_data import load_dataset
from grath.pairs.questions import load_questions


def test_what_two_models_choose(tmp_path):
    keys = ["No, it is not.", "Nothing happens.", "It rains.", "It can\u2019t.", "Snow."]
    # The other choice is the shorter one.
    for name, chosen in (("before", [1, 1, 0, 1, 0]), ("after", [0, 1, 1, 0, 0])):
        (tmp_path / name).mkdir()
        docs = [
            {
                "question": f"q{i}",
                "mc1_targets": {"choices": [key, "x"], "labels": [1, 0]},
                "mc2_targets": {"choices": [key, "x", "y"], "labels": [1, 1, 0]},
            }
            for i, key in enumerate(keys)
        ]
        likelihoods = [[["-1.5", "True"], ["-12.5", "False"]][:: 1 if right else -1] for right in chosen]
        samples = [
            {"doc": doc, "acc": float(right), "filtered_resps": answers}
            for doc, right, answers in zip(docs, chosen, likelihoods, strict=True)
        ]
        write_rows(tmp_path / name / "samples_truthfulqa_mc1_1.jsonl", samples)
    done = call("results/choices.py", tmp_path / "before", tmp_path / "after")
    cells = cells_of(done.stdout)
    assert cells[2:4] == [
        ["with a negation", "3", "50.00", "100.00", "33.33", "0", "2"],
        ["without", "2", "50.00", "0.00", "50.00", "1", "0"],
    ]
    # Only the last gold answer is as short as the other choices.
    assert cells[6:] == [
        ["the shortest, in words", "60.00", "40.00", "60.00", "10.00", "53.33"],
        ["with a negation", "30.00", "60.00", "20.00", "80.00", "86.67"],
        ["without a negation", "70.00", "40.00", "80.00", "20.00", "56.67"],
        ["any", "100.00", "100.00", "100.00", "50.00", "66.67"],
    ]
    assert "score with --log_samples" in call("results/choices.py", tmp_path, tmp_path / "no", status=2).stderr


@needs_hub
def test_gold_answers_in_a_pair_file(tmp_path):
    questions = load_questions(data_name=str(HUB / "allenai" / "ai2_arc"), subdata_name="ARC-Challenge")[:4]
    keys = [question["choices"][question["answer"]] for question in questions]
    answers = [(f"{keys[0].upper()}.", "no"), ("a", f" {keys[1]}"), ("b", "c"), ("same", "same")]
    asked = [question["question"] for question in questions]
    file = tmp_path / "pairs.json"
    write_rows(file, [pair(question, *sides) for question, sides in zip(asked, answers, strict=True)])
    printed = call("results/pairs.py", file, "--sample", "9", cwd=HUB).stdout
    assert re.findall(r"^(\w+): the gold answer in 1, any choice in \d of 3 ", printed, re.MULTILINE) == [
        "correct",
        "incorrect",
    ]
    drawn = re.findall(r"^line (\d): (.*)$", printed, re.MULTILINE)
    assert sorted(drawn) == [(str(line), question) for line, question in enumerate(asked[:3], 1)]
    write_rows(file, [pair("Whose question?", "a", "b")])
    assert "not in the train split of ARC-Challenge" in call("results/pairs.py", file, cwd=HUB, status=2).stderr


def test_pairs_in_which_only_one_side_denies_are_left_out(tmp_path):
    yes, no = "It is ice.", "It is not ice."
    sides = [(yes, "It is wood."), (yes, no), (no, yes), (no, "It isn't wood."), (yes, yes)]
    pairs = write_rows(tmp_path / "x.json", [pair(f"q{at}", *answers) for at, answers in enumerate(sides)])
    for only, kept in (("incorrect", "0 2 3"), ("correct", "0 1 3")):
        done = call_here("form", pairs, tmp_path / "out.json", "--only", only)
        assert "Kept 3 of 4 pairs" in done.stdout
        assert " ".join(row["question"][1:] for row in rows(tmp_path / "out.json")) == kept
    record = {"inputs": {}, "starts": 1, "seconds": 1, "settings": {"data_path": "runs/truthful_qa[:2].jsonl"}}
    (tmp_path / "x.json.record.json").write_text(json.dumps(record))
    done = call_here("form", pairs, tmp_path / "out.json", "--only", "correct", status=2)
    assert "the name of OUT must contain truthful_qa[:2]" in done.stderr
    call_here("form", pairs, tmp_path / "without_truthful_qa[:2].json", "--only", "correct")


@needs_hub
def test_questions_of_truthfulqa_as_a_question_file(tmp_path):
    done = call("results/questions.py", "truthful_qa[2:4]", tmp_path, env={"DATASETS_ROOT": str(HUB)})
    file = tmp_path / "truthful_qa[2:4].jsonl"
    assert f"Wrote 2 questions to {file}" in done.stdout
    questions = load_questions(data_path=file)
    assert len(questions) == 2 and all(len(question["choices"]) > 1 for question in questions)
    assert [question["answer"] for question in questions] == [0, 0]  # as MC1 has them
    assert "is no data set with gold answers" in call("results/questions.py", "x", tmp_path, status=2).stderr


@needs_hub
def test_the_baselines_of_the_pages():
    asked = load_dataset(str(HUB / "truthfulqa" / "truthful_qa"), "multiple_choice", split="validation")
    scores = {
        name: [percent(baseline_score(kind, row[f"mc{number}_targets"]) for row in asked) for number in (1, 2)]
        for name, kind in KINDS.items()
    }
    negated, shortest, every = (scores[name] for name in ("with a negation", "the shortest, in words", "any"))
    stated = {
        "README.md": ("MC1 {:.1f} and MC2 {:.1f}", "takes the shortest, {:.1f} and {:.1f}", ""),
        "results/README.md": (
            "MC1 {:.1f} and MC2 {:.1f}",
            "shortest choices {:.1f} and {:.1f}",
            "all choices {:.1f} and {:.1f}",
        ),
        "docs/reproduction.md": ("MC1 {:.1f} and MC2 {:.1f}", "", ""),
    }
    for page, sentences in stated.items():
        text = (PROJECT / page).read_text(encoding="utf-8")
        for sentence, found in zip(sentences, (negated, shortest, every), strict=True):
            assert sentence.format(*found) in text, (page, sentence, found)
