"""Greedy completions behind one interface: of a model on this machine, or of one on inference servers.

In both generators, `generate(prompts)` takes lists of token ids. Once a completion is done, it yields its index, its
text with a line break in place of special tokens, and whether it was cut at the maximum number of tokens. `window` is
the context window in tokens, or None if it is not known. `rows` is the number of rows of a batch, None on servers.
"""

import gc
from itertools import groupby

import torch
from accelerate import PartialState

from grath.generation.attention import unsupported_reason
from grath.generation.hf import generate_hf
from grath.generation.shared_prefix import generate_shared_prefix
from grath.modeling.loading import context_window, eos_token_ids
from grath.pairs.responses import DELIMITER
from grath.serving.completions import request_completions

# Rows to begin with. On a GPU, a step of the shared-prefix engine takes hardly longer for more of them.
ROWS, GPU_ROWS = 64, 256


class LocalGenerator:
    """Greedy completions of a loaded model. Each time the memory is full, half of the rows remain.

    Args:
        max_new_tokens: maximum number of tokens of a completion.
        batch_size: rows to begin with; None: `GPU_ROWS` or `ROWS`.
        engine: `shared_prefix`, which falls back to `generate` where it does not support the model, or `generate`.
    """

    def __init__(self, model, tokenizer, max_new_tokens, batch_size=None, engine="shared_prefix"):
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.engine, self.rows = engine, batch_size
        self.window, self.eos_ids = context_window(model.config), eos_token_ids(model, tokenizer)

    def generate(self, prompts):
        """Generate completions; none is generated again after it was yielded.

        Raises:
            torch.OutOfMemoryError: a single row does not fit.
        """
        state, device = PartialState(), self.model.device
        reason = unsupported_reason(self.model, max(map(len, prompts)) + self.max_new_tokens)
        if self.engine == "shared_prefix" and reason:
            self.engine = "generate"
            state.print(f"Falling back to plain batched generation: {reason}")
        generate_fn = generate_shared_prefix if self.engine == "shared_prefix" else generate_hf
        self.rows = self.rows or (GPU_ROWS if self.engine == "shared_prefix" and device.type == "cuda" else ROWS)
        state.print(f"Asking {len(prompts)} questions ({self.engine}, {device}, batches of {self.rows})")
        hidden = hidden_tokens(self.tokenizer)
        left = dict(enumerate(prompts))
        while left:
            numbers, new = list(left), list(left.values())
            try:
                for position, ids in generate_fn(self.model, new, self.max_new_tokens, self.rows, self.eos_ids):
                    del left[numbers[position]]
                    parts = [[*part] for shown, part in groupby(ids, lambda i: i not in hidden) if shown]
                    text = "\n".join(map(self.tokenizer.decode, parts))
                    yield numbers[position], text, len(ids) == self.max_new_tokens
            except torch.OutOfMemoryError:
                used = min(self.rows, len(new))
                if used == 1:
                    raise
                self.rows = used // 2
                print(f"The memory is full with {used} questions in a batch: going on with {self.rows}", flush=True)
            # Not while the error is handled: its traceback keeps the batch in memory.
            gc.collect()
            torch.cuda.empty_cache()


class ServerGenerator:
    """Greedy completions of the model `name` on servers (`served`), with `batch_size` requests in flight at each."""

    rows = None

    def __init__(self, served, name, tokenizer, max_new_tokens, batch_size=None):
        self.served, self.window, self.in_flight = served, served.window, batch_size
        # A server may take other defaults from the model's generation_config.json, or llama.cpp's from its start.
        self.options = {"max_tokens": max_new_tokens, "temperature": 0, "top_p": 1, "repetition_penalty": 1}
        self.options |= {"presence_penalty": 0, "frequency_penalty": 0, "repeat_penalty": 1, "dry_multiplier": 0}
        self.options |= {"stop_token_ids": eos_token_ids(name, tokenizer), "skip_special_tokens": False}
        self.hidden = hidden_tokens(tokenizer).values()

    def generate(self, prompts):
        """Generate completions; none is asked again after it was yielded."""
        print(f"Asking {len(prompts)} questions ({', '.join(self.served.urls)})", flush=True)
        bodies = [{"prompt": prompt, **self.options} for prompt in prompts]
        for index, response in request_completions(self.served, bodies, self.in_flight):
            (choice,) = response["choices"]
            text = choice["text"]
            for token in self.hidden:
                text = text.replace(token, "\n")
            yield index, text, choice.get("finish_reason") == "length"


def hidden_tokens(tokenizer):
    """Return the special tokens that a completion's text does not show: dict, id -> text."""
    special = {i: str(added) for i, added in tokenizer.added_tokens_decoder.items() if added.special}
    # `parse_response` needs those around a model's reasoning.
    return {i: text for i, text in special.items() if not DELIMITER.search(text)}
