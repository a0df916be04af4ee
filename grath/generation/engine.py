"""Greedy generation with the shared-prefix engine."""

from collections import deque

import torch

from grath.generation.attention import engine_attention, lm_head_logits, unsupported_reason
from grath.generation.cache import common_prefix_length, prefill_prefix
from grath.generation.hf import generate_hf
from grath.modeling.memory import PREFILL_BATCH

# Free rows that are worth a prefill, in batches of 64 rows or more.
WORTH_A_PREFILL = 8


def select_generate_fn(model, prompts, max_new_tokens):
    """Select the generation function for a model: the shared-prefix engine if it supports the model.

    Returns:
        (`generate_shared_prefix`, None), or (`generate_hf`, the reason why the engine does not support the model).
    """
    reason = unsupported_reason(model, max(map(len, prompts)) + max_new_tokens)
    return (generate_hf if reason else generate_shared_prefix), reason


@torch.inference_mode()
def generate_shared_prefix(model, prompts, max_new_tokens, batch_size, eos_ids, on_done):
    """Generate greedy completions of tokenised prompts. When a row is done, the next prompt takes its place.

    Args:
        model: `PreTrainedModel` or `PeftModel`.
        prompts: list of non-empty lists of token ids.
        max_new_tokens: maximum number of tokens of a completion.
        batch_size: maximum number of active rows.
        eos_ids: token ids that end a completion.
        on_done: function that is called for each finished completion with the index of its prompt and the list of its
            token ids, without the EOS.
    """
    length = common_prefix_length(prompts)
    capacity = max(map(len, prompts)) - length + max_new_tokens
    with engine_attention(model):
        cache = prefill_prefix(model, prompts[0][:length], min(batch_size, len(prompts)), capacity)
        batch = _ActiveBatch(model, cache, max_new_tokens, eos_ids, on_done)
        waiting = deque(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))
        # A prefill costs as many kernel launches as a step, so it waits until an eighth of the rows are free.
        enough = min(WORTH_A_PREFILL, max(1, cache.rows // WORTH_A_PREFILL))
        while waiting or batch.prompts:
            free = cache.rows - len(batch.prompts)
            if waiting and (free >= min(enough, len(waiting)) or not batch.prompts):
                # Each prefill takes a few prompts of similar length, so that it computes little padding.
                new = [waiting.popleft() for _ in range(min(free, len(waiting), PREFILL_BATCH))]
                batch.prefill(new, [prompts[i][length:] for i in new])
            else:
                batch.step()


class _ActiveBatch:
    """The active rows. For each one: its prompt's index, its length, its newest token and its completion so far."""

    def __init__(self, model, cache, max_new_tokens, eos_ids, on_done):
        self.model, self.cache = model, cache
        self.max_new_tokens, self.eos_ids, self.on_done = max_new_tokens, set(eos_ids), on_done
        self.prompts, self.lengths, self.tokens, self.completions = [], [], [], []

    def prefill(self, prompts, suffixes):
        """Add rows for new prompts, and run their tokens after the prefix (`suffixes`) through the model."""
        first, device = len(self.prompts), self.model.device
        longest = max(map(len, suffixes))
        ids = torch.tensor([suffix + [0] * (longest - len(suffix)) for suffix in suffixes], device=device)
        cache_lengths = torch.zeros(len(suffixes), dtype=torch.long, device=device)
        # Before the forward pass: a transfer to a GPU waits for what runs there.
        last = torch.tensor([len(suffix) - 1 for suffix in suffixes], device=device)
        hidden = self.cache.forward(self.model, ids, first, cache_lengths, longest)
        self.prompts += prompts
        self.lengths += map(len, suffixes)
        self.completions += [[] for _ in suffixes]
        self._append_tokens(first, hidden[torch.arange(len(suffixes), device=device), last])

    def step(self):
        """Generate one token for every row."""
        step = torch.tensor([self.tokens, self.lengths], device=self.model.device)
        hidden = self.cache.forward(self.model, step[0][:, None], 0, step[1], max(self.lengths) + 1)
        self.lengths = [length + 1 for length in self.lengths]
        self.tokens = []
        self._append_tokens(0, hidden[:, 0])

    def _append_tokens(self, first, hidden):
        """Append the greedy token to every row from `first` on, and remove the rows that are done; hidden is (n, d)."""
        self.tokens += lm_head_logits(self.model, hidden).argmax(-1).tolist()
        for row in reversed(range(first, len(self.prompts))):
            completion, ended = self.completions[row], self.tokens[row] in self.eos_ids
            if not ended:
                completion.append(self.tokens[row])
            if ended or len(completion) == self.max_new_tokens:
                self.on_done(self.prompts[row], completion)
                self._remove(row)

    def _remove(self, row):
        """Remove a row; the last row takes its place."""
        last = len(self.prompts) - 1
        if row != last:
            self.cache.copy_row(last, row)
        for column in (self.prompts, self.lengths, self.tokens, self.completions):
            column[row] = column[last]
            column.pop()
