"""Count what the stages cost on a GPU, and compute the minutes of every preset. Needs no GPU.

    DATASETS_ROOT=../shared/hub python benchmarks/gpu_cost.py --markdown

Pairs and scores run the code of a GPU on Llama-2-7B in its real widths, on torch's `meta` device, which computes shapes
and no values. It runs with two layers and with three: the difference, 30 times, makes 32 layers. DPO runs on a CPU with
32 layers and narrow matrices; its LM head and loss are those of a CPU. Every operator is counted, with its FLOPs and
bytes, and constants turn the counts into minutes. They are published or assumed: `make gpu-test` measures some of them.
The harness's own work (building the few-shot examples, metrics), checkpoints and sample answers are not counted.

The questions of the pairs, of ARC and of TruthfulQA are the real ones (as many as DATASETS_ROOT contains), tokenized
with SmolLM2's tokenizer. HellaSwag and MMLU are made of the words of ARC, with the published numbers and lengths.
"""

import json
import os
import random
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median

from made_requests import load_data, pair_prompts, task_requests, text
from operator_counter import GPUS, HOST_US, Count, Forward, counter

from grath.common.arguments import Parser, positive_int
from grath.common.errors import run_main
from grath.common.files import atomic_write_text
from grath.common.paths import PROJECT
from grath.modeling.loading import load_tokenizer
from grath.modeling.memory import CARDS, CONTEXT, USABLE, dpo_memory, fitting_pairs, fitting_rows, llama_2, weight_bytes
from grath.modeling.norms import fuse_norms

# An 8-bit linear layer on a GPU: operators and host synchronizations (bitsandbytes 0.50, backends/cuda/ops.py), and the
# milliseconds that it adds: a step of a 7B model takes 155 ms instead of 33 (bitsandbytes-foundation/bitsandbytes#347).
INT8_LINEAR = (16, 2, (154.55 - 32.89) / 224)
# Starting a process with its imports, and reading weights from a local disk.
START_SECONDS, READ_GB_PER_SECOND = 20, 2
STEPS, PAIRS_PER_STEP, QUESTIONS = 1000, 16, 1119
# Tokens of a completion.
SHORTEST, LONGEST = 40, 100
# Names the stages whose batches are smaller on a card of 24 GB.
SMALL = " on 24 GB"
# Iterations, and training steps of each.
PRESETS = {
    "`./run_llama2.sh`": (2, 1000),
    "`./run_zephyr.sh`": (2, 500),
    "`./run_llama2_fix_ref.sh`, `./run_zephyr_fix_ref.sh`": (10, 1000),
}
# Questions of the published tasks.
PUBLISHED = {"arc_challenge": 1172, "hellaswag": 10_042, "mmlu": 14_042, "truthfulqa": 817}
SHAPE = llama_2("7B")
LLAMA_2_7B = {
    "vocab_size": SHAPE.vocabulary, "hidden_size": SHAPE.hidden, "intermediate_size": SHAPE.intermediate,
    "num_hidden_layers": SHAPE.layers, "num_attention_heads": SHAPE.heads, "num_key_value_heads": SHAPE.key_heads,
    "max_position_embeddings": 4096,
}  # fmt: skip
NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}


