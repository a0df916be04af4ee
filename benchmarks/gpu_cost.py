"""Count what the stages cost on a GPU, and compute the minutes of `./run_llama2.sh`. Needs no GPU.

    DATASETS_ROOT=../shared/hub python benchmarks/gpu_cost.py --markdown

Pairs and scores run the code of a GPU on Llama-2-7B in its real widths, on torch's `meta` device, which computes shapes
and no values. It runs with two layers and with three: the difference, 30 times, makes 32 layers. DPO runs on a CPU with
32 layers and narrow matrices. Every operator is counted, with its FLOPs and bytes, and the constants below turn them into
minutes. They are not measured here: `make gpu-test` measures some of them.

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
from grath.common.files import atomic_write_text, read_json_lines
from grath.common.paths import PROJECT
from grath.modeling.loading import load_tokenizer
from grath.modeling.memory import CARDS, CONTEXT, USABLE, dpo_memory, fitting_pairs, llama_2, weight_bytes
from grath.pairs.prompts import build_messages, load_demos
from grath.pairs.questions import load_hub_split, load_questions

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
ITERATIONS, STEPS, PAIRS_PER_STEP, ROWS = 2, 1000, 16, 64
# Questions of the published tasks.
PUBLISHED = {"arc_challenge": 1172, "hellaswag": 10_042, "mmlu": 14_042, "truthfulqa": 817}
SUBJECTS = 57
LLAMA_2_7B = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip
NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}


# What runs between two forward passes belongs to the first.
@dataclass
class Forward:
    """A forward pass: tokens with padding, operators, host synchronisations, FLOPs, and seconds of host and GPUs."""

    tokens: int = 0
    launches: int = 0
    host_syncs: int = 0
    flops: float = 0.0
    host: float = 0.0
    gpu: dict = field(default_factory=lambda: dict.fromkeys(GPUS, 0.0))

    def plus(self, factor, other):
        """Return this pass and `factor` times another: the same pass of models with other numbers of layers."""
        add = lambda a, b: a + factor * b  # noqa: E731
        gpu = {name: add(seconds, other.gpu[name]) for name, seconds in self.gpu.items()}
        names = ("launches", "host_syncs", "flops", "host")
        return Forward(self.tokens, *(add(getattr(self, name), getattr(other, name)) for name in names), gpu)


@dataclass
class Count:
    """What a stage did."""

    questions: int
    forwards: list = field(default_factory=list)
    peak_bytes: int = 0
    tokenizer_seconds: float = 0.0

    def total(self, name):
        return sum(getattr(forward, name) for forward in self.forwards)

    def seconds(self, gpu):
        """Return the seconds of all forward passes, each as long as the slower one of host and GPU."""
        return sum(max(forward.host, forward.gpu[gpu]) for forward in self.forwards)


def counter(count, model, width=1, products=None):
    """Return two context managers that count the operators of a model into `count`.

    Args:
        width: of a narrow model, how much wider the real one is: a factor for the bytes of the operators.
        products: of a narrow model, a function of a GPU and of tokens that returns the seconds of the real products.
    """
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    aten = torch.ops.aten
    current = Forward()  # what runs before the first forward pass

    def begin(module, args, kwargs):
        nonlocal current
        tokens = kwargs["input_ids"].numel()
        current = Forward(tokens)
        if products:
            current.gpu = {gpu: products(gpu, tokens) for gpu in GPUS}
        count.forwards.append(current)
        python.shape = kwargs["input_ids"].shape

    model.base_model.register_forward_pre_hook(begin, with_kwargs=True)

    def tensors_in(values):
        for value in values:
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, (list, tuple)):
                yield from tensors_in(value)

    class Operators(TorchDispatchMode):
        live, storages, counting = 0, set(), True

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if not self.counting:
                return out
            name = func._overloadpacket
            if name in (aten._local_scalar_dense, aten.nonzero):
                current.host_syncs += 1
            inputs, outputs = list(tensors_in(args)), list(tensors_in([out]))
            known = {tensor.untyped_storage()._cdata for tensor in inputs}
            new = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in known]
            for tensor in new:
                self.follow(tensor.untyped_storage())
            # A view launches nothing, and neither does memory without a value.
            if func._schema.is_mutable or (new and "empty" not in func._schema.name):
                flops = 0
                if name in flop_registry and not products:
                    flops = flop_registry[name](*args, **(kwargs or {}), out_val=out)
                moved = width * sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, *outputs))
                self.launch(flops, moved, any(tensor.dtype == torch.float32 for tensor in inputs))
            return out

        def launch(self, flops, moved, single):
            backward = torch._C._current_graph_task_id() != -1
            current.launches += 1
            current.flops += flops
            current.host += HOST_US["backward" if backward else "forward"] * 1e-6
            for gpu, (half, full, bandwidth) in GPUS.items():
                current.gpu[gpu] += max(flops / (full if single else half), moved / bandwidth) * 1e-12

        def follow(self, storage):
            """Count the memory of a tensor until it is freed."""
            if storage._cdata not in self.storages:
                self.storages.add(storage._cdata)
                self.live += storage.nbytes()
                count.peak_bytes = max(count.peak_bytes, self.live)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())

        def free(self, key, size):
            self.storages.discard(key)
            self.live -= size

    class Python(TorchFunctionMode):
        """Answers what needs values, which the `meta` device does not have."""

        shape, uploaded = None, None
        answer = staticmethod(lambda shape: torch.zeros(shape).tolist())

        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if func is torch.Tensor.tolist:
                current.host_syncs += 1
                if args[0].device.type == "meta":
                    with torch._C.DisableTorchFunction():
                        return self.answer(tuple(args[0].shape))
            if func is torch.tensor:
                self.uploaded = args[0]
            if func is torch.nn.functional.scaled_dot_product_attention and args[0].device.type == "meta":
                # On a GPU, causal attention is one kernel.
                kernel = aten._scaled_dot_product_flash_attention
                return kernel(*args, 0.0, kwargs["is_causal"], scale=kwargs["scale"])[0]
            return func(*args, **kwargs)

    python = Python()
    return Operators(), python


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
        operators, python = counter(count, model)
        with python, operators:
            run(model, python)
        counts.append(count)
    two, three = counts
    more = LLAMA_2_7B["num_hidden_layers"] - 2
    forwards = [
        first.plus(more, second.plus(-1, first)) for first, second in zip(two.forwards, three.forwards, strict=True)
    ]
    return Count(questions, forwards, two.peak_bytes + more * (three.peak_bytes - two.peak_bytes))


def pairs(tokenizer, questions):
    """Count one iteration's pairs: 64 rows, six few-shot examples, completions of 40 to 100 tokens."""
    from grath.generation.engine import generate_shared_prefix
    from grath.modeling.chat import prompt_ids, template_for

    template, demos = template_for(tokenizer, "llama2"), load_demos("truthfulqa")
    start = time.process_time()
    prompts = [prompt_ids(tokenizer, build_messages(question, 0, False, demos), template) for question in questions]
    spent = time.process_time() - start
    end = LLAMA_2_7B["vocab_size"] - 1

    def run(model, python):
        draw, lengths = random.Random(0), []

        def next_tokens(shape):
            """The token k says that k more follow; after 0 the completion ends."""
            if python.shape[1] == 1:  # a step: the engine has uploaded the newest tokens and the rows' lengths
                return [token - 1 if token else end for token in python.uploaded[0]]
            return [draw.randint(39, 99) for _ in range(shape[0])]

        python.answer = next_tokens
        generate_shared_prefix(model, prompts, 100, ROWS, [end], lambda _, ids: lengths.append(len(ids)))
        assert len(lengths) == len(prompts) and set(lengths) <= set(range(40, 101))

    count = count_7b(len(questions), run)
    count.tokenizer_seconds = spent
    return count


