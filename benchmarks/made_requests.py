"""Requests with the texts and lengths of the published tasks."""

import os
import random

from grath.common.defaults import MAX_LENGTH
from grath.common.files import read_json_lines
from grath.common.layout import PROJECT
from grath.common.local_data import load_dataset
from grath.modeling.chat import prompt_ids, template_for
from grath.pairs.prompts import build_messages, load_demos
from grath.pairs.questions import load_questions

SUBJECTS = 57


def text(draw, words, count):
    """Draw `count` neighbouring words, so that the tokenizer sees text."""
    start = draw.randrange(len(words) - count)
    return " ".join(words[start : start + count])


def words_of(questions):
    return " ".join(question["question"] for question in questions).split()


def arc_requests(questions, shots_from, shots=25):
    """Build the requests of ARC in the harness's form, each question with its own few-shot examples."""
    draw, requests = random.Random(0), []
    ask = lambda question: f"Question: {question['question']}\nAnswer:"  # noqa: E731
    for question in questions:
        examples = [example for example in draw.sample(shots_from, shots + 1) if example is not question][:shots]
        head = "".join(f"{ask(example)} {example['choices'][example['answer']]}\n\n" for example in examples)
        requests += [(head + ask(question), f" {choice}") for choice in question["choices"]]
    return requests


def truthfulqa_requests(rows, words):
    """Build the requests of MC1 and MC2: the same six examples before every question."""
    draw = random.Random(0)
    head = "".join(f"Q: {text(draw, words, 8)}?\nA: {text(draw, words, 9)}.\n\n" for _ in range(6))
    return [
        (f"{head}Q: {row['question']}\nA:", f" {choice}")
        for row in rows
        for choice in (*row["mc1_targets"]["choices"], *row["mc2_targets"]["choices"])
    ]


def hellaswag_requests(count, words, shots=10):
    """Make requests of HellaSwag's lengths: contexts of 18 to 80 words, four endings of 8 to 34 words."""
    draw, requests = random.Random(0), []
    example = lambda: f"{text(draw, words, draw.randint(18, 80))} {text(draw, words, draw.randint(8, 34))}\n\n"  # noqa: E731
    for _ in range(count):
        context = "".join(example() for _ in range(shots)) + text(draw, words, draw.randint(18, 80))
        requests += [(context, " " + text(draw, words, draw.randint(8, 34))) for _ in range(4)]
    return requests


def mmlu_requests(count, words, shots=5):
    """Make requests of MMLU's lengths: in each subject five examples of its own length, and the answers A to D."""
    draw, requests = random.Random(0), []
    for subject in range(SUBJECTS):
        # From 40 words per question (most subjects) to 400 (law, history).
        length = int(40 * 10 ** draw.betavariate(1, 3))
        ask = lambda length=length: text(draw, words, draw.randint(length // 2, length * 3 // 2)) + "\nAnswer:"  # noqa: E731
        head = text(draw, words, 10) + "\n\n" + "".join(f"{ask()} {draw.choice('ABCD')}\n\n" for _ in range(shots))
        for _ in range(count * (subject + 1) // SUBJECTS - count * subject // SUBJECTS):
            question = head + ask()
            requests += [(question, f" {letter}") for letter in "ABCD"]
    return requests


def task_requests(test, shots_from, rows, limit):
    """Build the requests of all tasks: dict of task -> (requests, number of its questions).

    Args:
        test, shots_from: ARC's questions, and those from which its examples are drawn.
        rows: TruthfulQA's rows.
        limit: number of HellaSwag's questions to make; MMLU has four times as many.
    """
    words = words_of(shots_from)
    return {
        "arc_challenge": (arc_requests(test, shots_from), len(test)),
        "hellaswag": (hellaswag_requests(limit, words), limit),
        "mmlu": (mmlu_requests(4 * limit, words), 4 * limit),
        "truthfulqa": (truthfulqa_requests(rows, words), len(rows)),
    }


def pair_prompts(tokenizer, questions, model_type="llama2"):
    """Tokenize the prompts of the pairs, with six few-shot examples: lists of ids."""
    template, demos = template_for(tokenizer, model_type), load_demos("truthfulqa")
    return [prompt_ids(tokenizer, build_messages(question, 0, False, demos), template) for question in questions]


def made_pairs(tokenizer, questions):
    """Return tokenized pairs of the questions, with answers of 12 to 28 words."""
    from grath.dpo.dataset import filter_pairs, tokenize_pairs

    draw, words = random.Random(0), words_of(questions)
    answer = lambda: text(draw, words, draw.randint(12, 28))  # noqa: E731
    rows = [{"question": q["question"], "correct": answer(), "incorrect": answer()} for q in questions]
    return filter_pairs(tokenize_pairs(rows, tokenizer, template_for(tokenizer, "llama2")), MAX_LENGTH)[0]


def load_data(limit):
    """Load ARC's training and test questions and TruthfulQA's rows; without DATASETS_ROOT, the bundled ones."""
    if os.environ.get("DATASETS_ROOT"):
        train, test = (load_questions("allenai/ai2_arc", "ARC-Challenge", split) for split in ("train", "test"))
        rows = list(load_dataset("truthfulqa/truthful_qa", "multiple_choice", split="validation"))
    else:
        train = load_questions(data_path=PROJECT / "data" / "questions.jsonl")
        test = train[:60]
        rows = read_json_lines(PROJECT / "data" / "truthfulness_mc.jsonl", "bundled question set")
    return train[:limit], test[:limit], rows[:limit], train
