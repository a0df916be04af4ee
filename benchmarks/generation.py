"""Compare four ways to generate pairs in one process: speed, memory, and identical completions.

    python benchmarks/generation.py --model models/smollm2 --dtype fp32 --num_query 32 --batch_size 32

`one`: `model.generate`, one question at a time. `padded`: batches of whole prompts. `copied`: batches that start from
copies of the few-shot examples' KV cache. `engine`: the shared-prefix engine in `grath.generation`.
The first way in the table is the baseline of the ratios and of the identical completions.
"""

import gc
import time
from pathlib import Path

from grath.common.arguments import Parser, positive_int
from grath.common.errors import run_main
from grath.common.paths import PROJECT
from grath.modeling.chat import MODEL_TYPES, prompt_ids, template_for
from grath.modeling.loading import eos_token_ids, load_model, load_tokenizer
from grath.modeling.precision import PRECISIONS, resolve_precision
from grath.pairs.prompts import build_messages, load_demos
from grath.pairs.questions import load_questions

WAYS = ("one", "padded", "copied", "engine")


def one(model, prompts, settings):
    """Generate for one prompt at a time; return lists of completion ids, as the other ways do."""
    return [_generate(model, [prompt], settings)[0] for prompt in prompts]


def padded(model, prompts, settings):
    """Generate in batches of whole prompts, padded on the left."""
    size = settings["batch_size"]
    batches = (prompts[start : start + size] for start in range(0, len(prompts), size))
    return [completion for batch in batches for completion in _generate(model, batch, settings)]


def copied(model, prompts, settings):
    """Generate in batches that start from copies of the KV cache of the common prefix."""
    import copy

    import torch
    from transformers import DynamicCache

    from grath.generation.cache import common_prefix_length

    length = common_prefix_length(prompts)
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
    """Generate with the shared-prefix engine."""
    from grath.generation.engine import generate_shared_prefix

    completions = {}
    generate_shared_prefix(
        model,
        prompts,
        settings["max_new_tokens"],
        settings["batch_size"],
        settings["eos_ids"],
        completions.__setitem__,
    )
    return [completions[i] for i in range(len(prompts))]


def _generate(model, prompts, settings, prefix_length=0, cache=None):
    """Call `model.generate` on a batch padded after the prefix; return completion ids without the EOS."""
    import torch

    from grath.generation.hf import truncate_at_eos

    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    ids = [
        prompt[:prefix_length] + [0] * pad + prompt[prefix_length:] for prompt, pad in zip(prompts, pads, strict=True)
    ]
    mask = [[1] * prefix_length + [0] * pad + [1] * (longest - prefix_length - pad) for pad in pads]
    eos_ids = settings["eos_ids"]
    with torch.inference_mode():
        output = model.generate(
            torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            past_key_values=cache,
            max_new_tokens=settings["max_new_tokens"],
            do_sample=False,
            eos_token_id=eos_ids,
            pad_token_id=eos_ids[0],
        )
    return [truncate_at_eos(completion, eos_ids) for completion in output[:, longest:].tolist()]


def reset_peak():
    """Reset the peak memory, if the system allows it."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes():
    """Return the peak memory since `reset_peak`: the GPU's, or the process's on a CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", default=str(PROJECT / "models" / "smollm2"), help="hub name, model folder or LoRA adapter folder")
    add("--dtype", choices=PRECISIONS, default="fp32", help="precision of the model")
    add("--num_query", type=positive_int, default=32, help="number of questions")
    add("--batch_size", type=positive_int, nargs="+", default=[32], help="batch sizes to compare")
    add("--max_new_tokens", type=positive_int, default=100, help="maximum number of tokens of a completion")
    add("--data_name", help="hub data set in ARC's schema, instead of the bundled questions")
    add("--model_type", choices=MODEL_TYPES, default="auto", help="chat template")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="ways to compare")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.model)
    template = template_for(tokenizer, args.model_type)
    source = None if args.data_name else PROJECT / "data" / "questions.jsonl"
    questions = load_questions(args.data_name, "ARC-Challenge", "train", source)[: args.num_query]
    demos = load_demos("truthfulqa")
    prompts = [prompt_ids(tokenizer, build_messages(question, 0, False, demos), template) for question in questions]
    precision = resolve_precision(args.dtype, "pairs")
    model = load_model(args.model, precision).eval()
    settings = {"max_new_tokens": args.max_new_tokens, "eos_ids": eos_token_ids(model, tokenizer)}
    print(f"{len(prompts)} questions, {precision}, {model.device}")
    print(
        f"{'way':10}{'batch':>6}{'seconds':>9}{'questions/s':>13}{'tokens/s':>10}{'extra MB':>10}{'ratio':>8}"
        f"{'identical':>11}"
    )
    unbatched = [way for way in args.ways if way == "one"]
    batched = [way for way in args.ways if way != "one"]
    first, speed = None, {}
    for way, size in [(way, 1) for way in unbatched] + [(way, size) for size in args.batch_size for way in batched]:
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
    run_main(main)
