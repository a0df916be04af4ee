"""Stages 1 and 2 at the command line: write and combine pair files; then the functions that they use."""

import json
import shutil
import subprocess
import sys
import time

import pytest
from support import BUNDLED, CORRECT, HUB, INCORRECT, PROJECT, call, call_here, needs_hub, pair, rows, write_rows

from grath.pairs.questions import draw_candidates, load_questions
from grath.pairs.responses import parse_response


def ask(model, folder, *flags, cwd=None):
    call_here(
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


@pytest.mark.slow
def test_the_same_bytes_at_every_batch_size_and_number_of_processes(smollm2, tmp_path):
    """On a model whose answers depend on the question."""
    flags = ("--data_path", BUNDLED, "--num_query", "5", "--useFS")
    one = ask(smollm2, tmp_path / "one", *flags, "--batch_size", "4")
    assert len({row["correct"] for row in rows(one)}) == len(rows(one)) > 3
    done = call(
        "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", PROJECT / "create_pair_responses.py",
        "--model_name_or_path", smollm2, "--save_prefix", "iter0_arcc", "--save_dir", tmp_path / "two",
        "--precision", "fp32", "--batch_size", "1", *flags,
    )  # fmt: skip
    assert done.stdout.count("Asking 3 questions") == 1
    (path,) = (tmp_path / "two").iterdir()
    assert path.name == one.name and path.read_bytes() == one.read_bytes()


def test_a_kill_loses_no_finished_question(tiny_llama, tmp_path):
    flags = ["--data_path", BUNDLED, "--num_query", "60", "--batch_size", "1", "--useFS"]
    expected = ask(tiny_llama, tmp_path / "whole", *flags)
    command = [
        sys.executable, PROJECT / "create_pair_responses.py", "--model_name_or_path", tiny_llama, "--save_prefix",
        "iter0_arcc", "--save_dir", tmp_path / "killed", "--precision", "fp32",
    ]  # fmt: skip

    def saved():
        """The responses of the first process, and how many these are."""
        files = list((tmp_path / "killed").glob(f".{expected.name}.*.responses.0"))
        return (files[0], files[0].read_text().count("\n")) if files else (None, 0)

    with subprocess.Popen([*map(str, command), *map(str, flags)], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 600
        while saved()[1] < 5 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
    kept, finished = saved()
    assert 5 <= finished < 60
    assert [file.name for file in kept.parent.iterdir() if not file.name.startswith(".")] == []
    with kept.open("a") as file:
        file.write('[59, "cut sho')  # what a kill in the middle of a line leaves

    done = call_here("create_pair_responses.py", *command[2:], *flags)
    assert f"{finished} of 60 questions were answered before the interruption" in done.stdout
    assert ["asked", "now", str(60 - finished)] in [line.split() for line in done.stdout.splitlines()]
    assert [file.name for file in kept.parent.iterdir()] == [expected.name]
    assert (kept.parent / expected.name).read_bytes() == expected.read_bytes()


def test_responses_of_other_settings_are_neither_used_nor_lost(tiny_llama, tmp_path):
    command = [
        "create_pair_responses.py", "--model_name_or_path", tiny_llama, "--save_prefix", "iter0_arcc", "--save_dir",
        tmp_path / "b", "--precision", "fp32", "--data_path", BUNDLED, "--num_query", "3",
    ]  # fmt: skip
    expected = ask(tiny_llama, tmp_path / "a", *command[-4:])
    # Five tokens do not parse, so the responses stay, and the same command reads them.
    short = ("--max_new_tokens", "5")
    call_here(*command, *short, status=2)
    assert "3 of 3 questions were answered before" in call_here(*command, *short, status=2).stdout
    (other,) = (tmp_path / "b").iterdir()
    # A run with the right flags does not use them, and an early end of it does not remove them.
    with_flags = call_here(*command, "--max_new_tokens", "6", status=2)
    assert "answered before" not in with_flags.stdout and other.read_text().count("\n") == 3
    other.write_bytes(b"\xff\xfe\n")
    assert "Discarding saved responses that are damaged" in call_here(*command, *short, status=2).stdout
    # The pair file's responses go with it, those of another pair file in the same folder do not.
    beside = tmp_path / "b" / other.name.replace("iter0", "iter1")
    beside.touch()
    call_here(*command)
    assert (tmp_path / "b" / expected.name).read_bytes() == expected.read_bytes()
    assert {file.name for file in (tmp_path / "b").iterdir()} == {expected.name, beside.name}


@pytest.mark.parametrize("precision", ["int8", "nf4", "fp4"])
def test_quantized_weights(tiny_llama, tmp_path, precision, monkeypatch):
    from grath.generation import engines
    from grath.modeling.loading import load_for_inference

    loaded = []
    monkeypatch.setattr(
        engines,
        "load_for_inference",
        lambda *args: loaded.append(load_for_inference(*args)) or loaded[-1],
    )
    flags = ("--data_path", BUNDLED, "--num_query", "4", "--precision", precision)
    assert len(rows(ask(tiny_llama, tmp_path / "out", *flags))) == 4
    weight = loaded[0].model.layers[0].self_attn.q_proj.weight
    kinds = {"int8": "Int8Params", "nf4": "Params4bit", "fp4": "Params4bit"}
    assert type(weight).__name__ == kinds[precision]
    assert getattr(weight, "quant_type", "int8") == precision
    assert loaded[0].lm_head.weight.is_floating_point()


def test_an_unsupported_model_falls_back_to_generate(tiny_llama, tmp_path):
    narrow = tmp_path / "narrow"
    shutil.copytree(tiny_llama, narrow)
    config = json.loads((narrow / "config.json").read_text())
    config = {**config, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}
    (narrow / "config.json").write_text(json.dumps(config))
    done = call_here(
        "create_pair_responses.py", "--model_name_or_path", narrow, "--save_prefix", "x", "--save_dir",
        tmp_path / "out", "--data_path", BUNDLED, "--num_query", "2", "--precision", "fp32", "--max_new_tokens", "60",
        status=None,
    )  # fmt: skip
    line = next(line for line in done.stdout.splitlines() if "plain batched generation" in line)
    assert "its sliding window of 64 tokens is shorter than a sequence of" in line
    plain = ask(tiny_llama, tmp_path / "a", "--data_path", BUNDLED, "--num_query", "3", "--engine", "generate")
    engine = ask(tiny_llama, tmp_path / "b", "--data_path", BUNDLED, "--num_query", "3")
    assert plain.read_bytes() == engine.read_bytes()


def test_candidates_depend_only_on_seed_and_question():
    questions = load_questions(data_path=BUNDLED)
    drawn = [draw_candidates(question, 0) for question in questions]
    assert [draw_candidates(question, 0) for question in reversed(questions)] == drawn[::-1]
    assert [draw_candidates(question, 1) for question in questions] != drawn
    for question, (correct, incorrect) in zip(questions, drawn, strict=True):
        assert correct == question["choices"][question["answer"]]
        assert incorrect in question["choices"]
        assert incorrect != correct


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Question: q\nCorrect answer: yes \nIncorrect answer: no\nmore", (("yes", "no"), None)),
        ("Correct answer: yes\r\n\r\nIncorrect answer: no", (("yes", "no"), None)),
        ("Correct answer: yes\nIncorrect answer: no\nCorrect answer: other", (("yes", "no"), None)),
        ("Incorrect answer: no", (None, "no correct answer")),
        ("Correct answer: yes\nWrong answer: no", (None, "no incorrect answer after the correct one")),
        ("Correct answer: yes", (None, "no incorrect answer after the correct one")),
        ("Correct answer: yes Incorrect answer: no", (("yes", "no"), None)),
        ("Correct answer: yes\n\n Incorrect answer: no\n", (("yes", "no"), None)),
        (
            "Correct answer: yes\nIncorrect\nIncorrect answer: no\n",
            (None, "no incorrect answer after the correct one"),
        ),
        ("Correct answer:\nIncorrect answer: no", (None, "empty answer")),
        ("Correct answer: yes\nIncorrect answer: \nno", (None, "empty answer")),
        ("Correct answer: one\ntwo\nIncorrect answer: no", (None, "no incorrect answer after the correct one")),
    ],
)
def test_parsing(response, expected):
    assert parse_response(response) == expected


