"""Greedy generation with `generate` of transformers, for models that the engine does not support."""

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from grath.common.errors import UserError

NAN = "the model computes NaN: often this is an overflow in fp16 (choose bf16 or fp32), or its weights are broken"


def refuse_nan(ids, scores):
    """Logits processor of transformers that raises `UserError` for NaN."""
    if scores.isnan().any():
        raise UserError(NAN)
    return scores


@torch.inference_mode()
def generate_hf(model, prompts, max_new_tokens, batch_size, eos_ids):
    """Generate greedy completions with `model.generate`, on padded batches of whole prompts.

    It takes and yields what `generate_shared_prefix` does.
    """
    model.eval()
    # In place of the model's own, of which every option would count.
    tokens = {"eos_token_id": list(eos_ids), "pad_token_id": eos_ids[0]}
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, **tokens)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids = [torch.tensor(prompts[i]) for i in batch]
        mask = [torch.ones_like(row) for row in ids]
        ids, mask = (pad_sequence(part, batch_first=True, padding_side="left") for part in (ids, mask))
        inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
        output = model.generate(**inputs, logits_processor=[refuse_nan])
        for i, completion in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
            yield i, truncate_at_eos(completion, eos_ids)


def truncate_at_eos(completion, eos_ids):
    """Return the token ids of a completion before its first EOS."""
    return completion[: next((i for i, token in enumerate(completion) if token in eos_ids), len(completion))]
