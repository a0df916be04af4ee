"""Scores through the harness's own way (`hf`) and through `hf-shared`, on the same requests.

    DATASETS_ROOT=../shared/hub python benchmarks/evaluation.py --limit 20

Seconds are those of the log-likelihood requests; ratios, the largest difference of a log-likelihood, and the scores of
both. `letters` is in MMLU's form: the same five examples for every question, and the answers A to D.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grath.cli import PROJECT, Parser, positive_int, run  # noqa: E402
from grath.harness import model_args, register  # noqa: E402
from grath.models import DTYPES  # noqa: E402
from grath.questions import load_questions  # noqa: E402

TASKS = {
    "truthfulqa": (["truthfulqa_mc1", "truthfulqa_mc2"], 0),
    "arc_challenge": (["arc_challenge"], 25),
    "letters": ([], 5),
}
LETTERS = "ABCD"


def letter_requests(limit):
    """(requests, index of the right one of each four) in MMLU's form, of the bundled questions with four choices."""
    from lm_eval.api.instance import Instance

    questions = load_questions(data_path=PROJECT / "data" / "questions.jsonl")
    questions = [question for question in questions if len(question["choices"]) == 4]

    def ask(question):
        choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, question["choices"], strict=True))
        return f"{question['question']}\n{choices}\nAnswer:"

    shots = "".join(f"{ask(question)} {LETTERS[question['answer']]}\n\n" for question in questions[:5])
    head = "These are multiple choice questions about science, with their answers.\n\n"
    asked = questions[5 : 5 + limit]
    requests = [
        Instance("loglikelihood", {}, (head + shots + ask(question), f" {letter}"), i)
        for question in asked
        for i, letter in enumerate(LETTERS)
    ]
    return requests, [question["answer"] for question in asked]


def measure(lm, name, limit):
    """Score one of `TASKS`: (seconds, list of log-likelihoods, dict of scores)."""
    from lm_eval import simple_evaluate

    tasks, shots = TASKS[name]
    seconds, found = 0.0, []
    usual = type(lm).loglikelihood

    def timed(requests, **kwargs):
        nonlocal seconds
        start = time.perf_counter()
        answers = usual(lm, requests, **kwargs)
        seconds += time.perf_counter() - start
        found.extend(score for score, _ in answers)
        return answers

    lm.loglikelihood = timed
    if tasks:
        results = simple_evaluate(lm, tasks=tasks, num_fewshot=shots, limit=limit, bootstrap_iters=0, log_samples=False)
        scores = {task: round(100 * float(values["acc,none"]), 2) for task, values in results["results"].items()}
    else:
        requests, keys = letter_requests(limit)
        answers = [score for score, _ in timed(requests)]
        picked = [max(range(4), key=lambda i, at=at: answers[at + i]) for at in range(0, len(answers), 4)]
        scores = {name: 100 * sum(a == b for a, b in zip(picked, keys, strict=True)) / len(keys)}
    del lm.loglikelihood
    return seconds, found, scores


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", default=str(PROJECT / "models" / "smollm2"), help="hub name, model folder or adapter's folder")
    add("--dtype", choices=sorted(DTYPES), default="fp32", help="of the weights")
    add("--batch_size", type=positive_int, default=16, help="requests at once")
    add("--limit", type=positive_int, default=20, help="questions a task")
    add("--tasks", nargs="+", choices=sorted(TASKS), default=list(TASKS), help="what to score")
    args = parser.parse_args()
    shared = register()
    import torch
    from lm_eval.models.huggingface import HFLM

    os.environ.setdefault("TQDM_DISABLE", "1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = {**model_args(args.model, args.dtype), "batch_size": args.batch_size, "device": device}
    os.chdir(os.environ.get("DATASETS_ROOT", "."))
    print(f"{args.dtype}, batches of {args.batch_size}")
    print(f"{'task':15}{'way':11}{'requests':>9}{'seconds':>9}{'requests/s':>12}{'ratio':>7}{'largest difference':>20}")
    for name in args.tasks:
        first = None
        for way, kind in (("hf", HFLM), ("hf-shared", shared)):
            seconds, found, scores = measure(kind(**arguments), name, args.limit)
            first = first or (seconds, found, scores)
            difference = max(abs(a - b) for a, b in zip(found, first[1], strict=True))
            equal = "scores equal" if scores == first[2] else f"scores differ from {first[2]}"
            print(
                f"{name:15}{way:11}{len(found):9}{seconds:9.1f}{len(found) / seconds:12.2f}{first[0] / seconds:7.2f}"
                f"{difference:20.2e}  {scores} {equal}",
                flush=True,
            )


if __name__ == "__main__":
    run(main)