def with_int8(count):
    """Return the count with bitsandbytes' 8-bit linear layers, which the host launches one after the other."""
    operators, syncs = (7 * LLAMA_2_7B["num_hidden_layers"] * number for number in INT8_LINEAR)
    added = Forward(0, operators, syncs, 0.0, operators * HOST_US["forward"] * 1e-6)
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


def dpo(tokenizer, questions, steps, batch):
    """Count training steps of 16 pairs in 4 bit, in forward passes of `batch` pairs, on a narrow model."""
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

    from grath.dpo.config import GrathDPOConfig
    from grath.dpo.dataset import filter_pairs, tokenize_pairs
    from grath.dpo.trainer import GrathDPOTrainer, lora_config
    from grath.modeling.chat import template_for
    from grath.modeling.loading import load_model

    count = Count(len(questions))
    draw = random.Random(0)
    words = " ".join(question["question"] for question in questions).split()
    answer = lambda: text(draw, words, draw.randint(12, 28))  # noqa: E731
    rows = [{"question": q["question"], "correct": answer(), "incorrect": answer()} for q in questions]
    dataset, _ = filter_pairs(tokenize_pairs(rows, tokenizer, template_for(tokenizer, "llama2")), 1024)
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(**LLAMA_2_7B | NARROW | {"vocab_size": len(tokenizer)})
        LlamaForCausalLM(config).save_pretrained(f"{folder}/model")
        arguments = GrathDPOConfig(
            output_dir=f"{folder}/out", precision="fp4", max_steps=steps, per_device_train_batch_size=batch,
            save_strategy="no", disable_tqdm=True, use_cpu=True, optim="adamw_torch", logging_steps=10**6,
        )  # fmt: skip
        trainer = GrathDPOTrainer(
            model=load_model(f"{folder}/model", "fp4", trainable=True), args=arguments, train_dataset=dataset,
            processing_class=tokenizer, peft_config=lora_config(), reference="rolling",
        )  # fmt: skip
        width = LLAMA_2_7B["hidden_size"] / NARROW["hidden_size"]
        operators, python = counter(count, trainer.model.get_base_model(), width, products_of_a_pass)
        weights = sum(weight.requires_grad for weight in trainer.model.parameters())

        class PagedAdamW(TrainerCallback):
            """The optimiser of the GPU has one kernel for each matrix of the adapter."""

            def on_pre_optimizer_step(self, *_, **__):
                operators.counting = False

            def on_optimizer_step(self, *_, **__):
                operators.counting = True
                count.forwards[-1].launches += weights
                count.forwards[-1].host += weights * HOST_US["backward"] * 1e-6

        trainer.add_callback(PagedAdamW())
        with python, operators:
            trainer.train()
    for forward in count.forwards:
        forward.flops = 4 * matrices(LLAMA_2_7B) * forward.tokens
    count.forwards *= STEPS // steps
    count.peak_bytes = sum(dpo_memory(llama_2("7B"), "fp4", batch).values())
    return count


