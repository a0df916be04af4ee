"""The engine behind generation and scoring: what many sequences begin with is computed once.

Attention over a common prefix splits exactly (Hydragen, arXiv 2402.05099): all rows' queries meet the
prefix's keys, which exist once, in one matrix product; each row's queries meet the row's own keys in another; the two
partial softmaxes are merged with their log-sum-exp, in float32. `transformers` takes that attention through its
`AttentionInterface`, so the model's code stays its own.
"""

from contextlib import contextmanager
from itertools import accumulate

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from grath.models import float32_products

NAME = "grath_shared_prefix"
# Families whose attention is softmax(q k^T * scaling) v under a causal mask, and nothing more.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


class SharedPrefix:
    """Keys and values of one prefix, and of the rows' own tokens behind it.

    Args:
        rows: rows that may be in work at once.
        capacity: own tokens that a row may have, between calls of `forward`.
        prefix: the `SharedPrefix` whose first row's own tokens are the prefix, or None for no prefix.

    Shapes: n rows at work, L new tokens a row, P prefix tokens, T own tokens; H query heads, K key heads, D head size.
    """

    def __init__(self, rows, capacity, prefix=None):
        self.rows, self.capacity = rows, capacity
        self.own = {}
        self.prefix = {}
        self.prefix_length = 0
        if prefix:
            self.prefix_length = prefix.capacity
            self.prefix = {
                layer: (keys[:1].float(), values[:1].float()) for layer, (keys, values) in prefix.own.items()
            }

    def forward(self, model, input_ids, first, starts):
        """Run new tokens of neighbouring rows through the model and keep their keys and values.

        Args:
            input_ids: (n, L), padded at the right. Padding is written, but never read: own attention is causal.
            first: index of the first of the n rows.
            starts: (n,) int, how many own tokens each row has already; all 0 if L is not 1.

        Returns:
            (n, L, d) last hidden states, for `project`.
        """
        n, length = input_ids.shape
        device = input_ids.device
        columns = starts[:, None] + torch.arange(length, device=device)
        self.at = slice(first, first + n)
        self.rows_at = torch.arange(first, first + n, device=device)
        self.starts = starts
        self.end = int(columns.max()) + 1
        # (n, 1, L, T): a token sees its row's own tokens up to itself.
        visible = torch.arange(self.end, device=device) <= columns[:, None, :, None]
        return self._run(model, input_ids, columns, None if length > 1 and not self.prefix else visible)

    def forward_trees(self, model, input_ids, depths, branches):
        """Run rows that are trees, a context and behind it any number of answers, and keep nothing.

        Args:
            input_ids: (n, L): the context's tokens, then those of one answer after the other; padded at the right.
            depths: (n, L) int, how many own tokens stand between the prefix and each token on its way to the root.
            branches: (n, L) int, 0 for the context's tokens, and for an answer's a number that is its own.

        Returns:
            (n, L, d) last hidden states, for `project`.
        """
        order = torch.arange(input_ids.shape[1], device=input_ids.device)
        seen, seeing = branches[:, None, None, :], branches[:, None, :, None]
        visible = (order <= order[:, None]) & ((seen == 0) | (seen == seeing))
        self.at = None
        return self._run(model, input_ids, depths, visible)

    def _run(self, model, input_ids, columns, visible):
        """`visible` (n, 1, L, T) says which own tokens a token sees; None: all up to itself, and there is no prefix."""
        self.bias = self.grouped_bias = None
        if visible is not None:
            self.bias = torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, float("-inf"))
        output = _base(model).base_model(
            input_ids=input_ids, position_ids=columns + self.prefix_length, use_cache=False, shared_prefix=self
        )
        return output.last_hidden_state

    def attend(self, layer, query, key, value, scaling):
        """Attention of the new tokens to the prefix and to their own row: (n, H, L, D) -> (n, L, H, D)."""
        n, heads, length, size = query.shape
        key_heads = key.shape[1]
        groups = heads // key_heads
        keys, values = self._keep(layer, key, value) if self.at else (key, value)
        if self.bias is None:
            every = (part.repeat_interleave(groups, 1) for part in (key, value))
            return scaled_dot_product_attention(query, *every, is_causal=True, scale=scaling).transpose(1, 2)
        if self.grouped_bias is None:
            self.grouped_bias = self.bias.repeat(1, 1, groups, 1).to(query.dtype)

        # Query heads that share a key head stand together, so they become more queries of that one head.
        grouped = query.reshape(n, key_heads, -1, size)
        out, lse = partial_attention(grouped, keys, values, scaling, self.grouped_bias)
        if self.prefix:
            everyone = grouped.transpose(0, 1).reshape(1, key_heads, -1, size).float()
            shared, shared_lse = partial_attention(everyone, *self.prefix[layer], scaling)
            shared = shared.view(key_heads, n, -1, size).transpose(0, 1)
            shared_lse = shared_lse.view(key_heads, n, -1).transpose(0, 1)
            out = merge(out, lse, shared, shared_lse)
        return out.to(query.dtype).reshape(n, heads, length, size).transpose(1, 2)

    def _keep(self, layer, key, value):
        """Write the new tokens' keys and values behind their rows' own; those of all own tokens: (n, K, T, D)."""
        length = key.shape[2]
        if layer not in self.own:
            shape = (self.rows, key.shape[1], self.capacity, key.shape[3])
            self.own[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        for store, new in zip(self.own[layer], (key, value), strict=True):
            if length == 1:
                store[self.rows_at, :, self.starts] = new[:, :, 0]
            else:
                store[self.at, :, :length] = new
        return (store[self.at, :, : self.end] for store in self.own[layer])

    def move(self, source, target):
        """Give row `target` the own tokens of row `source`."""
        for keys, values in self.own.values():
            keys[target] = keys[source]
            values[target] = values[source]


def partial_attention(query, key, value, scaling, bias=None):
    """Softmax attention over a part of the keys, with what is needed to merge it with the other parts.

    Args:
        query: (b, K, q, D).
        key, value: (b, K, t, D).
        bias: (b, 1, q, t), added to the scores: 0 where a query sees a key, -inf where not; or None for all 0.

    Returns:
        (out, lse): (b, K, q, D), and the log-sum-exp of the scores (b, K, q) in float32, as are the sums behind both.
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


def merge(out, lse, other, other_lse):
    """Attention over the union of two parts of the keys (Hydragen), in float32; shapes as above."""
    share = torch.sigmoid(lse - other_lse)[..., None]
    return out.float() * share + other.float() * (1 - share)


def _attention(module, query, key, value, attention_mask, scaling, shared_prefix, **_):
    return shared_prefix.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(NAME, _attention)


def common_prefix(prompts):
    """Number of tokens with which all prompts begin; at least one token of each prompt is left over."""
    shortest, longest = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if shortest[i] != longest[i]), limit)


def unsupported(model, length):
    """Why the engine cannot serve a model exactly for sequences of `length` tokens; None if it can."""
    config = model.config
    if config.model_type not in FAMILIES:
        return f"its family {config.model_type} is none of {', '.join(FAMILIES)}"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < length:
        return f"its sliding window of {window} tokens is shorter than a sequence of {length}"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        return f"its {rope} position embedding changes with the sequence's length"
    return None


def _base(model):
    """The `PreTrainedModel` with the head, inside a `PeftModel` or not; an adapter's layers stay in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def project(model, hidden):
    """Logits (..., V) of last hidden states (..., d)."""
    return _base(model).get_output_embeddings()(hidden)


@contextmanager
def engine_attention(model):
    """Let `model` (`PreTrainedModel` or `PeftModel`), in evaluation mode, attend through a `SharedPrefix`."""
    base = _base(model)
    usual = base.config._attn_implementation
    model.eval()
    base.set_attn_implementation(NAME)
    try:
        with float32_products(model):
            yield
    finally:
        base.set_attn_implementation(usual)


def start_rows(model, prefix_ids, rows, capacity):
    """A `SharedPrefix` of `rows` empty rows of `capacity` tokens behind the tokens `prefix_ids`, which may be none."""
    if not prefix_ids:
        return SharedPrefix(rows, capacity)
    prefix = SharedPrefix(1, len(prefix_ids))
    device = model.device
    prefix.forward(model, torch.tensor([prefix_ids], device=device), 0, torch.zeros(1, dtype=torch.long, device=device))
    return SharedPrefix(rows, capacity, prefix)


@torch.inference_mode()
def score(model, prefix_ids, trees, batch_size):
    """Log-probabilities of answers to contexts that begin with the same tokens. Every token is computed once.

    Args:
        prefix_ids: token ids that stand before every context; may be empty.
        trees: list of (context, answers): token ids, and a list of lists of token ids; none of the lists empty.
        batch_size: contexts in work at once.

    Yields:
        (index of the tree, list of (log-probability, whether greedy decoding gives the answer), one an answer).
    """
    # A row holds the context and each answer but for its last token, which nothing follows.
    order = sorted(range(len(trees)), key=lambda i: len(trees[i][0]) + sum(len(answer) - 1 for answer in trees[i][1]))
    with engine_attention(model):
        state = start_rows(model, prefix_ids, 0, 0)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            rows = [_tree_row(*trees[i]) for i in batch]
            longest = max(len(ids) for ids, *_ in rows)
            ids, depths, branches = (
                torch.tensor([row[column] + [0] * (longest - len(row[column])) for row in rows], device=model.device)
                for column in range(3)
            )
            hidden = state.forward_trees(model, ids, depths, branches)
            scores = _token_scores(
                model, hidden, [(n, at, token) for n, row in enumerate(rows) for at, token in row[3]]
            )
            for i in batch:
                found = [[next(scores) for _ in answer] for answer in trees[i][1]]
                yield i, [(sum(score for score, _ in tokens), all(top for _, top in tokens)) for tokens in found]


def _tree_row(context, answers):
    """Lists of a tree's ids, depths and branches, and (column that predicts it, id) of every token of the answers."""
    ids, depths, branches = list(context), list(range(len(context))), [0] * len(context)
    predicted = []
    for branch, answer in enumerate(answers, start=1):
        columns = [len(context) - 1, *range(len(ids), len(ids) + len(answer) - 1)]
        predicted += zip(columns, answer, strict=True)
        ids += answer[:-1]
        depths += range(len(context), len(context) + len(answer) - 1)
        branches += [branch] * (len(answer) - 1)
    return ids, depths, branches, predicted


def _token_scores(model, hidden, predicted, chunk=512):
    """Iterator over (log-probability, whether it is the greedy one) of (row, column that predicts it, id) tokens."""
    # Answers to one context have their first token predicted by one state, which is projected once.
    states = list(dict.fromkeys((row, column) for row, column, _ in predicted))
    ends = [min(end, len(states)) for end in accumulate([chunk] * -(-len(states) // chunk))]
    number = {state: i for i, state in enumerate(states)}
    device = hidden.device
    which = torch.tensor([number[row, column] for row, column, _ in predicted], device=device)
    tokens = torch.tensor([token for *_, token in predicted], device=device)
    scores, greedy = torch.empty(len(predicted), device=device), torch.empty_like(tokens)
    rows, columns = torch.tensor(states, device=device).T
    for start, end in zip([0, *ends], ends, strict=False):
        # Not `logsumexp`, which is nearer to the truth: scores are compared with those of the harness's own kernel.
        log_probs = project(model, hidden[rows[start:end], columns[start:end]]).float().log_softmax(-1)
        here = (which >= start) & (which < end)
        at = which[here] - start
        scores[here] = log_probs[at, tokens[here]]
        greedy[here] = log_probs.argmax(-1)[at]
    return zip(scores.tolist(), (greedy == tokens).tolist(), strict=True)
