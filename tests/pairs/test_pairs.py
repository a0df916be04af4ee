"""Stages 1 and 2 at the command line: write and combine pair files; then the functions that they use."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from support import BUNDLED, PROJECT, asking, call, call_here, change_json, pair, rows, wait_for, write_rows

from grath.pairs.questions import draw_candidates, load_questions
from grath.pairs.responses import CUT, opens_reasoning, parse_response

DRAFT, FINAL = "Correct answer: maybe\nIncorrect answer: never", "Correct answer: yes\nIncorrect answer: no"


def ask(model, folder, *flags, **options):
    call_here(*asking(model, folder, *flags, **options))
    (path,) = (path for path in folder.iterdir() if not path.name.endswith(".record.json"))
    return path


@pytest.mark.slow
def test_the_same_bytes_at_every_batch_size_and_number_of_processes(smollm2, tmp_path):
    """On a model whose answers depend on the question."""
    one = ask(smollm2, tmp_path / "one", "--useFS", "--batch_size", "4", count=5)
    assert len({row["correct"] for row in rows(one)}) == len(rows(one)) > 3
    done = call(
        "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1",
        *asking(smollm2, tmp_path / "two", "--useFS", "--batch_size", "1", count=5),
    )  # fmt: skip
    assert done.stdout.count("Asking 3 questions") == 1
    path = tmp_path / "two" / one.name
    assert path.name == one.name and path.read_bytes() == one.read_bytes()


def test_a_kill_loses_no_finished_question_and_other_settings_are_refused_then(tiny_llama, tmp_path):
    flags = ("--batch_size", "1", "--useFS", "--save_prefix", "a[1]")
    expected = ask(tiny_llama, tmp_path / "whole", *flags, count=60)
    command = asking(tiny_llama, tmp_path / "killed", *flags, count=60)

    def saved():
        """The responses of the first process, and how many these are."""
        files = list((tmp_path / "killed").glob(".a*.responses.*"))
        return (files[0], files[0].read_text().count("\n")) if files else (None, 0)

    with subprocess.Popen([sys.executable, *map(str, command)], cwd=PROJECT, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: saved()[1] >= 5, process)
        process.kill()
    kept, finished = saved()
    assert 5 <= finished < 60
    assert not (kept.parent / expected.name).exists()
    first, others = kept.read_text().split("\n", 1)
    number = json.loads(first)[0]
    first = json.dumps([number, "Correct answer: kept\nIncorrect answer: too"])
    kept.write_text(f'{first}\n{others}[59, "cut sho')  # what a kill in the middle of a line leaves
    others = kept.with_name(".y_num_60_useGT_False_useFS_True.json.responses.1.0")
    others.touch()

    done = call_here(*command, "--max_new_tokens", "50", status=2)
    assert "max_new_tokens 100, not 50" in done.stderr and kept.exists()
    done = call_here(*command)
    assert f"{finished} of 60 questions were answered before the interruption" in done.stdout
    assert f"\n{60 - finished} questions in " in done.stdout
    record = f"{expected.name}.record.json"
    assert {file.name for file in kept.parent.iterdir()} == {expected.name, record, others.name}
    written, whole = (path.read_text().splitlines() for path in (kept.parent / expected.name, expected))
    assert json.loads(written.pop(number))["correct"] == "kept" != json.loads(whole.pop(number))["correct"]
    assert written == whole
    record = json.loads((kept.parent / record).read_text())
    assert record["starts"] == 2 and record["counts"] == {"asked": 60, "written": 60, "identical": 0}


def test_a_finished_file_is_not_written_again_and_another_is_refused(tiny_llama, model, tmp_path):
    questions = write_rows(tmp_path / "q.jsonl", rows(BUNDLED)[:3])
    command = asking(tiny_llama, tmp_path / "out", "--data_path", questions, "--useFS", count=3)
    call_here(*command)
    (path,) = (tmp_path / "out").glob("*_True.json")
    written, when = path.read_bytes(), path.stat().st_mtime_ns
    # In a process of its own: it imports no torch.
    done = call(sys.executable, "-X", "importtime", PROJECT / command[0], *command[1:], env={"PYTHONPATH": ""})
    assert f"{path} contains these pairs, finished" in done.stdout
    assert not re.search(r"^import time:.*\| +torch$", done.stderr, re.MULTILINE)
    # Copies of the model and of the few-shot examples are the same.
    demos = shutil.copy(PROJECT / "demos" / "truthfulqa.json", tmp_path)
    assert "finished" in call_here(*command, "--model_name_or_path", model, "--demos", demos).stdout
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(template + " ")
    other_questions = write_rows(tmp_path / "other.jsonl", rows(BUNDLED)[3:6])
    for flags, said in (
        (("--max_new_tokens", "50"), "max_new_tokens 100, not 50"),
        (("--precision", "bf16"), "precision fp32, not bf16"),
        (("--model_type", "llama2"), "model_type auto, not llama2"),
        (("--demos", "halueval"), "demos truthfulqa, not halueval"),
        (("--data_path", other_questions), "questions "),
        (("--model_name_or_path", model), "model base chat_template.jinja "),
    ):
        done = call_here(*command, *flags, status=2)
        assert f"{path} was made with {said}" in done.stderr and "pass --overwrite to replace it" in done.stderr
    edited = path.read_text().replace("light", "dark")
    path.write_text(edited)
    done = call_here(*command, status=2)
    assert f"{path} is not the file that was written: pass --overwrite" in done.stderr
    train = ("dpo.py", "--dataset_path", path, "--model_name_or_path", tiny_llama, "--output_dir", tmp_path / "m")
    assert f"{path} is not the file that was written" in call_here(*train, status=2).stderr
    assert path.read_text() == edited
    call_here(*command, "--overwrite")
    assert path.read_bytes() == written and path.stat().st_mtime_ns != when
    (tmp_path / "out" / f"{path.name}.record.json").unlink()
    assert "has no record of what it was made from" in call_here(*command, status=2).stderr
    assert path.read_bytes() == written


def test_an_unsupported_model_falls_back_to_generate(tiny_llama, model, tmp_path):
    narrow = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}
    change_json(model / "config.json", **narrow)
    done = call_here(*asking(model, tmp_path / "out", "--max_new_tokens", "60"), status=None)
    line = next(line for line in done.stdout.splitlines() if "plain batched generation" in line)
    assert "its sliding window of 64 tokens is shorter than a sequence of" in line
    plain = ask(tiny_llama, tmp_path / "a", "--engine", "generate")
    engine = ask(tiny_llama, tmp_path / "b")
    assert plain.read_bytes() == engine.read_bytes()


def test_reasoning_that_the_prompt_begins_must_end():
    opened = opens_reasoning("<|im_start|>assistant\n<think>\n")
    assert opened == "<think>\n" and opens_reasoning("<think>\n</think>\n\n") == opens_reasoning("user: <think>") == ""
    assert opens_reasoning("<|Assistant|><think>\n") == "<think>\n"
    assert parse_response(opened + FINAL) == (None, "reasoning without an end")
    assert parse_response(f"{opened}{DRAFT}</think>\n{FINAL}")[0] == ("yes", "no")


def test_candidates_depend_only_on_seed_and_question():
    questions = load_questions(data_path=BUNDLED)
    drawn = [draw_candidates(question, 0) for question in questions]
    assert [draw_candidates(question, 0) for question in reversed(questions)] == drawn[::-1]
    assert [draw_candidates(question, 1) for question in questions] != drawn
    for question, (correct, incorrect) in zip(questions, drawn, strict=True):
        assert correct == question["choices"][question["answer"]]
        assert incorrect in {*question["choices"]} - {correct}


FOUND = [
    "Question: q\nCorrect answer: yes \nIncorrect answer: no\nmore",
    "Correct answer: yes\r\n\r\nIncorrect answer: no",
    "Correct answer: yes\nIncorrect answer: no\nCorrect answer: other",
    # A draft and the final pair; the end of reasoning; a preamble; words of reasoning.
    f"Question: q\n{DRAFT}\nBetter:\nQuestion: q\n{FINAL}",
    f"{DRAFT}\n[/THINK]\n{FINAL}",
    f"</think>\nThe Correct answer: line, the Incorrect answer: line.\n{FINAL}",
    f"{FINAL}\n\nThe [thought] of <reason>",
    f"{FINAL}\nI was sure without <think>.",
    # Labels as models write them; emphasis is not part of an answer.
    "- **Correct Answer**: **yes**\n- **Incorrect Answer**: *no*",
    "1. Correct answer : yes\n2. Incorrect answer : no",
    "### Correct answer:\nyes\n\n### Incorrect answer:\nno",
    "__Correct answer:__ yes\n__Incorrect answer:__ _no_",
    "Correct answer:\n- yes\nIncorrect answer:: no",
    "Correct answer: yes\nIncorrect answer: " + "*" * 10**5 + "no",
    # A mark at only one of the answers would be what DPO learns.
    f'"{FINAL}"',
    f"<answer>\n{FINAL}</answer>",
    f"```\n{FINAL}```",
    f"{FINAL} [/INST]",
    f"{FINAL}<|im_end|>",
    "Correct answer: yes; Incorrect answer: no",
    "Correct answer: yes (Incorrect answer: no)",
    "Correct answer: yes ✅\nIncorrect answer: no ❌",
    "Correct answer: yes Reason: a Incorrect answer: no **Reason**: b",
    '"Question:" q\n"Correct answer:" yes\n‘Incorrect answer:’ no',
    '"Correct answer:" yes "Incorrect answer:" no',
    "[Correct answer:] yes [Incorrect answer:] no",
    # The next question.
    f"Question: q\n{FINAL}\n\nQuestion: other\n{DRAFT}",
    f"Question:\nq\n{FINAL}\n\n**Question:**\nother\n{DRAFT}",
    f"Question: q\n{FINAL}\nQuestion: other\nCorrect answer: cut" + CUT,
    # Reasoning after the pair, of the next question, in a question, and within other reasoning.
    f"Question: q\n{FINAL}\n<reasoning>{DRAFT}</reasoning>",
    f"Question: What is ice?\n{FINAL}\nQuestion: other\n<think>hm</think>\n{DRAFT}",
    f"Question: What does <thinking> mean?\n{FINAL}",
    f"<think>a<analysis>b</analysis>{DRAFT}</think>{FINAL}",
    f"<|channel>thought\n{DRAFT}<channel|>\nAnalysis done.\n{FINAL}",
    f"Question: q\n{FINAL}\nQuestion 2: other\n{DRAFT}",
    f"Question: q\n{FINAL}\n**Next question:** other\n{DRAFT}",
    f"Question: What?\n{DRAFT}\n**question:** what\n{FINAL}",
    f"Question: q\n{FINAL}\n\n{FINAL}",
    f"Correct answer:\nIncorrect answer:\n{FINAL}",
    # A pair that states the question itself is the answer to it. The last one states it in other words.
    f"{DRAFT}\nFinal:\nQuestion: What is ice?\n{FINAL}",
    f"Question: And snow?\n{DRAFT}\n\nQuestion: what is ice\n{FINAL}\nQuestion: And rain?\n{DRAFT}",
    f"Question: Ice?\n{FINAL}\nQuestion: And rain?\n{DRAFT}",
]


@pytest.mark.parametrize("response", FOUND)
def test_the_pair_in_a_response(response):
    assert parse_response(response, "What is ice?") == (("yes", "no"), None)


LACKING = [
    ("Correct answer:\nIncorrect answer: no", "empty answer"),
    (f"Question: q\n{FINAL}\nExplanation:\n{DRAFT}", "different pairs of answers"),
    (f"{DRAFT}\nor rather\n{FINAL}", "different pairs of answers"),
    (f"Question: q\n{FINAL}\nExplanation:\n{DRAFT}\nExplanation:\n{DRAFT}", "different pairs of answers"),
    ("Correct answer: yes\nIncorrect answer: \nno", "empty answer"),
    ("Correct answer: one\ntwo\nIncorrect answer: no", "no incorrect answer after the correct one"),
    ("Write a Correct answer: and an Incorrect answer:", "no incorrect answer after the correct one"),
    ("Correct answer:" + " " * 10**5 + "\n" * 10**5, "no incorrect answer after the correct one"),
    ("Correct answer: Correct answer: yes\nIncorrect answer: no", "a label in an answer"),
    ("<" * 10**5 + "\n" * 10**5 + "[" * 10**5, "no correct answer"),
    ("[/think a=" * 10**4 + "[think a=" * 10**4 + "<think>" * 10**4 + "</think>", "no correct answer"),
    ("".join(f"<think{i}>" for i in range(10**4)) + "".join(f"</think{i}>" for i in range(10**4)), "no correct answer"),
    (f"<thinking>\n<reflection>\nx</reflection>\n{DRAFT}\nBut", "reasoning without an end"),
    ("Correct answer: yes" + CUT, "cut at --max_new_tokens"),
    (f"Correct answer:\nyes\nIncorrect answer:\n\nno{CUT}", "cut at --max_new_tokens"),
    (f"Question: q\n{DRAFT}\nBetter:\nCorrect answer: yes\nIncorrect answer: n{CUT}", "cut at --max_new_tokens"),
    (f"Question: What is ice? <think>hm\n{DRAFT}", "reasoning without an end"),
    (f"<think>a</think>\n{DRAFT}\n<think>wait</think>\n{FINAL}", "different pairs of answers"),
    ("<" + "a_" * 10**5 + "think" + "\\" * 10**5 + "a:" * 10**5, "no correct answer"),
]


@pytest.mark.parametrize(("response", "reason"), LACKING)
def test_a_response_without_a_pair(response, reason):
    assert parse_response(response) == (None, reason)


@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        ("<think>\n", "</think>\n"),
        ("<reasoning>", "</reasoning>\n<Thought>\nso\n</Thought>"),
        ("<|begin_of_thought|>\n", "\n<|end_of_thought|>\n"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("◁think▷", "◁/think▷"),
        ("<|thinking_start|>", "<|thinking_end|>"),
        ("<seed:think>", "</seed:think>"),
        ("<rationale>", "</rationale>"),
        ("<chain_of_thought>", "</chain_of_thought>"),
        ('<think effort="low">', "</think>"),
        ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ],
)
def test_reasoning_is_no_answer(opening, closing):
    assert parse_response(f"Well. {opening}{DRAFT}{closing}{FINAL}") == (("yes", "no"), None)
    assert parse_response(f"Well. {opening}{DRAFT}") == (None, "reasoning without an end")


def test_what_belongs_to_an_answer_stays():
    reason = "There is a reason: ice is warm."
    for one, other in (
        *(('"yes"', "-5"), ("- 5", "> 100 °C"), ("10<sup>3</sup>", '12"'), ("__init__", "snake_case_")),
        *(("<yes>", "[no]"), ("a <think> tag", "[thought] so"), ("[cotton] grows", "no")),
    ):
        assert parse_response(f"Correct answer: {one}\nIncorrect answer: {other}") == ((one, other), None)
    assert parse_response(f"Correct answer: yes. Incorrect answer: {reason}") == (("yes.", reason), None)
    inside = "Correct answer: yes\nIncorrect answer: It is <thought>x</thought> warm"
    assert parse_response(inside) == (("yes", "It is   warm"), None)
    assert parse_response("Correct answer: `yes`.\nIncorrect answer: `no`") == (("yes.", "no"), None)


def test_combine(tmp_path):
    ori = [pair("a", "a0", "wa"), pair("b", "b0", "wb"), pair("a", "a0 again", "wa again"), pair("c", "c0", "wc")]
    new = [pair("c", "c1", "x"), pair("a", "a1", "x"), pair("a", "a2", "x"), pair("d", "d1", "x")]
    ori_path = write_rows(tmp_path / "iter0.json", ori)
    new_path = write_rows(tmp_path / "iter1.json", new)
    done = call("combine_new_correct_ori_wrong.py", "--new_data_path", new_path, "--ori_data_path", ori_path)
    assert rows(tmp_path / "iter1_combined.json") == [
        pair("a", "a1", "wa"), pair("b", "b0", "wb"), pair("a", "a1", "wa again"), pair("c", "c1", "wc")
    ]  # fmt: skip
    assert "1 kept because the new file has none" in done.stdout


def test_unparsed_responses_are_dropped_and_counted(tmp_path, tiny_llama):
    def ask(*flags, status=2):
        return call_here(*asking(tiny_llama, tmp_path / "out", *flags, count=3), status=status)

    done = ask("--max_new_tokens", "10")  # all but the EOS
    assert "dropped, cut at --max_new_tokens: 3" in done.stdout
    assert "none of 3 responses could be parsed" in done.stderr
    assert "try a larger --max_new_tokens. The first response is" in done.stderr
    assert json.dumps(done.stderr).count("error") == 1
    again = ask("--max_new_tokens", "10")
    assert "3 of 3 questions were answered" in again.stdout and again.stderr == done.stderr.splitlines()[-1] + "\n"
    assert "Wrote " in ask(status=0).stdout  # with other settings