def count_7b(questions, run):
    """Count a stage on Llama-2-7B.

    Args:
        run: function that runs the stage on a model, in the two contexts of `counter`, which it gets too.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    counts = []
    for layers in (2, 3):
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**LLAMA_2_7B | {"num_hidden_layers": layers})).half().eval()
        count = Count(questions)
        operators, python = counter(count, fuse_norms(model))
        with python, operators:
            run(model, python)
        counts.append(count)
    two, three = counts
    more = LLAMA_2_7B["num_hidden_layers"] - 2
    forwards = [
        first.plus(more, second.plus(-1, first)) for first, second in zip(two.forwards, three.forwards, strict=True)
    ]
    return Count(questions, forwards, two.peak_bytes + more * (three.peak_bytes - two.peak_bytes))


def first_tokens(draw, count):
    """Draw the first tokens of completions: the token k says that k more follow."""
    return [draw.randint(SHORTEST - 1, LONGEST - 1) for _ in range(count)]


def following(tokens, end):
    """Return the tokens after these, with `end` after 0."""
    return [token - 1 if token else end for token in tokens]


def pairs(tokenizer, questions, rows):
    """Count one iteration's pairs: six few-shot examples, completions of 40 to 100 tokens, `rows` at once."""
    from grath.generation.engine import generate_shared_prefix

    start = time.process_time()
    prompts = pair_prompts(tokenizer, questions)
    spent = time.process_time() - start
    end = LLAMA_2_7B["vocab_size"] - 1

    def run(model, python):
        draw, lengths = random.Random(0), []

        def next_tokens(shape):
            if shape[0] == python.shape[1]:  # a step: the engine has uploaded the new tokens first
                return following(python.uploaded[: shape[0]], end)
            return first_tokens(draw, shape[0])

        python.answer = next_tokens
        generate_shared_prefix(model, prompts, LONGEST, rows, [end], lambda _, ids: lengths.append(len(ids)))
        assert len(lengths) == len(prompts) and set(lengths) <= set(range(SHORTEST, LONGEST + 1))

    count = count_7b(len(questions), run)
    count.tokenizer_seconds = spent
    return count


def with_int8(count):
    """Return the count with bitsandbytes' 8-bit linear layers, which the host launches one after the other."""
    operators, syncs, milliseconds = (7 * LLAMA_2_7B["num_hidden_layers"] * number for number in INT8_LINEAR)
    added = Forward(0, operators, syncs, 0.0, milliseconds * 1e-3)
    return replace(count, forwards=[forward.plus(1, added) for forward in count.forwards])


def scores(shared, tokenizer, requests, questions):
    """Count the scoring of one task's requests with the harness's model class `shared`."""
    from lm_eval.api.instance import Instance

    tokenized, spent = [], 0.0

    def run(model, python):
        nonlocal spent
        lm = shared(pretrained=model, tokenizer=tokenizer, max_length=LLAMA_2_7B["max_position_embeddings"])
        if not tokenized:
            score = lm._loglikelihood_tokens
            lm._loglikelihood_tokens = lambda found, **_: tokenized.extend(found) or [(0.0, False)] * len(found)
            start = time.process_time()
            lm.loglikelihood([Instance("loglikelihood", {}, request, 0) for request in requests], disable_tqdm=True)
            spent = time.process_time() - start
            lm._loglikelihood_tokens = score
        lm._loglikelihood_tokens(tokenized, disable_tqdm=True)

    count = count_7b(questions, run)
    count.tokenizer_seconds = spent
    return count


def made_pairs(tokenizer, questions):
    """Return tokenized pairs of the questions, with answers of 12 to 28 words."""
    from grath.dpo.dataset import filter_pairs, tokenize_pairs
    from grath.modeling.chat import template_for

    draw = random.Random(0)
    words = " ".join(question["question"] for question in questions).split()
    answer = lambda: text(draw, words, draw.randint(12, 28))  # noqa: E731
    rows = [{"question": q["question"], "correct": answer(), "incorrect": answer()} for q in questions]
    return filter_pairs(tokenize_pairs(rows, tokenizer, template_for(tokenizer, "llama2")), 1024)[0]


