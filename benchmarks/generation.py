"""Compare ways to generate pairs: speed, memory, and identical completions.

    python benchmarks/generation.py --model models/smollm2 --dtype fp32 --num_query 32 --batch_size 32
    VLLM_PYTHON=vllm-env/bin/python python benchmarks/generation.py --ways vllm engine --num_query 128 --batch_size 128

`one`: `model.generate`, one question at a time. `padded`: batches of whole prompts of similar length. `copied`: batches
that start from copies of the few-shot examples' KV cache. `engine`: the shared-prefix engine in `grath.generation`.
`vllm`: vLLM with its prefix cache, in its own environment, whose Python is `VLLM_PYTHON`; requirements-vllm-cpu.txt
makes one for a CPU.

Each way has its own process. `load` is the time from its start until the model is ready: imports, weights, and
compilation or the choice of products. The other columns are those of the median of --runs runs after that. The first
way in the table is the baseline of the ratios and of the identical completions.
"""

import copy
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from made_requests import pair_prompts
from transformers import AutoConfig, DynamicCache

from grath.common.arguments import Parser, positive_int
from grath.common.errors import UserError, run_main
from grath.common.layout import PROJECT, resolve_local
from grath.generation.cache import common_prefix_length
from grath.generation.hf import generate_hf, truncate_at_eos
from grath.generation.shared_prefix import generate_shared_prefix
from grath.modeling.chat import MODEL_TYPES
from grath.modeling.loading import eos_token_ids, load_for_inference, load_model, load_tokenizer
from grath.modeling.precision import DTYPES, PRECISIONS, resolve_precision
from grath.pairs.questions import load_questions


def copied(model, prompts, max_new_tokens, batch_size, eos_ids):
    """Generate as `generate_hf` does, in batches that start from copies of the KV cache of the common prefix."""
    length = common_prefix_length(prompts)
    prefix = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.tensor([prompts[0][:length]], device=model.device), past_key_values=prefix, logits_to_keep=1)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        cache = copy.deepcopy(prefix)
        cache.batch_repeat_interleave(len(batch))
        longest = max(map(len, batch))
        pads = [longest - len(prompt) for prompt in batch]
        ids = [prompt[:length] + [0] * pad + prompt[length:] for prompt, pad in zip(batch, pads, strict=True)]
        mask = [[1] * length + [0] * pad + [1] * (longest - length - pad) for pad in pads]
        with torch.inference_mode():
            output = model.generate(
                torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                past_key_values=cache,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                repetition_penalty=1.0,
                eos_token_id=eos_ids,
                pad_token_id=eos_ids[0],
            )
        for i, completion in enumerate(output[:, longest:].tolist(), start):
            yield i, truncate_at_eos(completion, eos_ids)


OWN_WAYS = {"one": generate_hf, "padded": generate_hf, "copied": copied, "engine": generate_shared_prefix}
WAYS = (*OWN_WAYS, "vllm")


def reset_peak():
    """Reset the peak memory, if the system allows it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes():
    """Return the peak memory since `reset_peak`: the GPU's, or the process's on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def build_prompts(args):
    """Return the tokenizer and the prompts of the questions: lists of token ids."""
    tokenizer = load_tokenizer(args.model)
    source = None if args.data_name else PROJECT / "data" / "questions.jsonl"
    questions = load_questions(args.data_name, "ARC-Challenge", "train", source)[: args.num_query]
    return tokenizer, pair_prompts(tokenizer, questions, args.model_type)


def measure(way, batch_size, args):
    """Generate in one way in this process, --runs times.

    Returns:
        dict of `load` (s), `seconds` (one per run), `extra` (bytes of memory over the loaded model's) and
        `completions` (lists of token ids).
    """
    tokenizer, prompts = build_prompts(args)
    precision = resolve_precision(args.dtype, "pairs")
    model = (load_for_inference if way == "engine" else load_model)(args.model, precision).eval()
    settings = (args.max_new_tokens, batch_size, eos_token_ids(model, tokenizer))
    seconds, load = [], time.time() - psutil.Process().create_time()
    reset_peak()
    before = peak_bytes()
    for _ in range(args.runs):
        start = time.perf_counter()
        completions = dict(OWN_WAYS[way](model, prompts, *settings))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    completions = [completions[i] for i in range(len(prompts))]
    return {"load": load, "seconds": seconds, "extra": peak_bytes() - before, "completions": completions}


