"""Stage 1 and 2 at the command line: pair files and their splice; then the functions they stand on."""

import json

import pytest
from conftest import BUNDLED, CORRECT, HUB, INCORRECT, call, needs_hub, pair, rows, write_rows

from grath.pairs import is_complete, parse_reply
from grath.questions import draw_candidates, load_questions


def ask(model, folder, *flags, cwd=None):
    call(
        "create_pair_responses.py", "--model_name_or_path", model, "--save_prefix", "iter0_arcc", "--save_dir", folder,
        "--precision", "fp32", *flags, **({"cwd": cwd} if cwd else {}),
    )  # fmt: skip
    (path,) = folder.iterdir()
    return path


@pytest.mark.parametrize("flags", [["--useFS"], [], ["--useGT", "--useFS"], ["--useGT"]], ids=" ".join)
def test_the_papers_commands(tiny_llama, tmp_path, flags):
    path = ask(tiny_llama, tmp_path / "out", "--data_path", BUNDLED, "--num_query", "4", *flags)
    assert path.name == f"iter0_arcc_num_4_useGT_{'--useGT' in flags}_useFS_{'--useFS' in flags}.json"
    asked = [row["question"] for row in rows(BUNDLED)[:4]]
    assert rows(path) == [pair(question, CORRECT, INCORRECT) for question in asked]


@needs_hub
def test_real_arc_by_its_hub_name(tiny_llama, tmp_path):
    path = ask(tiny_llama, tmp_path / "out", "--num_query", "5", "--useGT", cwd=HUB)
    assert path.name == "iter0_arcc_num_5_useGT_True_useFS_False.json"
    assert 0 < len(rows(path)) <= 5


def test_any_labels_and_numbers_of_choices(tiny_llama, tmp_path):
    numbered = {"text": ["ice", "steam", "rain"], "label": ["1", "2", "3"]}
    five = {"text": list("vwxyz"), "label": ["A", "B", "C", "D", "E"]}
    data = [
        {"id": "a", "question": "What is frozen?", "choices": numbered, "answerKey": "1"},
        {"id": "b", "question": "What comes last?", "choices": five, "answerKey": "E"},
    ]
    path = ask(tiny_llama, tmp_path / "out", "--data_path", write_rows(tmp_path / "q.jsonl", data), "--useGT")
    assert len(rows(path)) == 2
    first, second = load_questions(data_path=tmp_path / "q.jsonl")
    assert draw_candidates(first, 0)[0] == "ice"
    assert draw_candidates(second, 0)[0] == "z"


def test_the_same_bytes_at_every_batch_size(tiny_llama, tmp_path):
    files = [
        ask(tiny_llama, tmp_path / size, "--data_path", BUNDLED, "--num_query", "9", "--batch_size", size, "--useFS")
        for size in ("1", "4", "32")
    ]
    assert len({file.read_bytes() for file in files}) == 1


def test_candidates_depend_on_seed_and_question_only():
    questions = load_questions(data_path=BUNDLED)
    drawn = [draw_candidates(question, 0) for question in questions]
    assert [draw_candidates(question, 0) for question in reversed(questions)] == drawn[::-1]
    assert [draw_candidates(question, 1) for question in questions] != drawn
    for question, (correct, incorrect) in zip(questions, drawn, strict=True):
        assert correct == question["choices"][question["answer"]]
        assert incorrect in question["choices"]
        assert incorrect != correct


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Question: q\nCorrect answer: yes \nIncorrect answer: no\nmore", (("yes", "no"), None)),
        ("Correct answer: yes\r\n\r\nIncorrect answer: no", (("yes", "no"), None)),
        ("Correct answer: yes\nIncorrect answer: no\nCorrect answer: other", (("yes", "no"), None)),
        ("Incorrect answer: no", (None, "no correct answer")),
        ("Correct answer: yes\nWrong answer: no", (None, "no incorrect answer")),
        ("Correct answer:\nIncorrect answer: no", (None, "empty answer")),
        ("Correct answer: yes\nIncorrect answer: \nno", (None, "empty answer")),
        ("Correct answer: one\ntwo\nIncorrect answer: no", (None, "correct answer of several lines")),
    ],
)
def test_parsing(reply, expected):
    assert parse_reply(reply) == expected
    cuts = [reply[:end] for end in range(len(reply)) if is_complete(reply[:end])]
    assert all(parse_reply(cut) == expected for cut in cuts)


def test_a_reply_is_complete_when_its_second_answer_has_ended():
    reply = "Question: q\nCorrect answer: yes\nIncorrect answer: no\nmore"
    assert is_complete(reply)
    assert is_complete(reply[: -len("more")])
    assert not is_complete(reply[: -len("\nmore")])


def combine(new, ori, status=0):
    return call("combine_new_correct_ori_wrong.py", "--new_data_path", new, "--ori_data_path", ori, status=status)


def test_splice(tmp_path):
    ori = [pair("a", "a0", "wa"), pair("b", "b0", "wb"), pair("a", "a0 again", "wa again"), pair("c", "c0", "wc")]
    new = [pair("c", "c1", "x"), pair("a", "a1", "x"), pair("a", "a2", "x"), pair("d", "d1", "x")]
    ori_path = write_rows(tmp_path / "iter0.json", ori)
    new_path = write_rows(tmp_path / "iter1.json", new)
    done = combine(new_path, ori_path)
    assert rows(tmp_path / "iter1_combined.json") == [
        pair("a", "a1", "wa"), pair("b", "b0", "wb"), pair("a", "a1", "wa again"), pair("c", "c1", "wc")
    ]  # fmt: skip
    assert "1 kept because the new file has none" in done.stdout


def test_splice_of_strangers_is_refused(tmp_path):
    ori = write_rows(tmp_path / "iter0.json", [pair("a", "b", "c")])
    new = write_rows(tmp_path / "iter1.json", [pair("x", "y", "z")])
    done = combine(new, ori, status=2)
    assert "no question in common" in done.stderr
    assert not (tmp_path / "iter1_combined.json").exists()


def test_unparsed_replies_are_dropped_and_counted(tmp_path, tiny_llama):
    done = call(
        "create_pair_responses.py", "--model_name_or_path", tiny_llama, "--save_prefix", "x", "--save_dir",
        tmp_path / "out", "--data_path", BUNDLED, "--num_query", "3", "--precision", "fp32", "--max_new_tokens", "5",
        status=2,
    )  # fmt: skip
    assert "dropped, no " in done.stdout
    assert "not one of 3 replies could be parsed" in done.stderr
    assert not (tmp_path / "out").exists()
    assert json.dumps(done.stderr).count("error") == 1
