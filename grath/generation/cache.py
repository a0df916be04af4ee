"""The KV cache of the shared-prefix engine: one prefix for all rows, and each row's own tokens after it."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from grath.generation.attention import attention_bias, causal_lm, merge_partial_attention, partial_attention


class SharedPrefixCache:
    """Keys and values of one shared prefix, and of each row's own tokens after it.

    Args:
        rows: maximum number of rows.
        capacity: maximum number of own tokens per row that are kept between calls of `forward`.
        prefix: `SharedPrefixCache` whose first row's own tokens become the prefix; None: no prefix.

    Shapes: n active rows, L new tokens per row, P prefix tokens, T own tokens; H query heads, K key heads, D head size.
    """

    def __init__(self, rows, capacity, prefix=None):
        self.rows, self.capacity = rows, capacity
        # Layer: (keys, values), each (rows, K, capacity, D).
        self.kv = {}
        # Layer: (keys, values), each (1, K, P, D); in float32 on a CPU.
        self.prefix_kv = {}
        self.prefix_length = 0
        if prefix:
            self.prefix_length = prefix.capacity
            self.prefix_kv = {
                layer: [part[:1].float() if part.device.type == "cpu" else part[:1] for part in both]
                for layer, both in prefix.kv.items()
            }

    def forward(self, model, input_ids, first, cache_lengths, kv_length):
        """Run new tokens of consecutive rows through the model and keep their keys and values.

        Args:
            input_ids: (n, L), padded on the right. Padding is written but never read, because attention is causal.
            first: index of the first of the n rows.
            cache_lengths: (n,) int, number of own tokens that each row has already; all 0 unless L is 1.
            kv_length: number of own tokens of the longest row after this call. The caller knows it; reading it from
                `cache_lengths` would wait for the GPU.

        Returns:
            (n, L, d) last hidden states, for `lm_head_logits`.
        """
        n, length = input_ids.shape
        device = input_ids.device
        positions = cache_lengths[:, None] + torch.arange(length, device=device)
        self.active = slice(first, first + n)
        self.active_rows = torch.arange(first, first + n, device=device)
        self.cache_lengths = cache_lengths
        self.kv_length = kv_length
        # (n, 1, L, T): a token sees its row's own tokens up to itself.
        visible = torch.arange(self.kv_length, device=device) <= positions[:, None, :, None]
        return self._run(model, input_ids, positions, None if length > 1 and not self.prefix_kv else visible)

    def forward_trees(self, model, input_ids, depths, branches):
        """Run rows that are trees (a context, then any number of answers to it). Keep no keys and values.

        Args:
            input_ids: (n, L): the tokens of the context, then of one answer after the other; padded on the right.
            depths: (n, L) int, position of each token after the prefix, counted along its path from the root.
            branches: (n, L) int, 0 for the context's tokens and a different number for each answer's.

        Returns:
            (n, L, d) last hidden states, for `lm_head_logits`.
        """
        order = torch.arange(input_ids.shape[1], device=input_ids.device)
        key_branch, query_branch = branches[:, None, None, :], branches[:, None, :, None]
        visible = (order <= order[:, None]) & ((key_branch == 0) | (key_branch == query_branch))
        self.active = None
        return self._run(model, input_ids, depths, visible)

    def _run(self, model, input_ids, positions, visible):
        """Run the model.

        Args:
            positions: (n, L) int, positions after the prefix.
            visible: (n, 1, L, T) bool, whether a token sees an own token; None: causal attention without a prefix.
        """
        self.visible, self.bias = visible, None
        output = causal_lm(model).base_model(
            input_ids=input_ids, position_ids=positions + self.prefix_length, use_cache=False, shared_prefix=self
        )
        return output.last_hidden_state

    def attend(self, layer, query, key, value, scaling):
        """Compute the new tokens' attention to the prefix and to their own row: (n, H, L, D) -> (n, L, H, D)."""
        n, heads, length, size = query.shape
        key_heads = key.shape[1]
        groups = heads // key_heads
        keys, values = self._append_kv(layer, key, value) if self.active else (key, value)
        if self.visible is None:
            repeated = (part.repeat_interleave(groups, 1) for part in (key, value))
            return scaled_dot_product_attention(query, *repeated, is_causal=True, scale=scaling).transpose(1, 2)
        # Query heads that share a key head are adjacent, so they become more queries of that one head.
        grouped = query.reshape(n, key_heads, -1, size)
        if self.bias is None:
            self.bias = attention_bias(self.visible.repeat(1, 1, groups, 1), query.dtype)
        out, lse = partial_attention(grouped, keys, values, scaling, self.bias)
        if self.prefix_kv:
            prefix_keys, prefix_values = self.prefix_kv[layer]
            all_rows = grouped.transpose(0, 1).reshape(1, key_heads, -1, size).to(prefix_keys.dtype)
            shared, shared_lse = partial_attention(all_rows, prefix_keys, prefix_values, scaling)
            shared = shared.view(key_heads, n, -1, size).transpose(0, 1)
            shared_lse = shared_lse.view(key_heads, n, -1).transpose(0, 1)
            out = merge_partial_attention(out, lse, shared, shared_lse)
        return out.to(query.dtype).reshape(n, heads, length, size).transpose(1, 2)

    def _append_kv(self, layer, key, value):
        """Append keys and values to each row's cache; return the whole cache of the active rows, (n, K, T, D) each."""
        length = key.shape[2]
        if layer not in self.kv:
            shape = (self.rows, key.shape[1], self.capacity, key.shape[3])
            self.kv[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        for cache, new in zip(self.kv[layer], (key, value), strict=True):
            if length == 1:
                cache[self.active_rows, :, self.cache_lengths] = new[:, :, 0]
            else:
                cache[self.active, :, :length] = new
        return (cache[self.active, :, : self.kv_length] for cache in self.kv[layer])

    def copy_row(self, source, target):
        """Copy the keys and values of row `source` to row `target`."""
        for keys, values in self.kv.values():
            keys[target] = keys[source]
            values[target] = values[source]


def common_prefix_length(prompts):
    """Return the length of the longest common prefix that leaves at least one token of each prompt."""
    smallest, largest = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if smallest[i] != largest[i]), limit)


def prefill_prefix(model, prefix_ids, rows, capacity):
    """Run a prefix through the model; return an empty `SharedPrefixCache` of `rows` x `capacity` own tokens after it.

    Args:
        prefix_ids: list of token ids, which may be empty.
    """
    if not prefix_ids:
        return SharedPrefixCache(rows, capacity)
    length, device = len(prefix_ids), model.device
    prefix = SharedPrefixCache(1, length)
    no_tokens = torch.zeros(1, dtype=torch.long, device=device)
    prefix.forward(model, torch.tensor([prefix_ids], device=device), 0, no_tokens, length)
    return SharedPrefixCache(rows, capacity, prefix)