def combine(new, ori, status=0):
    return call("combine_new_correct_ori_wrong.py", "--new_data_path", new, "--ori_data_path", ori, status=status)


def test_combine(tmp_path):
    ori = [pair("a", "a0", "wa"), pair("b", "b0", "wb"), pair("a", "a0 again", "wa again"), pair("c", "c0", "wc")]
    new = [pair("c", "c1", "x"), pair("a", "a1", "x"), pair("a", "a2", "x"), pair("d", "d1", "x")]
    ori_path = write_rows(tmp_path / "iter0.json", ori)
    new_path = write_rows(tmp_path / "iter1.json", new)
    done = combine(new_path, ori_path)
    assert rows(tmp_path / "iter1_combined.json") == [
        pair("a", "a1", "wa"), pair("b", "b0", "wb"), pair("a", "a1", "wa again"), pair("c", "c1", "wc")
    ]  # fmt: skip
    assert "1 kept because the new file has none" in done.stdout


def test_files_without_a_common_question_are_refused(tmp_path):
    ori = write_rows(tmp_path / "iter0.json", [pair("a", "b", "c")])
    new = write_rows(tmp_path / "iter1.json", [pair("x", "y", "z")])
    done = combine(new, ori, status=2)
    assert "no question in common" in done.stderr
    assert not (tmp_path / "iter1_combined.json").exists()


def test_unparsed_responses_are_dropped_and_counted(tmp_path, tiny_llama):
    done = call_here(
        "create_pair_responses.py", "--model_name_or_path", tiny_llama, "--save_prefix", "x", "--save_dir",
        tmp_path / "out", "--data_path", BUNDLED, "--num_query", "3", "--precision", "fp32", "--max_new_tokens", "5",
        status=2,
    )  # fmt: skip
    assert "dropped, no " in done.stdout
    assert "none of 3 responses could be parsed" in done.stderr and "try --useFS. The first response is" in done.stderr
    assert all(file.name.startswith(".x_num_3_") for file in (tmp_path / "out").iterdir())
    assert json.dumps(done.stderr).count("error") == 1
