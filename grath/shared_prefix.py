"""Greedy generation for many prompts that begin with the same tokens.

Attention over a common prefix splits exactly (Hydragen, arXiv 2402.05099): all rows' queries meet the
prefix's keys, which exist once, in one matrix product; each row's queries meet the row's own keys in another; the two
partial softmaxes are merged with their log-sum-exp, in float32. `transformers` takes that attention through its
`AttentionInterface`, so the model's code stays its own.
"""

from collections import deque
from contextlib import contextmanager

import torch
from transformers import AttentionInterface

from grath.models import float32_products

NAME = "grath_shared_prefix"
READ_AT_ONCE = 16
# Families whose attention is softmax(q k^T * scaling) v under a causal mask, and nothing more.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


class SharedPrefix:
    """Keys and values of one prefix, and of the rows' own tokens behind it.

    Args:
        rows: rows that may be in work at once.
        capacity: own tokens that a row may have.
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
        self.bias = torch.zeros(visible.shape, device=device).masked_fill_(~visible, float("-inf"))
        self.grouped_bias = None
        output = _base(model).base_model(
            input_ids=input_ids, position_ids=columns + self.prefix_length, use_cache=False, shared_prefix=self
        )
        return output.last_hidden_state

    def attend(self, layer, query, key, value, scaling):
        """Attention of the new tokens to the prefix and to their own row: (n, H, L, D) -> (n, L, H, D)."""
        n, heads, length, size = query.shape
        key_heads = key.shape[1]
        groups = heads // key_heads
        if layer not in self.own:
            shape = (self.rows, key_heads, self.capacity, size)
            self.own[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        keys, values = self.own[layer]
        if length == 1:
            keys[self.rows_at, :, self.starts] = key[:, :, 0]
            values[self.rows_at, :, self.starts] = value[:, :, 0]
        else:
            keys[self.at, :, :length] = key
            values[self.at, :, :length] = value
        if self.grouped_bias is None:
            self.grouped_bias = self.bias.repeat(1, 1, groups, 1).to(query.dtype)

        # Query heads that share a key head stand together, so they become more queries of that one head.
        grouped = query.reshape(n, key_heads, -1, size)
        own = (store[self.at, :, : self.end] for store in (keys, values))
        out, lse = partial_attention(grouped, *own, scaling, self.grouped_bias)
        if self.prefix:
            everyone = grouped.transpose(0, 1).reshape(1, key_heads, -1, size).float()
            shared, shared_lse = partial_attention(everyone, *self.prefix[layer], scaling)
            shared = shared.view(key_heads, n, -1, size).transpose(0, 1)
            shared_lse = shared_lse.view(key_heads, n, -1).transpose(0, 1)
            out = merge(out, lse, shared, shared_lse)
        return out.to(query.dtype).reshape(n, heads, length, size).transpose(1, 2)

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
def score(model, context, answers, batch_size):
    """Log-probabilities of several answers to one context, which is computed once.

    Args:
        context: list of token ids, not empty.
        answers: lists of token ids, none empty.
        batch_size: answers in work at once.

    Returns:
        list of (log-probabilities, one a token of the answer, float32 on the CPU; whether greedy decoding gives the
        answer), one an answer.
    """
    rows = min(batch_size, len(answers))
    order = sorted(range(len(answers)), key=lambda i: len(answers[i]))
    scores = [None] * len(answers)
    with engine_attention(model):
        state = start_rows(model, context[:-1], rows, max(map(len, answers)))
        for start in range(0, len(order), rows):
            batch = order[start : start + rows]
            longest = max(len(answers[i]) for i in batch)
            read = [[context[-1], *answers[i][:-1]] + [0] * (longest - len(answers[i])) for i in batch]
            starts = torch.zeros(len(batch), dtype=torch.long, device=model.device)
            hidden = state.forward(model, torch.tensor(read, device=model.device), 0, starts)
            for i, row in zip(batch, hidden, strict=True):
                log_probs = project(model, row[: len(answers[i])]).float().log_softmax(-1)
                answer = torch.tensor(answers[i], device=row.device)
                greedy = bool((log_probs.argmax(-1) == answer).all())
                scores[i] = (log_probs.gather(1, answer[:, None])[:, 0].cpu(), greedy)
    return scores


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, batch_size, stop_ids, on_done):
    """Greedy completions of tokenised prompts. A row that is done leaves at once and the next prompt takes its place.

    Args:
        model: `PreTrainedModel` or `PeftModel`.
        prompts: list of lists of token ids, none empty.
        max_new_tokens: tokens a completion may have.
        batch_size: rows in work at once.
        stop_ids: token ids that end a completion.
        on_done: called with (index of the prompt, list of completion ids without the stop id) as each is done.
    """
    length = common_prefix(prompts)
    capacity = max(map(len, prompts)) - length + max_new_tokens
    with engine_attention(model):
        state = start_rows(model, prompts[0][:length], min(batch_size, len(prompts)), capacity)
        rows = _Rows(model, state, max_new_tokens, stop_ids, on_done)
        waiting = deque(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))
        while waiting or rows.prompts:
            # A few prompts of like length at a time, so that little of what is read is padding.
            while free := min(state.rows - len(rows.prompts), len(waiting), READ_AT_ONCE):
                new = [waiting.popleft() for _ in range(free)]
                rows.admit(new, [prompts[i][length:] for i in new])
            if rows.prompts:
                rows.step()


@torch.inference_mode()
def generate_plainly(model, prompts, max_new_tokens, batch_size, stop_ids, on_done):
    """What `generate` does, by `model.generate` on padded batches of whole prompts: for every other model."""
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = max(len(prompts[i]) for i in batch)
        pads = [longest - len(prompts[i]) for i in batch]
        output = model.generate(
            input_ids=torch.tensor([[0] * pad + prompts[i] for i, pad in zip(batch, pads, strict=True)]).to(
                model.device
            ),
            attention_mask=torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads]).to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            eos_token_id=list(stop_ids),
            pad_token_id=stop_ids[0],
        )
        for i, completion in zip(batch, output[:, longest:].tolist(), strict=True):
            end = next((at for at, token in enumerate(completion) if token in stop_ids), len(completion))
            on_done(i, completion[:end])


class _Rows:
    """The completions in work: which prompt each row has, its length, its newest token and its completion so far."""

    def __init__(self, model, state, max_new_tokens, stop_ids, on_done):
        self.model, self.state = model, state
        self.max_new_tokens, self.stop_ids, self.on_done = max_new_tokens, set(stop_ids), on_done
        self.prompts, self.lengths, self.tokens, self.completions = [], [], [], []

    def admit(self, prompts, suffixes):
        """Read the own tokens (`suffixes`) of new prompts, behind the rows that are in work."""
        first, device = len(self.prompts), self.model.device
        longest = max(map(len, suffixes))
        read = torch.tensor([suffix + [0] * (longest - len(suffix)) for suffix in suffixes], device=device)
        starts = torch.zeros(len(suffixes), dtype=torch.long, device=device)
        hidden = self.state.forward(self.model, read, first, starts)
        ends = torch.tensor([len(suffix) - 1 for suffix in suffixes], device=device)
        self.prompts += prompts
        self.lengths += map(len, suffixes)
        self.completions += [[] for _ in suffixes]
        self._extend(first, hidden[torch.arange(len(suffixes), device=device), ends])

    def step(self):
        """Give every row one token more."""
        step = torch.tensor([self.tokens, self.lengths], device=self.model.device)
        hidden = self.state.forward(self.model, step[0][:, None], 0, step[1])
        self.lengths = [length + 1 for length in self.lengths]
        self.tokens = []
        self._extend(0, hidden[:, 0])

    def _extend(self, first, hidden):
        """Add the greedy token to every row from `first` on, and let the rows that are done leave: hidden (n, d)."""
        self.tokens += project(self.model, hidden).argmax(-1).tolist()
        for row in reversed(range(first, len(self.prompts))):
            completion, stopped = self.completions[row], self.tokens[row] in self.stop_ids
            if not stopped:
                completion.append(self.tokens[row])
            if stopped or len(completion) == self.max_new_tokens:
                self.on_done(self.prompts[row], completion)
                last = len(self.prompts) - 1
                if row != last:
                    self.state.move(last, row)
                for column in (self.prompts, self.lengths, self.tokens, self.completions):
                    column[row] = column[last]
                    column.pop()
