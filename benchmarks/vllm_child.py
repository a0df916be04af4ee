"""Generate or score with vLLM, for the other benchmarks, in vLLM's own environment: vllm_child.py WORK ANSWER.

WORK is a JSON object. With `answer_lengths` (one number per prompt), the answer has `log_likelihoods`: the sum of the
log-probabilities of the last tokens of each prompt, as many as its number says. Without, it has `completions`.
"""

import json
import os
import sys
import time
from pathlib import Path

import psutil


def main():
    # By default vLLM keeps a core free: on two cores, half of the machine.
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
    answer_lengths = work.get("answer_lengths")
    completions = {"max_tokens": work.get("max_new_tokens"), "stop_token_ids": work.get("eos_ids")}
    asked = {"max_tokens": 1, "prompt_logprobs": 0} if answer_lengths else completions
    sampling = SamplingParams(temperature=0, detokenize=False, **asked)
    prompts = [{"prompt_token_ids": prompt} for prompt in work["prompts"]]
    found = {"load": time.time() - psutil.Process().create_time(), "seconds": []}
    for _ in range(work["runs"]):
        # Each run of completions computes the prefix once, as the first one does. For log-probabilities of prompts vLLM
        # does not read its prefix cache.
        llm.reset_prefix_cache()
        start = time.perf_counter()
        outputs = list(llm.generate(prompts, sampling, use_tqdm=False))
        found["seconds"].append(time.perf_counter() - start)
    if answer_lengths:
        found["log_likelihoods"] = [
            sum(
                of_token[token].logprob
                for token, of_token in zip(prompt[-length:], output.prompt_logprobs[-length:], strict=True)
            )
            for prompt, output, length in zip(work["prompts"], outputs, answer_lengths, strict=True)
        ]
    else:
        found["completions"] = [list(output.outputs[0].token_ids) for output in outputs]
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
