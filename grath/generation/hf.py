"""Greedy generation with `generate` of transformers, for models that the engine does not support."""

import torch

# What a model's own generation configuration could change in greedy decoding.
GREEDY = {
    "do_sample": False, "temperature": None, "top_p": None, "num_beams": 1, "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}  # fmt: skip


@torch.inference_mode()
def generate_hf(model, prompts, max_new_tokens, batch_size, eos_ids):
    """Generate greedy completions with `model.generate`, on padded batches of whole prompts.

    It takes and yields what `generate_shared_prefix` does.
    """
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = max(len(prompts[i]) for i in batch)
        pads = [longest - len(prompts[i]) for i in batch]
        ids = torch.tensor([[0] * pad + prompts[i] for i, pad in zip(batch, pads, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            **GREEDY,
            eos_token_id=list(eos_ids),
            pad_token_id=eos_ids[0],
        )
        for i, completion in zip(batch, output[:, longest:].tolist(), strict=True):
            yield i, truncate_at_eos(completion, eos_ids)


def truncate_at_eos(completion, eos_ids):
    """Return the token ids of a completion before its first EOS."""
    return completion[: next((i for i, token in enumerate(completion) if token in eos_ids), len(completion))]
