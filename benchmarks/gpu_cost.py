"""Count what the stages cost on a GPU, and compute the minutes of `./run_llama2.sh`. Needs no GPU.

    DATASETS_ROOT=../shared/hub python benchmarks/gpu_cost.py --markdown

Pairs and scores run the code of a GPU on Llama-2-7B in its real sizes, but on torch's `meta` device, which computes
shapes and no values. DPO runs on a CPU with narrow matrices and the same 32 layers. Every operator is counted, with its
FLOPs and bytes; the constants below turn them into minutes. They are not measured here: `make gpu-test` measures them.

The questions of the pairs, of ARC and of TruthfulQA are the real ones (as many as DATASETS_ROOT contains), tokenized
with SmolLM2's tokenizer. HellaSwag and MMLU are made of the words of ARC, with the published numbers and lengths.
"""

import json
import os
import random
import sys
import tempfile
import time
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from grath.common.arguments import Parser, positive_int
from grath.common.errors import run_main
from grath.common.files import atomic_write_text
from grath.common.paths import PROJECT
from grath.modeling.loading import load_tokenizer
from grath.pairs.prompts import build_messages, load_demos
from grath.pairs.questions import load_questions

# Dense TFLOP/s in 16 bit and in float32 and TB/s, from NVIDIA's data sheets, times the share that large matrix products
# and copies reach in practice.
GPUS = {
    "H100 80 GB": (0.65 * 989, 0.7 * 67, 0.8 * 3.35),
    "A100 80 GB": (0.75 * 312, 0.8 * 19.5, 0.8 * 2.04),
    "RTX 4090 24 GB": (0.85 * 165, 0.7 * 82.6, 0.8 * 1.01),
}
# Host time of an operator of transformers' modules without CUDA graphs: a step of greedy `generate` on a 7B model takes
# 25 to 30 ms on any of these GPUs, in about 1,700 operators. Backward passes run in C++.
HOST_US = {"forward": 16, "backward": 6}
# An 8-bit linear layer on a GPU (bitsandbytes 0.50, backends/cuda/ops.py): operators and host synchronisations.
INT8_LINEAR = (16, 2)
# Starting a process with its imports, and reading weights from a local disk.
START_SECONDS, READ_GB_PER_SECOND = 20, 2
ITERATIONS, STEPS, PAIRS_PER_STEP, BATCH = 2, 1000, 16, 64
# Questions of the published tasks.
PUBLISHED = {"arc_challenge": 1172, "hellaswag": 10_042, "mmlu": 14_042, "truthfulqa": 817}
SUBJECTS = 57
LLAMA_2_7B = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip
NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}


@dataclass
class Count:
    """What a stage did: see the columns of the table. `forward_tokens` has one number per forward pass."""

    questions: int = 0
    launches: int = 0
    host_syncs: int = 0
    forward_tokens: list = field(default_factory=list)
    flops: float = 0.0
    peak_bytes: int = 0
    tokenizer_seconds: float = 0.0
    # GPU: seconds of all forward passes, each as long as the slower one of host and GPU.
    seconds: dict = field(default_factory=lambda: dict.fromkeys(GPUS, 0.0))


