"""Compare the harness's own model class (`hf`), `hf-shared` and vLLM on the same requests.

    DATASETS_ROOT=../shared/hub python benchmarks/evaluation.py --limit 20
    VLLM_PYTHON=vllm-env/bin/python python benchmarks/evaluation.py --ways vllm hf-shared --tasks letters

The table shows the seconds until the model is loaded, the seconds of the log-likelihood requests after that, and the
scores. The load of vLLM includes its imports and its shutdown; the other loads include neither. The first way is the
baseline of the ratios, of the largest difference of a log-likelihood and of the scores. The task `letters` has the form
of MMLU: the same five few-shot examples for every question, and the answers A to D. `vllm` reads vLLM's
log-probabilities of the prompts, for which vLLM does not use its prefix cache; benchmarks/generation.py describes its
environment.
"""

import os
import time

from generation import check_vllm, run_vllm
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from grath.common.arguments import Parser, positive_int
from grath.common.errors import UserError, run_main
from grath.common.layout import PROJECT
from grath.evaluation.harness import load_local
from grath.modeling.devices import check_devices
from grath.modeling.loading import resolve_base_and_adapter
from grath.modeling.precision import DTYPES
from grath.pairs.questions import load_questions

WORKLOADS = {
    "truthfulqa": (["truthfulqa_mc1", "truthfulqa_mc2"], 0),
    "arc_challenge": (["arc_challenge"], 25),
    "letters": ([], 5),
}
LETTERS = "ABCD"
WAYS = ("hf", "hf-shared", "vllm")


def letter_requests(limit):
    """Build requests in the form of MMLU from the bundled questions with four choices.

    Returns:
        (requests, gold answers): four requests per question, and the index of the gold answer of each question.
    """
    bundled = load_questions(data_path=PROJECT / "data" / "questions.jsonl")
    questions = [question for question in bundled if len(question["choices"]) == 4]

    def ask(question):
        choices = [f"{letter}. {text}" for letter, text in zip(LETTERS, question["choices"], strict=True)]
        return "\n".join([question["question"], *choices, "Answer:"])

    shots = "".join(f"{ask(question)} {LETTERS[question['answer']]}\n\n" for question in questions[:5])
    head, asked = "These are multiple choice questions about science, with their answers.\n\n", questions[5 : 5 + limit]
    pairs = [(head + shots + ask(question), f" {letter}") for question in asked for letter in LETTERS]
    return [Instance("loglikelihood", {}, pair, 0) for pair in pairs], [question["answer"] for question in asked]


def measure(lm, name, limit):
    """Score one of `WORKLOADS`; return (seconds without the load, list of log-likelihoods, dict of scores)."""
    tasks, shots = WORKLOADS[name]
    seconds, log_likelihoods = 0.0, []
    original = type(lm).loglikelihood

    def timed(requests, **kwargs):
        nonlocal seconds
        start = time.perf_counter()
        loaded = lm.load_seconds
        results = original(lm, requests, **kwargs)
        seconds += time.perf_counter() - start - (lm.load_seconds - loaded)
        log_likelihoods.extend(log_likelihood for log_likelihood, _ in results)
        return results

    lm.loglikelihood = timed
    if tasks:
        results = simple_evaluate(lm, tasks=tasks, num_fewshot=shots, limit=limit, bootstrap_iters=0, log_samples=False)
        scores = {task: round(100 * float(values["acc,none"]), 2) for task, values in results["results"].items()}
    else:
        requests, gold = letter_requests(limit)
        timed(requests)
        questions = range(0, len(requests), 4)
        predicted = [max(range(4), key=lambda i, at=at: log_likelihoods[at + i]) for at in questions]
        scores = {name: 100 * sum(a == b for a, b in zip(predicted, gold, strict=True)) / len(gold)}
    return seconds, log_likelihoods, scores


class VllmLM(HFLM):
    """`HFLM` with vLLM's log-likelihoods."""

    def _loglikelihood_tokens(self, requests, **_):
        start = time.perf_counter()
        # The one token that vLLM generates after a prompt has to fit too.
        prompts = [(context + answer)[1 - self.max_length :] for _, context, answer in requests]
        lengths = [len(answer) for _, _, answer in requests]
        work = {"model": self.config.name_or_path, "dtype": str(self.model.dtype).removeprefix("torch.")}
        work |= {"prompts": prompts, "answer_lengths": lengths, "max_length": max(map(len, prompts)) + 1}
        found = run_vllm(work | {"batch_size": self.batch_size, "runs": 1})
        self.load_seconds += time.perf_counter() - start - found["seconds"][0]
        # No score here reads whether an answer is the greedy one.
        return [(log_likelihood, False) for log_likelihood in found["log_likelihoods"]]


def load(way, base, adapter, args):
    """Load a model for one of `WAYS`; return an `HFLM`, whose `load_seconds` says how long it took."""
    start = time.perf_counter()
    if way == "vllm":  # which has the GPU to itself
        options = {"dtype": DTYPES[args.dtype], "use_safetensors": True, "device": "cpu"}
        lm = VllmLM(pretrained=base, batch_size=args.batch_size, **options)
    else:
        lm = load_local(way, adapter or base, args.dtype, args.batch_size)
    lm.load_seconds = 0 if way == "vllm" else time.perf_counter() - start
    return lm


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", default=str(PROJECT / "models" / "smollm2"), help="hub name, model folder or LoRA adapter folder")
    add("--dtype", choices=sorted(DTYPES), default="fp32", help="dtype of the weights")
    add("--batch_size", type=positive_int, default=16, help="batch size")
    add("--limit", type=positive_int, default=20, help="questions per task")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS[:2]), help="ways to compare")
    add("--tasks", nargs="+", choices=sorted(WORKLOADS), default=list(WORKLOADS), help="tasks to score")
    args = parser.parse_args()
    check_devices()
    if "vllm" in args.ways:
        check_vllm(args.dtype)
    os.environ.setdefault("TQDM_DISABLE", "1")
    base, adapter = resolve_base_and_adapter(args.model)
    if adapter and "vllm" in args.ways:
        raise UserError("the way vllm needs a model, not an adapter")
    os.chdir(os.environ.get("DATASETS_ROOT", "."))
    print(f"{args.dtype}, batches of {args.batch_size}")
    columns = f"{'task':15}{'way':11}{'load':>7}{'requests':>9}{'seconds':>9}{'requests/s':>12}{'ratio':>7}"
    print(f"{columns}{'largest difference':>20}")
    for name in args.tasks:
        first = None
        for way in args.ways:
            lm = load(way, base, adapter, args)
            seconds, found, scores = measure(lm, name, args.limit)
            first = first or (seconds, found, scores)
            difference = max(abs(a - b) for a, b in zip(found, first[1], strict=True))
            equal = "scores equal" if scores == first[2] else f"scores differ from {first[2]}"
            print(
                f"{name:15}{way:11}{lm.load_seconds:7.1f}{len(found):9}{seconds:9.1f}{len(found) / seconds:12.2f}"
                f"{first[0] / seconds:7.2f}{difference:20.2e}  {scores} {equal}",
                flush=True,
            )
            del lm


if __name__ == "__main__":
    run_main(main)
