"""Greedy completions of many prompts: by the engine of `grath.shared_prefix`, or by the library's own `generate`."""

from collections import deque

import torch

from grath.shared_prefix import common_prefix, engine_attention, project, start_rows, unsupported

# Prompts read together when rows become free.
READ_AT_ONCE = 16


def way_to_generate(model, prompts, max_new_tokens):
    """`generate` and None, or `generate_plainly` and the reason why this model cannot go the faster way."""
    reason = unsupported(model, max(map(len, prompts)) + max_new_tokens)
    return (generate_plainly if reason else generate), reason


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
            on_done(i, until_stop(completion, stop_ids))


def until_stop(completion, stop_ids):
    """A completion's token ids up to its first stop id, which is left out with all behind it."""
    return completion[: next((at for at, token in enumerate(completion) if token in stop_ids), len(completion))]


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