def meter(count):
    """Return a context manager that counts every operator into `count`, and has `end_forward` and `answer`."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import flop_registry

    class Operators(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.live, self.storages, self.shape = 0, set(), None
            # Of a narrow model: how much wider the real one is, and the seconds of its matrix products.
            self.width, self.products = 1, lambda gpu, tokens: 0.0
            self.host, self.gpu = 0.0, dict.fromkeys(GPUS, 0.0)

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            name = func._overloadpacket
            if name is torch.ops.aten._local_scalar_dense or name is torch.ops.aten.nonzero:
                count.host_syncs += 1
            before = {tensor.untyped_storage()._cdata for tensor in tensors}
            new = [tensor for tensor in results if tensor.untyped_storage()._cdata not in before]
            self.keep(new)
            if func._schema.is_mutable or (new and "empty" not in func._schema.name):
                self.launch(name, args, kwargs, out, tensors, results, flop_registry)
            return out

        def launch(self, name, args, kwargs, out, tensors, results, formulas):
            count.launches += 1
            self.host += HOST_US["backward" if torch._C._current_graph_task_id() != -1 else "forward"] * 1e-6
            flops = formulas[name](*args, **(kwargs or {}), out_val=out) if name in formulas else 0
            count.flops += flops
            moved = self.width * sum(tensor.numel() * tensor.element_size() for tensor in (*tensors, *results))
            single = any(tensor.dtype == torch.float32 for tensor in tensors)
            for gpu, (half, full, bandwidth) in GPUS.items():
                self.gpu[gpu] += max(flops / (full if single else half), moved / bandwidth) * 1e-12

        def keep(self, tensors):
            """Follow the memory of new tensors until it is freed."""
            for tensor in tensors:
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key in self.storages:
                    continue
                size = storage.nbytes()
                self.storages.add(key)
                self.live += size
                weakref.finalize(storage, self.free, key, size)
            count.peak_bytes = max(count.peak_bytes, self.live)

        def free(self, key, size):
            self.storages.discard(key)
            self.live -= size

        def end_forward(self):
            """Add the time of the last forward pass and of what followed it: that of the host or of the GPU."""
            if self.shape:
                count.forward_tokens.append(self.shape.numel())
            for gpu, seconds in self.gpu.items():
                products = self.products(gpu, self.shape.numel()) if self.shape else 0.0
                count.seconds[gpu] += max(self.host, seconds + products)
            self.host, self.gpu, self.shape = 0.0, dict.fromkeys(GPUS, 0.0), None

    class Python(TorchFunctionMode):
        """Answers what needs values, which the `meta` device does not have."""

        answer = staticmethod(lambda shape: torch.zeros(shape).tolist())
        uploaded = None

        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if func is torch.Tensor.tolist:
                count.host_syncs += 1
                if args[0].device.type == "meta":
                    with torch._C.DisableTorchFunction():
                        return self.answer(tuple(args[0].shape))
            if func is torch.tensor:
                self.uploaded = args[0]
            if func is torch.nn.functional.scaled_dot_product_attention and args[0].device.type == "meta":
                # On a GPU, attention without a mask is one kernel.
                kernel = torch.ops.aten._scaled_dot_product_flash_attention
                return kernel(*args, 0.0, kwargs["is_causal"], scale=kwargs["scale"])[0]
            return func(*args, **kwargs)

    return Operators(), Python()


def llama(dtype):
    """Return Llama-2-7B on the `meta` device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**LLAMA_2_7B)).to(dtype).eval()


def count_forwards(model, operators):
    """Let the counter see where the forward passes of a model begin and how many tokens they have."""

    def begin(module, args, kwargs):
        operators.end_forward()
        operators.shape = kwargs["input_ids"].shape

    model.base_model.register_forward_pre_hook(begin, with_kwargs=True)
    return operators.end_forward


def pairs(tokenizer, questions):
    """Count one iteration's pairs: 64 rows, six few-shot examples, completions of 40 to 100 tokens."""
    import torch

    from grath.generation.engine import generate_shared_prefix
    from grath.modeling.chat import prompt_ids, template_for

    count = Count(questions=len(questions))
    template, demos = template_for(tokenizer, "llama2"), load_demos("truthfulqa")
    start = time.process_time()
    prompts = [prompt_ids(tokenizer, build_messages(question, 0, False, demos), template) for question in questions]
    count.tokenizer_seconds = time.process_time() - start
    model = llama(torch.float16)
    operators, python = meter(count)
    finish = count_forwards(model, operators)
    draw, end = random.Random(0), LLAMA_2_7B["vocab_size"] - 1

    def next_tokens(shape):
        """The token k says that k more follow; after 0 the completion ends."""
        if operators.shape[1] == 1:  # a step: the engine has uploaded the newest tokens and the rows' lengths
            return [token - 1 if token else end for token in python.uploaded[0]]
        return [draw.randint(39, 99) for _ in range(shape[0])]

    python.answer = next_tokens
    lengths = []
    with python, operators:
        generate_shared_prefix(model, prompts, 100, BATCH, [end], lambda _, ids: lengths.append(len(ids)))
        finish()
    assert len(lengths) == len(prompts) and set(lengths) <= set(range(40, 101)), sorted(set(lengths))
    return count


