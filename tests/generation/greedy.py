"""Greedy completions of tiny models: by `model.generate`, by the engine, and whether they are the same."""

import torch

from grath.generation.shared_prefix import generate_shared_prefix


def plain(model, prompts, max_new_tokens, eos_ids):
    """Generate with `model.generate`, one prompt at a time."""
    completions = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
            eos_token_id=sorted(eos_ids) or None, pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        completions.append(output[:-1] if output[-1] in eos_ids else output)
    return completions


def shared(model, prompts, max_new_tokens, eos_ids, batch_size):
    """Generate with the shared-prefix engine."""
    found = dict(generate_shared_prefix(model, prompts, max_new_tokens, batch_size, eos_ids))
    return [found[i] for i in range(len(prompts))]


def same(model, prompts, ours, theirs):
    """Assert equal completions. Two may differ from a token on whose two best logits tie within float32 rounding."""
    for prompt, one, other in zip(prompts, ours, theirs, strict=True):
        if one == other:
            continue
        at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + one[:at]])).logits[0, -1]
        best = logits.topk(2).values
        assert best[0] - best[1] <= 1e-5 * logits.abs().max(), f"{one} is not {other}, from token {at} on"


def make_prompts(count, prefix, seed=0):
    """Return random prompts of different lengths after a common prefix of `prefix` tokens."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(1, 60, (n,), generator=generator).tolist()  # noqa: E731
    common = draw(prefix)
    return [common + [i + 1] + draw(int(torch.randint(0, 12, (), generator=generator))) for i in range(count)]
