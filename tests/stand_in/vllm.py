"""A stand-in for what benchmarks/vllm_child.py needs of vLLM, which has an environment of its own."""

import types

import torch
from transformers import AutoModelForCausalLM


class SamplingParams(types.SimpleNamespace):
    pass


class LLM:
    def __init__(self, model, dtype, **_):
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, sampling, use_tqdm):
        assert sampling.temperature == 0
        for prompt in prompts:
            ids = torch.tensor([prompt["prompt_token_ids"]])
            if getattr(sampling, "prompt_logprobs", None) == 0:
                with torch.inference_mode():
                    found = self.model(ids).logits[0].log_softmax(-1)
                found = [
                    {token: types.SimpleNamespace(logprob=found[i, token].item())}
                    for i, token in enumerate(ids[0, 1:].tolist())
                ]
                yield types.SimpleNamespace(prompt_logprobs=[None, *found])
                continue
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                pad_token_id=0,
                max_new_tokens=sampling.max_tokens,
                eos_token_id=sampling.stop_token_ids,
            )[0, ids.shape[1] :].tolist()
            yield types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=output)])
