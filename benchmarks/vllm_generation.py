"""Generate with vLLM, for benchmarks/generation.py, in vLLM's own environment: vllm_generation.py WORK ANSWER."""

import json
import os
import sys
import time
from pathlib import Path

import psutil


def main():
    # By default vLLM keeps a core free, on two cores half of the machine.
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    # GiB of keys and values; the default is 92 % of the memory, and fails if that is not free.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    from vllm import LLM, SamplingParams

    work = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(
        model=work["model"],
        dtype=work["dtype"],
        max_num_seqs=work["batch_size"],
        max_model_len=work["max_length"],
        enable_prefix_caching=True,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=work["max_new_tokens"], stop_token_ids=work["eos_ids"], detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in work["prompts"]]
    found = {"load": time.time() - psutil.Process().create_time(), "seconds": []}
    for _ in range(work["runs"]):
        # Each run computes the prefix once, as the first one does.
        llm.reset_prefix_cache()
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        found["seconds"].append(time.perf_counter() - start)
    found["completions"] = [list(output.outputs[0].token_ids) for output in outputs]
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
