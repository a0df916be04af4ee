"""Attention over a shared prefix and each row's own tokens, merged exactly.

Attention over a common prefix splits exactly (Hydragen, arXiv 2402.05099). One matrix product multiplies all rows'
queries by the keys of the prefix, which are stored once. Another multiplies each row's queries by the row's own keys.
The two partial softmaxes are merged with their log-sum-exp in float32. The engine passes this attention to
`transformers` through `AttentionInterface`, so the model's code is unchanged.
"""

from contextlib import contextmanager
from functools import lru_cache

import torch
from transformers import AttentionInterface

from grath.modeling.cpu_matmul import FAMILIES

ATTENTION_NAME = "grath_shared_prefix"
# The fused kernel for attention with a bias reads the bias in blocks of this many keys.
BIAS_BLOCK = 8


def partial_attention(query, key, value, scaling, bias=None):
    """Compute softmax attention over a part of the keys, and the log-sum-exp that merges it with other parts.

    Args:
        query: (b, K, q, D).
        key, value: (b, K, t, D).
        bias: (b, 1, q, t) from `attention_bias`; None: every query sees every key.

    Returns:
        (out, lse): (b, K, q, D), and the log-sum-exp of the attention scores, (b, K, q) in float32. Both are summed in
        float32.
    """
    return select_attention_fn(query.device, query.dtype, *query.shape[1::2])(query, key, value, scaling, bias)


def attention_bias(visible, dtype):
    """Return what is added to the attention scores, (b, 1, q, t): 0 where a query sees a key (`visible`), else -inf.

    Its rows start at multiples of `BIAS_BLOCK` numbers in memory.
    """
    keys = visible.shape[-1]
    bias = torch.zeros((*visible.shape[:-1], keys + -keys % BIAS_BLOCK), dtype=dtype, device=visible.device)
    return bias[..., :keys].masked_fill_(~visible, float("-inf"))


@lru_cache
def select_attention_fn(device, dtype, key_heads, head_size):
    """Select the implementation of `partial_attention` for tensors of a device, dtype and shape.

    On a GPU, the fused kernels are compared with `explicit_attention` once. If they differ, a line says so and
    `explicit_attention` is used.
    """
    if device.type == "cpu":
        return _cpu_attention
    reason = fused_kernels_differ(device, dtype, key_heads, head_size)
    if reason:
        print(f"The engine computes attention without fused kernels, which needs more memory: {reason}", flush=True)
    return explicit_attention if reason else fused_attention


def explicit_attention(query, key, value, scaling, bias=None):
    """Compute `partial_attention` with plain matrix products in float32: the reference of the other implementations."""
    scores = query.float() @ key.float().transpose(-1, -2) * scaling
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ value.float(), lse


def fused_attention(query, key, value, scaling, bias=None):
    """Compute `partial_attention` with CUDA's fused kernels, which keep no attention scores."""
    aten = torch.ops.aten
    if bias is None and query.dtype != torch.float32:
        try:
            return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False, scale=scaling)[:2]
        except RuntimeError:  # a GPU older than Ampere has only the other kernel
            pass
    if bias is not None:
        bias = bias.expand(-1, query.shape[1], -1, -1)
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, scale=scaling)
    return out, lse[..., : query.shape[2]]  # the kernel pads the queries


def _cpu_attention(query, key, value, scaling, bias=None):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=bias, scale=scaling
    )


def fused_kernels_differ(device, dtype, key_heads, head_size):
    """Return how `fused_attention` differs from `explicit_attention` on random input, or None within rounding."""
    generator = torch.Generator(device).manual_seed(0)
    draw = {"generator": generator, "device": device, "dtype": dtype}
    # Neither length is a multiple of the kernels' blocks.
    query = torch.randn((2, key_heads, 13, head_size), **draw)
    key, value = (torch.randn((2, key_heads, 37, head_size), **draw) for _ in range(2))
    visible = torch.rand((2, 1, 13, 37), generator=generator, device=device) < 0.7
    visible[..., 0] = True
    # In float32 the kernels sum products of three parts of a number.
    tolerance = (32 if dtype == torch.float32 else 8) * torch.finfo(dtype).eps
    for bias in (None, attention_bias(visible, dtype)):
        try:
            fused = fused_attention(query, key, value, head_size**-0.5, bias)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return str(error).splitlines()[0]
        for ours, exact in zip(fused, explicit_attention(query, key, value, head_size**-0.5, bias), strict=True):
            difference = (ours.float() - exact).abs().max().item()
            if not difference <= tolerance * exact.abs().max().item():
                return f"they differ from the exact result by {difference:.1e} in {dtype}"
    return None


def merge_partial_attention(out, lse, other, other_lse):
    """Merge what `partial_attention` returns for two parts of the keys into attention over their union, in float32."""
    return torch.lerp(other.float(), out.float(), torch.sigmoid(lse - other_lse)[..., None])


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


@contextmanager
def engine_attention(model):
    """Put `model` (`PreTrainedModel` or `PeftModel`) in evaluation mode and let it attend to a `SharedPrefixCache`."""
    original = model.config._attn_implementation
    model.eval()
    model.set_attn_implementation(ATTENTION_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(original)
