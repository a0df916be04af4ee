"""The KV cache of the shared-prefix engine: one prefix for all rows, and each row's own tokens after it."""

from itertools import accumulate
from operator import add
from os.path import commonprefix

import torch
from torch.nn.functional import scaled_dot_product_attention

from grath.generation.attention import attention_bias, merge_partial_attention, partial_attention

# After every column of a row.
NO_END = 2**31


class SharedPrefixCache:
    """Keys and values of one shared prefix, and of each row's own tokens after it.

    Args:
        rows: maximum number of rows.
        capacity: maximum number of own tokens per row that are kept between calls of `forward`.

    Shapes: n active rows, N new tokens of all rows, L new tokens of the row that has the most, P prefix tokens, T own
    tokens; H query heads, K key heads, G = H / K, D head size.
    """

    def __init__(self, rows, capacity):
        self.rows, self.capacity, self.prefix_length = rows, capacity, 0
        # Layer: (keys, values), each (rows, K, capacity, D); and (1, K, P, D), in float32 on a CPU.
        self.kv, self.prefix_kv = {}, {}

    def forward(self, model, tokens, first, cache_lengths):
        """Run new tokens of consecutive rows through the model and keep their keys and values.

        Args:
            tokens: list of n non-empty lists of token ids, the new tokens of each row.
            first: index of the first of the n rows.
            cache_lengths: list of n ints, number of own tokens that each row has already. Older entries after them are
                overwritten or masked.

        Returns:
            (N, d) last hidden states, row after row, for the LM head.
        """
        counts = [len(new) for new in tokens]
        ids = [token for new in tokens for token in new]
        rows = [first + row for row, count in enumerate(counts) for _ in range(count)]
        positions = [length + i for length, count in zip(cache_lengths, counts, strict=True) for i in range(count)]
        ids, rows, positions = self._upload(model.device, counts, ids, rows, positions)
        self.active, self.new = slice(first, first + len(tokens)), (rows, positions)
        self.kv_length = max(map(add, cache_lengths, counts))
        # A token sees its row's own tokens up to itself. A single row that starts without a prefix is causal.
        visible = None
        if len(tokens) > 1 or cache_lengths[0] or self.prefix_kv:
            visible = torch.arange(self.kv_length, device=model.device) <= self._pad(positions)[:, None, :, None]
        return self._run(model, ids, positions, visible)

    def forward_trees(self, model, rows):
        """Run rows that are trees, depth first (a context, then its answers). Keep no keys and values.

        Args:
            rows: list of n (ids, depths, ends): of each token of the row its id, its position after the prefix, counted
                along its path from the root, and the column after its last descendant, up to which it is seen. `NO_END`
                for the context's tokens, which all see.

        Returns:
            (N, d) last hidden states, row after row, for the LM head.
        """
        fields = ([number for row in rows for number in row[field]] for field in range(3))
        ids, depths, ends = self._upload(model.device, [len(row[0]) for row in rows], *fields)
        ends = self._pad(ends)[:, None, None, :]
        order = torch.arange(ends.shape[-1], device=model.device)
        self.active = None
        return self._run(model, ids, depths, (order <= order[:, None]) & (order[:, None] < ends))

    def _upload(self, device, counts, *fields):
        """Upload lists of N ints, and the indices that pad rows of `counts` tokens and undo it; return the tensors.

        The indices are the token in each place of the padded rows, n * L, and the place of each token in them, N. A row
        is padded with its last token. Both are empty if the numbers of tokens are equal.
        """
        longest, token_at, place_of = max(counts), [], []
        self.padded_shape = (len(counts), longest)
        if min(counts) < longest:
            ends = zip(accumulate(counts), counts, strict=True)
            token_at = [end - max(1, count - i) for end, count in ends for i in range(longest)]
            place_of = [row * longest + i for row, count in enumerate(counts) for i in range(count)]
        lists = [*fields, token_at, place_of]
        uploaded = upload([number for numbers in lists for number in numbers], device)
        *fields, self.token_at, self.place_of = uploaded.split([len(numbers) for numbers in lists])
        return fields

    def _pad(self, tokens):
        """Return what belongs to N tokens in padded rows: (N, ...) -> (n, L, ...)."""
        return (tokens[self.token_at] if len(self.token_at) else tokens).view(*self.padded_shape, *tokens.shape[1:])

    def _run(self, model, ids, positions, visible):
        """Run the model on the tokens of all rows as one sequence. Only attention tells the rows apart.

        `visible` (n, 1, L, T): whether a token sees an own token; None: causal attention of one row.
        """
        self.visible, self.bias = visible, None
        positions = positions[None] + self.prefix_length
        output = model.get_decoder()(input_ids=ids[None], position_ids=positions, use_cache=False, shared_prefix=self)
        return output.last_hidden_state[0]

    def attend(self, layer, query, key, value, scaling):
        """Compute the new tokens' attention to the prefix and to their own row.

        Args:
            query: (1, H, N, D).
            key, value: (1, K, N, D).

        Returns:
            (1, N, H, D).
        """
        heads, size = query.shape[1], query.shape[3]
        key_heads = key.shape[1]
        groups = heads // key_heads
        # (N, K, D)
        new = [part[0].transpose(0, 1) for part in (key, value)]
        if self.active:
            keys, values = self._append_kv(layer, *new)
        if self.visible is None:
            repeated = (part.repeat_interleave(groups, 1) for part in (key, value))
            return scaled_dot_product_attention(query, *repeated, is_causal=True, scale=scaling).transpose(1, 2)
        if not self.active:
            keys, values = (self._pad(part).transpose(1, 2) for part in new)
        n, longest = self.padded_shape
        if self.bias is None:
            self.bias = attention_bias(self.visible.repeat(1, 1, groups, 1), query.dtype)
        # Query heads that share a key head are adjacent, so they become more queries of that one head.
        tokens = query[0].transpose(0, 1).reshape(-1, key_heads, groups, size)
        own = self._pad(tokens).permute(0, 2, 3, 1, 4).reshape(n, key_heads, groups * longest, size)
        out, lse = partial_attention(own, keys, values, scaling, self.bias)
        del own, keys, values
        # (N, K, G, D) and (N, K, G)
        out = out.view(n, key_heads, groups, longest, size).permute(0, 3, 1, 2, 4).reshape(-1, key_heads, groups, size)
        lse = lse.view(n, key_heads, groups, longest).permute(0, 3, 1, 2).reshape(-1, key_heads, groups)
        if len(self.place_of):
            out, lse = out[self.place_of], lse[self.place_of]
        if self.prefix_kv:
            prefix_keys, prefix_values = self.prefix_kv[layer]
            all_rows = tokens.transpose(0, 1).reshape(1, key_heads, -1, size).to(prefix_keys.dtype)
            shared, shared_lse = partial_attention(all_rows, prefix_keys, prefix_values, scaling)
            shared = shared.view(key_heads, -1, groups, size).transpose(0, 1)
            shared_lse = shared_lse.view(key_heads, -1, groups).transpose(0, 1)
            out = merge_partial_attention(out, lse, shared, shared_lse)
        return out.to(query.dtype).reshape(1, -1, heads, size)

    def _append_kv(self, layer, key, value):
        """Append keys and values (N, K, D) to the rows' caches; return those of the active rows, (n, K, T, D) each."""
        if layer not in self.kv:
            shape = (self.rows, key.shape[1], self.capacity, key.shape[2])
            self.kv[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        rows, positions = self.new
        for cache, new in zip(self.kv[layer], (key, value), strict=True):
            cache[rows, :, positions] = new
        return (cache[self.active, :, : self.kv_length] for cache in self.kv[layer])

    def copy_row(self, source, target):
        """Copy the keys and values of row `source` to row `target`."""
        for both in self.kv.values():
            for cache in both:
                cache[target, :, : self.kv_length] = cache[source, :, : self.kv_length]


def upload(numbers, device):
    """Return a tensor of a (nested) list of ints on a device, without waiting for what runs there."""
    numbers = torch.tensor(numbers)
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)


def download(tensor):
    """Start to copy a tensor to main memory, without waiting for what runs on its device.

    Returns:
        function that waits for the copy, and for nothing launched later; it returns the numbers as (nested) lists.
    """
    if tensor.device.type != "cuda":
        return tensor.tolist
    copy, copied = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record()

    def read():
        copied.synchronize()
        return copy.tolist()

    return read


def common_prefix_length(prompts):
    """Return the length of the longest common prefix that leaves at least one token of each prompt."""
    return min(len(commonprefix(prompts)), min(map(len, prompts)) - 1)


def prefill_prefix(model, prefix_ids, rows, capacity):
    """Run a prefix (a list, which may be empty) through the model; return the `SharedPrefixCache` of rows after it."""
    cache, prefix = SharedPrefixCache(rows, capacity), SharedPrefixCache(1, len(prefix_ids))
    if prefix_ids:
        prefix.forward(model, [prefix_ids], 0, [0])
        cache.prefix_length = len(prefix_ids)
        for layer, both in prefix.kv.items():
            cache.prefix_kv[layer] = [part.float() for part in both] if model.device.type == "cpu" else both
    return cache