def dpo(tokenizer, questions, steps, batch):
    """Count the training in 4 bit on a narrow model: the reference's pass, and steps in passes of `batch` pairs."""
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

    from grath.dpo.config import GrathDPOConfig
    from grath.dpo.trainer import GrathDPOTrainer, lora_config
    from grath.modeling.loading import load_model

    count = Count(len(questions))
    dataset = made_pairs(tokenizer, questions)
    sample = dataset.select(range(0, len(dataset), max(1, len(dataset) // 128)))
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(**LLAMA_2_7B | NARROW | {"vocab_size": len(tokenizer)})
        LlamaForCausalLM(config).save_pretrained(f"{folder}/model")
        arguments = GrathDPOConfig(
            output_dir=f"{folder}/out", precision="fp4", max_steps=steps, per_device_train_batch_size=batch,
            save_strategy="no", disable_tqdm=True, use_cpu=True, optim="adamw_torch", logging_steps=10**6,
        )  # fmt: skip
        model = load_model(f"{folder}/model", "fp4", trainable=True)
        width = LLAMA_2_7B["hidden_size"] / NARROW["hidden_size"]
        operators, python = counter(count, model, width, products_of_a_pass)
        with python, operators:
            trainer = GrathDPOTrainer(
                model=model, args=arguments, train_dataset=sample, processing_class=tokenizer,
                peft_config=lora_config(), reference="rolling",
            )  # fmt: skip
        of_reference = count.forwards[:]
        weights = sum(weight.requires_grad for weight in trainer.model.parameters())

        class PagedAdamW(TrainerCallback):
            """The optimizer of the GPU has a kernel for each matrix of the adapter, and waits after each of them."""

            def on_pre_optimizer_step(self, *_, **__):
                operators.counting = False

            def on_optimizer_step(self, *_, **__):
                operators.counting = True
                count.forwards[-1].launches += weights
                count.forwards[-1].host_syncs += weights + 1
                count.forwards[-1].host += weights * HOST_US["forward"] * 1e-6

        trainer.add_callback(PagedAdamW())
        with python, operators:
            trainer.train()
    training = count.forwards[len(of_reference) :]
    for forwards, factor in ((of_reference, 2), (training, 4)):
        for forward in forwards:
            forward.flops = factor * matrices(LLAMA_2_7B) * forward.tokens
    passes = -(-len(dataset) // PAIRS_PER_STEP)
    count.forwards = (of_reference * -(-passes // len(of_reference)))[:passes] + training * (STEPS // steps)
    count.peak_bytes = sum(dpo_memory(SHAPE, "fp4", batch).values())
    return count


def products_of_a_pass(gpu, tokens):
    """Return the seconds of the real sizes' products with frozen weights that are dequantized; twice in training."""
    import torch

    half, _, bandwidth = GPUS[gpu]
    parameters, directions = matrices(LLAMA_2_7B), 1 + torch.is_grad_enabled()
    return directions * (2 * parameters * tokens / half + 2.5 * parameters / bandwidth) * 1e-12


def matrices(config):
    """Return the parameters in the matrices of a Llama's layers."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    return config["num_hidden_layers"] * (4 * hidden * hidden + 3 * hidden * inner)


def stage_row(name, count):
    """Return a stage's entry of the JSON file: its counts, and the minutes on the first GPU."""
    return {
        "questions": count.questions,
        "forwards": len(count.forwards),
        "launches": count.total("launches"),
        "host_syncs": count.total("host_syncs"),
        "tokens": count.total("tokens"),
        "median_tokens": median(forward.tokens for forward in count.forwards),
        "pflop": round(count.total("flops") / 1e15, 2),
        "peak_gb": round(count.peak_bytes / 1e9, 1),
        "tokenizer_seconds": round(count.tokenizer_seconds, 1),
        "minutes": minutes(name, count, next(iter(GPUS))),
    }


def minutes(name, count, gpu):
    """Return the minutes of a stage on a GPU, for all questions of the published task."""
    share = PUBLISHED.get(name, count.questions) / count.questions
    return round(share * (count.seconds(gpu) + count.tokenizer_seconds) / 60, 2)


def total_minutes(counts, gpu, iterations, steps, pairs_count="pairs"):
    """Return the minutes of a preset: its iterations, and one model more than these, scored by a process each."""
    models = iterations + 1
    loads = (2 * iterations + models) * (START_SECONDS + weight_bytes(SHAPE, "fp16") * 1e-9 / READ_GB_PER_SECOND)
    made = sum(
        share * minutes(name, counts[f"{name}{SMALL if '24 GB' in gpu else ''}"], gpu)
        for name, share in ((pairs_count, 1), ("dpo", steps / STEPS))
    )
    scored = sum(minutes(name, counts[name], gpu) for name in PUBLISHED)
    return round(iterations * made + models * scored + loads / 60, 1)


def markdown(counts):
    """Return the two tables of docs/hardware.md: the stages, and the presets."""
    head = ("questions", "forwards", "launches", "host syncs", "tokens", "median", "PFLOP", "peak GB", "tokenizer s")
    lines = [f"| stage | {' | '.join(head)} | {' | '.join(f'min, {gpu}' for gpu in GPUS)} |"]
    lines.append("| --- |" + " ---: |" * (len(head) + len(GPUS)))
    for name, count in counts.items():
        cells = [f"{value:,}" for key, value in stage_row(name, count).items() if key != "minutes"]
        cells += [f"{minutes(name, count, gpu):.1f}" for gpu in GPUS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"| preset | pairs | iterations | {' | '.join(GPUS)} |",
        "| --- | --- | ---: |" + " ---: |" * len(GPUS),
    ]
    for preset, (iterations, steps) in PRESETS.items():
        for precision, pairs_count in (("int8", "pairs"), ("fp16", "pairs in fp16")):
            of_gpus = [total_minutes(counts, gpu, iterations, steps, pairs_count) for gpu in GPUS]
            totals = " | ".join(f"{total:.0f} min ({total / 60:.1f} h)" for total in of_gpus)
            lines.append(f"| {preset} | {precision} | {iterations} | {totals} |")
    return "\n".join(lines)


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--limit", type=positive_int, help="count only the first N questions of each stage")
    add("--dpo_steps", type=positive_int, default=8, help="training steps that are counted")
    add("--tokenizer", default=str(PROJECT / "models" / "smollm2"), help="hub name or folder of the tokenizer")
    add("--markdown", action="store_true", help="print the tables for docs/hardware.md")
    add("--json", type=Path, metavar="FILE", help="also write the counts to a JSON file")
    args = parser.parse_args()
    from grath.evaluation.harness import register_shared_context_model
    from grath.generation import attention

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")
    # The kernels of a GPU cannot be compared on the `meta` device.
    attention.fused_kernels_differ = lambda *_: None
    tokenizer = load_tokenizer(args.tokenizer)
    questions, test, rows, shots_from = load_data(args.limit)
    made = (args.limit or PUBLISHED[name] for name in ("hellaswag", "mmlu"))
    requests = task_requests(test, shots_from, rows, *made)
    counts = {}

    def add_count(name, count):
        counts[name] = count
        print(f"{name}: {stage_row(name, count)}", file=sys.stderr, flush=True)

    def with_weights(count, precision):
        return replace(count, peak_bytes=count.peak_bytes + CONTEXT + weight_bytes(SHAPE, precision))

    cards = {"": USABLE * CARDS["80 GB"], SMALL: USABLE * CARDS["24 GB"]}
    pairs_with = cache(lambda rows: pairs(tokenizer, questions, rows))
    for card, room in cards.items():
        in_int8, in_fp16 = (pairs_with(fitting_rows(SHAPE, precision, room)) for precision in ("int8", "fp16"))
        add_count(f"pairs{card}", with_weights(with_int8(in_int8), "int8"))
        add_count(f"pairs in fp16{card}", with_weights(in_fp16, "fp16"))
    with redirect_stdout(sys.stderr):  # the training's log is no part of the tables
        for card, room in cards.items():
            batch = fitting_pairs(SHAPE, "fp4", room)
            add_count(f"dpo{card}", dpo(tokenizer, questions, args.dpo_steps, batch))
    shared = register_shared_context_model()
    for name, (asked, number) in requests.items():
        add_count(name, with_weights(scores(shared, tokenizer, asked, number), "fp16"))
    gpu = next(iter(GPUS))
    preset = next(iter(PRESETS))
    total = total_minutes(counts, gpu, *PRESETS[preset])
    if args.json:
        stages = {name: stage_row(name, count) for name, count in counts.items()}
        atomic_write_text(
            args.json, json.dumps({"stages": stages, "total_minutes": total, "gpu": gpu}, indent=2) + "\n"
        )
    if args.markdown:
        print(markdown(counts))
    print(f"{preset} on {gpu}: about {total} minutes" + (" with these questions" if args.limit else ""))


if __name__ == "__main__":
    run_main(main)