def with_int8(count):
    """Return the count with bitsandbytes' 8-bit linear layers, which the host launches one after the other."""
    layers = 7 * LLAMA_2_7B["num_hidden_layers"] * len(count.forward_tokens)
    added = layers * INT8_LINEAR[0]
    return replace(
        count,
        launches=count.launches + added,
        host_syncs=count.host_syncs + layers * INT8_LINEAR[1],
        seconds={gpu: seconds + added * HOST_US["forward"] * 1e-6 for gpu, seconds in count.seconds.items()},
    )


def scores(shared, tokenizer, requests, questions):
    """Count the scoring of one task's requests with the harness's model class `shared`."""
    import torch
    from lm_eval.api.instance import Instance

    count = Count(questions=questions)
    model = llama(torch.float16)
    lm = shared(pretrained=model, tokenizer=tokenizer, max_length=LLAMA_2_7B["max_position_embeddings"])
    operators, python = meter(count)
    finish = count_forwards(model, operators)
    tokenized, score = lm._loglikelihood_tokens, []
    lm._loglikelihood_tokens = lambda found, disable_tqdm=False: score.append(found) or [(0.0, False)] * len(found)
    start = time.process_time()
    lm.loglikelihood([Instance("loglikelihood", {}, request, 0) for request in requests], disable_tqdm=True)
    count.tokenizer_seconds = time.process_time() - start
    with python, operators:
        tokenized(score.pop(), disable_tqdm=True)
        finish()
    return count


def dpo(tokenizer, questions, steps):
    """Count training steps of 16 pairs in 4 bit, on a narrow model; the tokens are those of the real sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

    from grath.dpo.config import GrathDPOConfig
    from grath.dpo.dataset import filter_pairs, tokenize_pairs
    from grath.dpo.trainer import GrathDPOTrainer, lora_config
    from grath.modeling.chat import template_for
    from grath.modeling.loading import load_model

    count = Count(questions=len(questions))
    draw = random.Random(0)
    words = " ".join(question["question"] for question in questions).split()
    rows = [
        {
            "question": question["question"],
            "correct": text(draw, words, draw.randint(12, 28)),
            "incorrect": text(draw, words, draw.randint(12, 28)),
        }
        for question in questions
    ]
    dataset, _ = filter_pairs(tokenize_pairs(rows, tokenizer, template_for(tokenizer, "llama2")), 1024)
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(**LLAMA_2_7B | NARROW | {"vocab_size": len(tokenizer)})
        LlamaForCausalLM(config).save_pretrained(f"{folder}/model")
        model = load_model(f"{folder}/model", "fp4", trainable=True)
        arguments = GrathDPOConfig(
            output_dir=f"{folder}/out", precision="fp4", max_steps=steps, per_device_train_batch_size=PAIRS_PER_STEP,
            save_strategy="no", disable_tqdm=True, use_cpu=True, optim="adamw_torch", logging_steps=10**6,
        )  # fmt: skip
        trainer = GrathDPOTrainer(
            model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer, peft_config=lora_config(),
            reference="rolling",
        )  # fmt: skip
        operators, python = meter(count)
        operators.width, operators.products = LLAMA_2_7B["hidden_size"] / NARROW["hidden_size"], products_of_a_step
        finish = count_forwards(trainer.model.get_base_model(), operators)

        class Steps(TrainerCallback):
            """The optimiser of the GPU, paged AdamW, has one kernel for each matrix of the adapter."""

            def on_pre_optimizer_step(self, *_, **__):
                self.before = (count.launches, count.host_syncs, operators.host, dict(operators.gpu))

            def on_optimizer_step(self, *_, **__):
                count.launches, count.host_syncs, operators.host, operators.gpu = self.before
                kernels = sum(weight.requires_grad for weight in trainer.model.parameters())
                count.launches += kernels
                operators.host += kernels * HOST_US["backward"] * 1e-6

        trainer.add_callback(Steps())
        with python, operators:
            trainer.train()
            finish()
    for total in ("launches", "host_syncs"):
        setattr(count, total, getattr(count, total) * STEPS // steps)
    count.forward_tokens = count.forward_tokens * (STEPS // steps)
    count.flops = 4 * matrices(LLAMA_2_7B) * sum(count.forward_tokens)
    count.seconds = {gpu: seconds * STEPS / steps for gpu, seconds in count.seconds.items()}
    return count


def products_of_a_step(gpu, tokens):
    """Return the seconds of the real sizes' products, forward and back through frozen weights that are dequantised."""
    half, _, bandwidth = GPUS[gpu]
    parameters = matrices(LLAMA_2_7B)
    return (4 * parameters * tokens / half + 2 * 2.5 * parameters / bandwidth) * 1e-12


