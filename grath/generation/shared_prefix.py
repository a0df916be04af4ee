"""Greedy generation with the shared-prefix engine, and with drafts by prompt lookup."""

from collections import deque
from itertools import accumulate, islice

import torch

from grath.common.errors import UserError
from grath.generation.attention import engine_attention
from grath.generation.cache import common_prefix_length, prefill_prefix, upload
from grath.generation.hf import NAN, truncate_at_eos
from grath.generation.prompt_lookup import LONGEST_DRAFT, NgramIndex

# Prompts in a prefill.
PREFILL_BATCH = 16
# A step drafts at most this many tokens, or one for each row if there are more rows.
DRAFT_TOKENS = 64


@torch.inference_mode()
def generate_shared_prefix(model, prompts, max_new_tokens, batch_size, eos_ids):
    """Generate greedy completions of tokenized prompts. When a row is done, the next prompt takes its place.

    Args:
        model: `PreTrainedModel` or `PeftModel`.
        prompts: list of non-empty lists of token ids.
        max_new_tokens: maximum number of tokens of a completion.
        batch_size: maximum number of active rows.
        eos_ids: token ids that end a completion.

    Yields:
        for each completion, once it is done: the index of its prompt and the list of its token ids, without the EOS.
    """
    length = common_prefix_length(prompts)
    capacity = max(map(len, prompts)) - length + max_new_tokens
    with engine_attention(model):
        cache = prefill_prefix(model, prompts[0][:length], min(batch_size, len(prompts)), capacity)
        batch = _ActiveBatch(model, cache, max_new_tokens, eos_ids)
        waiting = deque(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))
        # A prefill costs as many launches as a step, so it waits until it is full or an eighth of the rows is free.
        enough = min(PREFILL_BATCH, max(1, cache.rows // 8))
        while waiting or batch.rows:
            free = cache.rows - len(batch.rows)
            if waiting and (free >= min(enough, len(waiting)) or not batch.rows):
                # Each prefill takes a few prompts of similar length, so that their attention has little padding.
                new = [waiting.popleft() for _ in range(min(free, len(waiting), PREFILL_BATCH))]
                yield from batch.prefill(new, [prompts[i][length:] for i in new])
            else:
                yield from batch.step()


class _ActiveBatch:
    """The active rows. For each one: its prompt's index, its completion so far, and an index of its own tokens.

    The newest token is not in the cache yet. `prefill` and `step` return the completions that are done, as
    `generate_shared_prefix` yields them.
    """

    def __init__(self, model, cache, max_new_tokens, eos_ids):
        self.model, self.cache = model, cache
        self.max_new_tokens, self.eos_ids = max_new_tokens, set(eos_ids)
        self.rows = []

    def prefill(self, prompts, suffixes):
        """Add rows for new prompts, and run their tokens after the prefix (`suffixes`) through the model."""
        first = len(self.rows)
        last = upload([end - 1 for end in accumulate(map(len, suffixes))], self.model.device)
        hidden = self.cache.forward(self.model, suffixes, first, [0] * len(suffixes))
        self.rows += [(i, [], NgramIndex(suffix)) for i, suffix in zip(prompts, suffixes, strict=True)]
        return self._append_tokens(first, [[token] for token in self._greedy_tokens(hidden[last])])

    def step(self):
        """Run each row's newest token and its draft; append the accepted tokens, and the model's own after them."""
        tokens, longest = [], min(LONGEST_DRAFT, max(1, DRAFT_TOKENS // len(self.rows)))
        for _, completion, index in self.rows:
            # The model adds at least one token.
            draft = index.draft(min(longest, self.max_new_tokens - len(completion) - 1))
            tokens.append([completion[-1], *truncate_at_eos(draft, self.eos_ids)])
        cache_lengths = [len(index.tokens) - 1 for *_, index in self.rows]
        hidden = self.cache.forward(self.model, tokens, 0, cache_lengths)
        found, generated = iter(self._greedy_tokens(hidden)), []
        for new in tokens:
            greedy = list(islice(found, len(new)))
            accepted = next((i for i, token in enumerate(new[1:]) if token != greedy[i]), len(new) - 1)
            generated.append(greedy[: accepted + 1])
        return self._append_tokens(0, generated)

    def _greedy_tokens(self, hidden):
        """Return the most likely next tokens after last hidden states (N, d): list of N ids."""
        # The first of equal maxima, like `argmax`, which takes 4 times as long for 16-bit numbers on a CPU.
        best = self.model.get_output_embeddings()(hidden).max(-1)
        tokens = best.indices.masked_fill(best.values.isnan(), -1).tolist()
        if -1 in tokens:
            raise UserError(NAN)
        return tokens

    def _append_tokens(self, first, generated):
        """Append a list of tokens to every row from `first` on; remove the rows that are done, and return them."""
        done = []
        for row in reversed(range(first, len(self.rows))):
            prompt, completion, index = self.rows[row]
            new = generated[row - first]
            kept = truncate_at_eos(new, self.eos_ids)
            completion += kept
            if len(kept) == len(new) and len(completion) < self.max_new_tokens:
                for token in kept:
                    index.append(token)
                continue
            done.append((prompt, completion))
            last = self.rows.pop()
            if row < len(self.rows):  # the last row takes its place
                self.rows[row] = last
                self.cache.copy_row(len(self.rows), row)
        return done