def products_of_a_pass(gpu, tokens):
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


def total_minutes(counts, gpu):
    """Return the minutes of `./run_llama2.sh`: two iterations, and three models scored by a process each."""
    models = ITERATIONS + 1
    loads = (2 * ITERATIONS + models) * (
        START_SECONDS + weight_bytes(llama_2("7B"), "fp16") * 1e-9 / READ_GB_PER_SECOND
    )
    made = minutes("pairs", counts["pairs"], gpu) + minutes("dpo", dpo_of(counts, gpu), gpu)
    scored = sum(minutes(name, counts[name], gpu) for name in PUBLISHED)
    return round(ITERATIONS * made + models * scored + loads / 60, 1)


def dpo_of(counts, gpu):
    """Return the count of DPO with as many pairs in a forward pass as the memory of a GPU takes."""
    return counts["dpo" if "24 GB" not in gpu else "dpo on 24 GB"]


def markdown(counts):
    """Return the table of docs/hardware.md."""
    head = ("questions", "forwards", "launches", "host syncs", "tokens", "median", "PFLOP", "peak GB", "tokenizer s")
    lines = [f"| stage | {' | '.join(head)} | {' | '.join(f'min, {gpu}' for gpu in GPUS)} |"]
    lines.append("| --- |" + " ---: |" * (len(head) + len(GPUS)))
    for name, count in counts.items():
        cells = [f"{value:,}" for key, value in stage_row(name, count).items() if key != "minutes"]
        cells += [f"{minutes(name, count, gpu):.1f}" for gpu in GPUS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    totals = " | ".join(f"{total_minutes(counts, gpu):.0f}" for gpu in GPUS)
    return "\n".join([*lines, f"| **`./run_llama2.sh`** |{' |' * len(head)} {totals} |"])


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
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")
    # The kernels of a GPU cannot be compared on the `meta` device.
    attention.fused_kernels_differ = lambda *_: None
    tokenizer = load_tokenizer(args.tokenizer)
    questions, test, rows, shots_from = load_data(args.limit)
    words = " ".join(question["question"] for question in shots_from).split()
    swag, mmlu = (args.limit or PUBLISHED[name] for name in ("hellaswag", "mmlu"))
    requests = {
        "arc_challenge": (arc_requests(test, shots_from), len(test)),
        "hellaswag": (hellaswag_requests(swag, words), swag),
        "mmlu": (mmlu_requests(mmlu, words), mmlu),
        "truthfulqa": (truthfulqa_requests(rows, words), len(rows)),
    }
    counts = {}

    def add_count(name, count):
        counts[name] = count
        print(f"{name}: {stage_row(name, count)}", file=sys.stderr, flush=True)

    shape = llama_2("7B")

    def with_weights(count, precision):
        return replace(count, peak_bytes=count.peak_bytes + CONTEXT + weight_bytes(shape, precision))

    in_fp16 = pairs(tokenizer, questions)
    add_count("pairs", with_weights(with_int8(in_fp16), "int8"))
    add_count("pairs in fp16", with_weights(in_fp16, "fp16"))
    small = fitting_pairs(shape, "fp4", USABLE * CARDS["24 GB"])
    for name, batch in (("dpo", PAIRS_PER_STEP), ("dpo on 24 GB", small)):
        add_count(name, dpo(tokenizer, questions, args.dpo_steps, batch))
    shared = register_shared_context_model()
    for name, (asked, number) in requests.items():
        add_count(name, with_weights(scores(shared, tokenizer, asked, number), "fp16"))
    gpu = next(iter(GPUS))
    total = total_minutes(counts, gpu)
    if args.json:
        stages = {name: stage_row(name, count) for name, count in counts.items()}
        atomic_write_text(
            args.json, json.dumps({"stages": stages, "total_minutes": total, "gpu": gpu}, indent=2) + "\n"
        )
    if args.markdown:
        print(markdown(counts))
    print(f"`./run_llama2.sh` on {gpu}: about {total} minutes" + (" with these questions" if args.limit else ""))


if __name__ == "__main__":
    run_main(main)