def matrices(config):
    """Return the parameters in the matrices of a Llama's layers."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    return config["num_hidden_layers"] * (4 * hidden * hidden + 3 * hidden * inner)


def text(draw, words, count):
    """Draw `count` neighbouring words, so that the tokenizer sees text."""
    start = draw.randrange(len(words) - count)
    return " ".join(words[start : start + count])


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
        # From 40 words a question (most subjects) to 400 (law, history).
        length = int(40 * 10 ** draw.betavariate(1, 3))
        ask = lambda length=length: text(draw, words, draw.randint(length // 2, length * 3 // 2)) + "\nAnswer:"  # noqa: E731
        head = text(draw, words, 10) + "\n\n" + "".join(f"{ask()} {draw.choice('ABCD')}\n\n" for _ in range(shots))
        for _ in range(count * (subject + 1) // SUBJECTS - count * subject // SUBJECTS):
            question = head + ask()
            requests += [(question, f" {letter}") for letter in "ABCD"]
    return requests


def load_data(limit):
    """Load ARC's training and test questions and TruthfulQA's rows; without DATASETS_ROOT, the bundled ones."""
    from grath.common.files import read_json_lines
    from grath.pairs.questions import load_hub_split

    if os.environ.get("DATASETS_ROOT"):
        train, test = (load_questions("allenai/ai2_arc", "ARC-Challenge", split) for split in ("train", "test"))
        rows = list(load_hub_split("truthfulqa/truthful_qa", "multiple_choice", "validation"))
    else:
        train = load_questions(data_path=PROJECT / "data" / "questions.jsonl")
        test = train[:60]
        rows = read_json_lines(PROJECT / "data" / "truthfulness_mc.jsonl", "bundled question set")
    return train[:limit], test[:limit], rows[:limit], train


def stage_row(name, count):
    """Return a stage's entry of the JSON file: its counts, and the minutes on the first GPU."""
    return {
        "questions": count.questions,
        "forwards": len(count.forward_tokens),
        "launches": count.launches,
        "host_syncs": count.host_syncs,
        "tokens": sum(count.forward_tokens),
        "median_tokens": median(count.forward_tokens),
        "pflop": round(count.flops / 1e15, 2),
        "peak_gb": round(count.peak_bytes / 1e9, 1),
        "tokenizer_seconds": round(count.tokenizer_seconds, 1),
        "minutes": minutes(name, count, next(iter(GPUS))),
    }


def minutes(name, count, gpu):
    """Return the minutes of a stage on a GPU, for all questions of the published task."""
    share = PUBLISHED.get(name, count.questions) / count.questions
    return round(share * (count.seconds[gpu] + count.tokenizer_seconds) / 60, 2)


