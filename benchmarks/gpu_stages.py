"""Measure on a GPU the stages of a 7B model.

    DATASETS_ROOT=../shared/hub python benchmarks/gpu_stages.py

The model has Llama-2-7B's shape, the vocabulary of the tokenizer and random weights. It is saved in a temporary folder
and loaded from there. Its completions mean nothing, so their lengths are random: 40 to 100 tokens, and no drafted token
is accepted. Everything else is what a stage does, tokenization included. `minutes` is for all questions of the
published task, or for the paper's 1,000 steps; `peak` is the GPU's memory (on a CPU, the process's).

`pairs, copied` is `model.generate` from copies of the few-shot examples' KV cache, in batches that take as long as
their longest completion.
"""

import json
import random
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import made_requests
import torch
from generation import copied, peak_bytes, reset_peak
from lm_eval.api.instance import Instance
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from grath.common.arguments import Parser, positive_int
from grath.common.defaults import MAX_STEPS, PAIRS_PER_STEP
from grath.common.errors import UserError, run_main
from grath.common.files import atomic_write_text
from grath.common.layout import PROJECT
from grath.dpo.config import GrathDPOConfig
from grath.dpo.trainer import GrathDPOTrainer, lora_config
from grath.evaluation.harness import SharedContextLM
from grath.generation.shared_prefix import generate_shared_prefix
from grath.modeling.loading import load_for_inference, load_model, load_tokenizer

STAGES = ("pairs", "peer", "pairs in int8", "dpo", "scores")
LLAMA_2_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip
# Questions of the published tasks.
QUESTIONS = {"pairs": 1119, "arc_challenge": 1172, "hellaswag": 10_042, "mmlu": 14_042, "truthfulqa": 817}
# Tokens of a completion.
SHORTEST, LONGEST = 40, 100
ROWS = 64
# The first steps of a training choose kernels and allocate: they are not measured.
WARM_UP = 5


