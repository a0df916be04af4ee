"""Four ways to write pairs, side by side in one process: questions a second, memory, and whether the outputs agree.

    python benchmarks/generation.py --model models/smollm2 --dtype fp32 --num_query 32 --batch_size 32

`one`: `model.generate`, one question at a time. `padded`: batches of whole prompts. `copied`: batches that start from a
copy of the demonstrations' key-value cache. `engine`: `grath.shared_prefix`.
Ratios and identical outputs are against `one`.
"""

import gc
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grath.chat import MODEL_TYPES, prompt_ids, template_for  # noqa: E402
from grath.cli import PROJECT, Parser, positive_int, run  # noqa: E402
from grath.models import PRECISIONS, load_model, load_tokenizer, resolve_precision, stop_ids  # noqa: E402
from grath.questions import build_messages, load_demos, load_questions  # noqa: E402

WAYS = ("one", "padded", "copied", "engine")


def one(model, prompts, settings):
    """One prompt after the other: lists of completion ids."""
    return [_generate(model, [prompt], settings)[0] for prompt in prompts]


def padded(model, prompts, settings):
    """Batches of whole prompts, padded at the left."""
    size = settings["batch_size"]
    batches = (prompts[start : start + size] for start in range(0, len(prompts), size))
    return [completion for batch in batches for completion in _generate(model, batch, settings)]


def copied(model, prompts, settings):
    """Batches that start from copies of one cache of the common prefix."""
    import copy

    import torch
    from transformers import DynamicCache

    from grath.shared_prefix import common_prefix

    length = common_prefix(prompts)
    prefix = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.tensor([prompts[0][:length]], device=model.device), past_key_values=prefix, logits_to_keep=1)
    completions = []
    for start in range(0, len(prompts), settings["batch_size"]):
        batch = prompts[start : start + settings["batch_size"]]
        cache = copy.deepcopy(prefix)
        cache.batch_repeat_interleave(len(batch))
        completions += _generate(model, batch, settings, length, cache)
    return completions


def engine(model, prompts, settings):
    """The shared-prefix engine."""
    from grath.generation import generate

    completions = {}
    generate(
        model,
        prompts,
        settings["max_new_tokens"],
        settings["batch_size"],
        settings["stop_ids"],
        completions.__setitem__,
    )
    return [completions[i] for i in range(len(prompts))]


def _generate(model, prompts, settings, prefix_length=0, cache=None):
    """`model.generate` on a padded batch; the padding stands behind the prefix. Completions without the stop id."""
    import torch

    from grath.generation import until_stop

    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    ids = [
        prompt[:prefix_length] + [0] * pad + prompt[prefix_length:] for prompt, pad in zip(prompts, pads, strict=True)
    ]
    mask = [[1] * prefix_length + [0] * pad + [1] * (longest - prefix_length - pad) for pad in pads]
    stops = settings["stop_ids"]
    with torch.inference_mode():
        output = model.generate(
            torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            past_key_values=cache,
            max_new_tokens=settings["max_new_tokens"],
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=stops[0],
        )
    return [until_stop(completion, stops) for completion in output[:, longest:].tolist()]


def reset_peak():
    """Start a new measurement of the peak memory, where the system allows it."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes():
    """Peak memory since `reset_peak`: of the GPU, or of the process on a CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", default=str(PROJECT / "models" / "smollm2"), help="hub name, model folder or adapter's folder")
    add("--dtype", choices=PRECISIONS, default="fp32", help="precision of the model")
    add("--num_query", type=positive_int, default=32, help="questions")
    add("--batch_size", type=positive_int, nargs="+", default=[32], help="rows at once; several are compared")
    add("--max_new_tokens", type=positive_int, default=100, help="length limit of a completion")
    add("--data_name", help="hub data set in ARC's schema; if left out, the bundled questions")
    add("--model_type", choices=MODEL_TYPES, default="auto", help="chat tags")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="what to compare")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.model)
    template = template_for(tokenizer, args.model_type)
    source = None if args.data_name else PROJECT / "data" / "questions.jsonl"
    questions = load_questions(args.data_name, "ARC-Challenge", "train", source)[: args.num_query]
    demos = load_demos("truthfulqa")
    prompts = [prompt_ids(tokenizer, build_messages(question, 0, False, demos), template) for question in questions]
    precision = resolve_precision(args.dtype, "pairs")
    model = load_model(args.model, precision).eval()
    settings = {"max_new_tokens": args.max_new_tokens, "stop_ids": stop_ids(model, tokenizer)}
    print(f"{len(prompts)} questions, {precision}, {model.device}")
    print(
        f"{'way':10}{'batch':>6}{'seconds':>9}{'questions/s':>13}{'tokens/s':>10}{'extra MB':>10}{'ratio':>8}"
        f"{'identical':>11}"
    )
    streams = [way for way in args.ways if way == "one"]
    batched = [way for way in args.ways if way != "one"]
    first, speed = None, {}
    for way, size in [(way, 1) for way in streams] + [(way, size) for size in args.batch_size for way in batched]:
        reset_peak()
        before = peak_bytes()
        start = time.perf_counter()
        output = globals()[way](model, prompts, {**settings, "batch_size": size})
        seconds = time.perf_counter() - start
        speed[way, size] = len(prompts) / seconds
        first = first or (output, speed[way, size])
        same = sum(a == b for a, b in zip(output, first[0], strict=True))
        tokens = sum(map(len, output)) / seconds
        print(
            f"{way:10}{size:6}{seconds:9.1f}{speed[way, size]:13.2f}{tokens:10.1f}"
            f"{(peak_bytes() - before) / 1e6:10.0f}{speed[way, size] / first[1]:8.2f}{same:7} of {len(prompts)}",
            flush=True,
        )
    for size in args.batch_size:
        if {"copied", "engine"} <= set(batched):
            print(f"engine over copied, batches of {size}: {speed['engine', size] / speed['copied', size]:.2f}")


if __name__ == "__main__":
    run(main)