def total_minutes(counts, gpu):
    """Return the minutes of `./run_llama2.sh`: two iterations, three models scored, seven processes that load it."""
    loads = (2 * ITERATIONS + ITERATIONS + 1) * (START_SECONDS + 13.5 / READ_GB_PER_SECOND) / 60
    scored = sum(minutes(name, counts[name], gpu) for name in PUBLISHED)
    made = minutes("pairs", counts["pairs"], gpu) + minutes("dpo", counts["dpo"], gpu)
    return round(ITERATIONS * made + (ITERATIONS + 1) * scored + loads, 1)


def markdown(counts):
    """Return the table of docs/hardware.md."""
    lines = [
        "| stage | questions | forwards | launches | host syncs | tokens | median | PFLOP | peak GB | tokenizer s | "
        + " | ".join(f"min, {gpu}" for gpu in GPUS)
        + " |",
        "| --- |" + " ---: |" * (9 + len(GPUS)),
    ]
    for name, count in counts.items():
        row = stage_row(name, count)
        cells = [f"{row[key]:,}" for key in row if key != "minutes"] + [
            f"{minutes(name, count, gpu):.1f}" for gpu in GPUS
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    totals = " | ".join(f"{total_minutes(counts, gpu):.0f}" for gpu in GPUS)
    lines.append("| **`./run_llama2.sh`** |" + " |" * 9 + f" {totals} |")
    return "\n".join(lines)


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--limit", type=positive_int, help="count only the first N questions of each stage")
    add("--dpo_steps", type=positive_int, default=2, help="training steps that are counted")
    add("--tokenizer", default=str(PROJECT / "models" / "smollm2"), help="hub name or folder of the tokenizer")
    add("--markdown", action="store_true", help="print the table for docs/hardware.md")
    add("--json", type=Path, metavar="FILE", help="also write the counts to a JSON file")
    args = parser.parse_args()
    from grath.evaluation.harness import register_shared_context_model
    from grath.generation import attention

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The kernels of a GPU cannot be compared on the `meta` device.
    attention.fused_kernels_differ = lambda *_: None
    tokenizer = load_tokenizer(args.tokenizer)
    questions, test, rows, shots_from = load_data(args.limit)
    words = " ".join(question["question"] for question in shots_from).split()
    requests = {
        "arc_challenge": (arc_requests(test, shots_from), len(test)),
        "hellaswag": (hellaswag_requests(n := args.limit or PUBLISHED["hellaswag"], words), n),
        "mmlu": (mmlu_requests(n := args.limit or PUBLISHED["mmlu"], words), n),
        "truthfulqa": (truthfulqa_requests(rows, words), len(rows)),
    }
    counts = {"pairs": pairs(tokenizer, questions)}
    print(f"pairs: {stage_row('pairs', counts['pairs'])}", file=sys.stderr, flush=True)
    counts["pairs_fp16"] = counts["pairs"]
    counts["pairs"] = with_int8(counts["pairs"])
    counts["dpo"] = dpo(tokenizer, questions, args.dpo_steps)
    print(f"dpo: {stage_row('dpo', counts['dpo'])}", file=sys.stderr, flush=True)
    shared = register_shared_context_model()
    for name, (asked, number) in requests.items():
        counts[name] = scores(shared, tokenizer, asked, number)
        print(f"{name}: {stage_row(name, counts[name])}", file=sys.stderr, flush=True)
    gpu = next(iter(GPUS))
    total = total_minutes(counts, gpu)
    if args.json:
        stages = {name: stage_row(name, count) for name, count in counts.items()}
        atomic_write_text(
            args.json, json.dumps({"stages": stages, "total_minutes": total, "gpu": gpu}, indent=2) + "\n"
        )
    print(markdown(counts) if args.markdown else "\n".join(f"{n}: {stage_row(n, c)}" for n, c in counts.items()))
    print(f"`./run_llama2.sh` on {gpu}: about {total} minutes" + (" of the counted questions" if args.limit else ""))


if __name__ == "__main__":
    run_main(main)