def save_model(folder, layers, tokenizer):
    """Save a Llama with Llama-2-7B's shape and random weights in float16."""
    config = LlamaConfig(**LLAMA_2_7B | {"vocab_size": len(tokenizer), "num_hidden_layers": layers})
    torch.set_default_dtype(torch.float16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def drawn_lengths(model):
    """Let a model generate completions of drawn lengths. It still computes its tokens.

    A completion begins with the drawn number of tokens that follow, counts down to 0, and ends with the last token of
    the vocabulary, which is the EOS.
    """
    draw, read = random.Random(0), []

    def note(_, args):
        read[:] = [args[0].flatten()]

    def replace(_, __, logits):
        following = (read[0] - 1) % logits.shape[-1]
        if len(logits) < len(following):  # a prefill, which needs the first token of each completion
            first = [draw.randint(SHORTEST - 1, LONGEST - 1) for _ in logits]
            following = torch.tensor(first, device=logits.device)
        logits.view(len(following), -1).scatter_(1, following[:, None], float("inf"))

    hooks = (
        model.get_input_embeddings().register_forward_pre_hook(note),
        model.get_output_embeddings().register_forward_hook(replace),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def add_figures(table, file, name, load, questions, seconds, minutes, **more):
    """Add a stage's figures to `table` (dict), print them, and write the table to a JSON file, if there is one."""
    peak = peak_bytes() * 1e-9
    figures = {"load": load, "questions": questions, "seconds": seconds, "minutes": minutes, "peak_gb": peak}
    table[name] = figures | more
    extra = "".join(f"  {key} {value:.2f}" for key, value in more.items())
    print(f"{name:16}{load:8.1f}{questions:11}{seconds:9.1f}{minutes:9.2f}{peak:9.1f}{extra}", flush=True)
    if file:
        atomic_write_text(file, json.dumps(table, indent=2) + "\n")


def timed(work):
    """Run work; return its result and its seconds, until the GPU has finished."""
    reset_peak()
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def measure_pairs(add_row, name, generate, model, load, prompts, rows):
    settings = (LONGEST, rows, [model.config.vocab_size - 1])
    with drawn_lengths(model):
        list(generate(model, prompts[:8], *settings))
        completions, seconds = timed(lambda: list(generate(model, prompts, *settings)))
    tokens = sum(len(ids) for _, ids in completions)
    minutes = seconds / len(prompts) * QUESTIONS["pairs"] / 60
    add_row(name, load, len(prompts), seconds, minutes, tokens_per_s=tokens / seconds)


def measure_dpo(add_row, folder, tokenizer, questions, steps):
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        config = GrathDPOConfig(
            output_dir=out, precision="fp4", max_steps=WARM_UP + steps, per_device_train_batch_size=PAIRS_PER_STEP,
            gradient_accumulation_steps=1, save_strategy="no", disable_tqdm=True, logging_steps=10**6,
        )  # fmt: skip
        model, load = timed(lambda: load_model(folder, "fp4", trainable=True))
        dataset = made_requests.made_pairs(tokenizer, questions)
        common = {"args": config, "train_dataset": dataset, "processing_class": tokenizer, "peft_config": lora_config()}
        trainer, reference = timed(lambda: GrathDPOTrainer(model=model, reference="rolling", **common))
        trainer.add_callback(Clock())
        trainer.train()
    seconds = ends[-1] - ends[WARM_UP - 1]
    minutes = (reference / len(trainer.pairs) * QUESTIONS["pairs"] + MAX_STEPS * seconds / steps) / 60
    add_row("dpo", load, len(dataset), seconds, minutes, reference_s=reference, s_per_step=seconds / steps)


def measure_scores(add_row, model, load, tokenizer, requests):
    lm = SharedContextLM(model, tokenizer)
    for name, (asked, questions) in requests.items():
        instances = [Instance("loglikelihood", {}, request, 0) for request in asked]
        lm.loglikelihood(instances[:8], disable_tqdm=True)
        _, seconds = timed(lambda asked=instances: lm.loglikelihood(asked, disable_tqdm=True))
        add_row(name, load, questions, seconds, seconds / questions * QUESTIONS[name] / 60)


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--limit", type=positive_int, default=512, help="questions of each stage; MMLU has four times as many")
    add("--dpo_steps", type=positive_int, default=20, help="training steps that are measured")
    add("--rows", type=positive_int, nargs="+", default=[ROWS, 256], help="rows of the pairs, to compare")
    add("--layers", type=positive_int, default=LLAMA_2_7B["num_hidden_layers"], help="layers of the model")
    add("--model", help="folder of a 7B Llama, instead of one with random weights")
    add("--tokenizer", default=str(PROJECT / "models" / "smollm2"), help="hub name or folder of the tokenizer")
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="stages to measure")
    add("--json", type=Path, metavar="FILE", help="also write the figures to a JSON file")
    args = parser.parse_args()
    if not torch.cuda.is_available() and args.layers == LLAMA_2_7B["num_hidden_layers"]:
        raise UserError("torch sees no GPU")
    tokenizer = load_tokenizer(args.tokenizer)
    questions, test, rows, shots_from = made_requests.load_data(args.limit)
    prompts = made_requests.pair_prompts(tokenizer, questions)
    add_row = partial(add_figures, {}, args.json)
    print(f"{'stage':16}{'load s':>8}{'questions':>11}{'seconds':>9}{'minutes':>9}{'peak GB':>9}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            save_model(folder, args.layers, tokenizer)
        folder = args.model or folder
        if {"pairs", "peer", "scores"} & set(args.stages):
            model, load = timed(lambda: load_for_inference(folder, "fp16"))
            if "pairs" in args.stages:
                for number in args.rows:
                    measure_pairs(
                        add_row, f"pairs, {number} rows", generate_shared_prefix, model, load, prompts, number
                    )
            if "peer" in args.stages:
                measure_pairs(add_row, "pairs, copied", copied, model, load, prompts[: 2 * ROWS], ROWS)
            if "scores" in args.stages:
                requests = made_requests.task_requests(test, shots_from, rows, args.limit)
                measure_scores(add_row, model, load, tokenizer, requests)
            del model
        if "pairs in int8" in args.stages:
            model, load = timed(lambda: load_for_inference(folder, "int8"))
            measure_pairs(add_row, "pairs in int8", generate_shared_prefix, model, load, prompts, args.rows[-1])
            del model
        if "dpo" in args.stages:
            measure_dpo(add_row, folder, tokenizer, questions, args.dpo_steps)


if __name__ == "__main__":
    run_main(main)
