"""Attention over a shared prefix and each row's own tokens, merged exactly.

Attention over a common prefix splits exactly (Hydragen, arXiv 2402.05099). One matrix product multiplies all rows'
queries by the keys of the prefix, which are stored once. Another multiplies each row's queries by the row's own keys.
The two partial softmaxes are merged with their log-sum-exp in float32. The engine passes this attention to
`transformers` through `AttentionInterface`, so the model's code is unchanged.
"""

from contextlib import contextmanager

import torch
from transformers import AttentionInterface

from grath.modeling.cpu_matmul import fp32_cpu_matmul

ATTENTION_NAME = "grath_shared_prefix"
# Families whose attention is exactly softmax(q k^T * scaling) v with a causal mask.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def partial_attention(query, key, value, scaling, bias=None):
    """Compute softmax attention over a part of the keys, and the log-sum-exp that merges it with other parts.

    Args:
        query: (b, K, q, D).
        key, value: (b, K, t, D).
        bias: (b, 1, q, t), added to the attention scores: 0 where a query sees a key, else -inf; None: all 0.

    Returns:
        (out, lse): (b, K, q, D), and the log-sum-exp of the attention scores, (b, K, q) in float32. Both are summed in
        float32.
    """
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=bias, scale=scaling
        )
    scores = query.float() @ key.float().transpose(-1, -2) * scaling
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ value.float(), lse


def merge_partial_attention(out, lse, other, other_lse):
    """Merge attention over two parts of the keys into attention over their union (Hydragen), in float32.

    Shapes are those of `partial_attention`.
    """
    share = torch.sigmoid(lse - other_lse)[..., None]
    return out.float() * share + other.float() * (1 - share)


def _attention(module, query, key, value, attention_mask, scaling, shared_prefix, **_):
    return shared_prefix.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(ATTENTION_NAME, _attention)


def unsupported_reason(model, length):
    """Return why the engine cannot run a model exactly on sequences of `length` tokens: str, or None if it can."""
    config = model.config
    if config.model_type not in FAMILIES:
        return f"its family {config.model_type} is not one of {', '.join(FAMILIES)}"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < length:
        return f"its sliding window of {window} tokens is shorter than a sequence of {length}"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        return f"its {rope} position embedding depends on the sequence length"
    return None


def causal_lm(model):
    """Return the `PreTrainedModel` with the LM head: `model`, or the one in a `PeftModel`, with its adapter layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def lm_head_logits(model, hidden):
    """Return the logits (..., V) of last hidden states (..., d)."""
    return causal_lm(model).get_output_embeddings()(hidden)


@contextmanager
def engine_attention(model):
    """Put `model` (`PreTrainedModel` or `PeftModel`) in evaluation mode and let it attend to a `SharedPrefixCache`."""
    base = causal_lm(model)
    original = base.config._attn_implementation
    model.eval()
    base.set_attn_implementation(ATTENTION_NAME)
    try:
        with fp32_cpu_matmul(model):
            yield
    finally:
        base.set_attn_implementation(original)
