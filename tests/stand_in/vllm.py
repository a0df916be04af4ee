"""A stand-in for what benchmarks/vllm_child.py needs of vLLM, which has an environment of its own."""

from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM

SamplingParams = SimpleNamespace


class LLM:
    def __init__(self, model, dtype, **_):
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, sampling, use_tqdm):
        for prompt in prompts:
            ids = torch.tensor([prompt["prompt_token_ids"]])
            options = {"max_new_tokens": sampling.max_tokens, "eos_token_id": getattr(sampling, "stop_token_ids", None)}
            tokens = self.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)[0]
            with torch.inference_mode():
                found = self.model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()
            log_probs = zip(ids[0, 1:].tolist(), found, strict=True)
            yield SimpleNamespace(
                prompt_logprobs=[None, *({token: SimpleNamespace(logprob=value)} for token, value in log_probs)],
                outputs=[SimpleNamespace(token_ids=tokens[ids.shape[1] :].tolist())],
            )