def measure_vllm(batch_size, args):
    """Do what `measure` does with vLLM. Its memory is not measured: it reserves a fixed part."""
    tokenizer, prompts = build_prompts(args)
    model = resolve_local(args.model)
    eos_ids = eos_token_ids(model, tokenizer)
    window = AutoConfig.from_pretrained(model).max_position_embeddings
    work = {
        "model": model,
        "dtype": DTYPES[args.dtype],
        "prompts": prompts,
        "batch_size": batch_size,
        "max_length": min(window, max(map(len, prompts)) + args.max_new_tokens),
        "max_new_tokens": args.max_new_tokens,
        "eos_ids": eos_ids,
        "runs": args.runs,
    }
    found = run_vllm(work)
    found["completions"] = [truncate_at_eos(completion, eos_ids) for completion in found["completions"]]
    return found


def run_vllm(work):
    """Run vllm_child.py on its work (a dict); return its answer (a dict)."""
    with tempfile.TemporaryDirectory() as folder:
        given, answer = Path(folder) / "work.json", Path(folder) / "answer.json"
        given.write_text(json.dumps(work))
        run_child([os.environ["VLLM_PYTHON"], PROJECT / "benchmarks" / "vllm_child.py", given, answer], "vllm")
        return json.loads(answer.read_text())


def check_vllm(dtype):
    """Make `VLLM_PYTHON` an absolute path; raise `UserError` if it names no program, or vLLM has no such `dtype`."""
    python = shutil.which(os.environ.get("VLLM_PYTHON", ""))
    if not python or dtype not in DTYPES:
        raise UserError(
            f"the way vllm needs VLLM_PYTHON=... (requirements-vllm-cpu.txt) and one of {', '.join(DTYPES)}"
        )
    os.environ["VLLM_PYTHON"] = str(Path(python).absolute())


def run_child(command, way):
    """Run a command and return its last line of output."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise UserError(f"{way} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return (done.stdout.splitlines() or [""])[-1]


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
    add("--ways", nargs="+", choices=WAYS, default=list(OWN_WAYS), help="ways to compare")
    add("--runs", type=positive_int, default=3, help="runs of each way")
    add("--only", choices=list(OWN_WAYS), help="generate in one way in this process, and print the results as JSON")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.batch_size[0], args)))
        return
    if "vllm" in args.ways:
        check_vllm(args.dtype)

    print(f"{args.num_query} questions, {args.dtype}, the median of {args.runs} runs")
    print(
        f"{'way':10}{'batch':>6}{'load':>7}{'seconds':>9}{'questions/s':>13}{'tokens/s':>10}{'extra MB':>10}"
        f"{'ratio':>8}{'identical':>11}"
    )
    first, speed = None, {}
    sizes = [("one", 1)] if "one" in args.ways else []
    sizes += [(way, size) for size in args.batch_size for way in args.ways if way != "one"]
    for way, size in sizes:
        if way == "vllm":
            found = measure_vllm(size, args)
        else:
            found = json.loads(run_child([sys.executable, *sys.argv, "--only", way, "--batch_size", size], way))
        output, seconds = found["completions"], sorted(found["seconds"])[args.runs // 2]
        speed[way, size] = len(output) / seconds
        first = first or (output, speed[way, size])
        same = sum(a == b for a, b in zip(output, first[0], strict=True))
        extra = f"{found['extra'] / 1e6:.0f}" if "extra" in found else "-"
        print(
            f"{way:10}{size:6}{found['load']:7.1f}{seconds:9.1f}{speed[way, size]:13.2f}"
            f"{sum(map(len, output)) / seconds:10.1f}{extra:>10}{speed[way, size] / first[1]:8.2f}"
            f"{same:7} of {len(output)}",
            flush=True,
        )
    for size in args.batch_size:
        for other in ("vllm", "copied"):
            if {(other, size), ("engine", size)} <= speed.keys():
                ratio = speed["engine", size] / speed[other, size]
                print(f"engine over {other}, batches of {size}: {ratio:.2f}")


if __name__ == "__main__":
    run_main(main)
