"""The harness's model classes for models on this machine: `hf`, and `hf-shared`, which computes every context once."""

import logging
import sys

from accelerate import PartialState
from accelerate.utils import gather_object
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from grath.common.errors import UserError
from grath.common.progress import progress_bar
from grath.evaluation.loglikelihood import truncate_window, window_loglikelihoods
from grath.generation.attention import unsupported_reason
from grath.modeling.devices import halve_if_out_of_memory
from grath.modeling.loading import check_tokens, load_for_inference, load_model, load_tokenizer

# Requests that are tokenized in one call.
TOKENIZER_BATCH = 1024
# Padded tokens of a batch: on a CPU, where larger batches are not faster; on a GPU at first, and at least.
CPU_TOKENS, GPU_TOKENS, MIN_TOKENS = 4096, 16384, 512


def load_local(backend, model, precision, batch_size=None):
    """Load a model (hub name, model folder or adapter folder) as the harness's model of `hf-shared` or `hf`."""
    # `HFLM` warns about a loaded model, which every process would score.
    logging.getLogger(HFLM.__module__).setLevel(logging.ERROR)
    if backend == "hf":
        return SplitLM(load_model(model, precision), tokenizer=load_tokenizer(model), batch_size=batch_size or 16)
    rows = batch_size if isinstance(batch_size, int) else None
    return SharedContextLM(load_for_inference(model, precision), load_tokenizer(model), rows)


def split_over_processes(method):
    """Wrap a method (requests, disable_tqdm) so that each process computes its questions, and gets all results."""

    def split(lm, requests, disable_tqdm=False):
        state = PartialState()
        if state.num_processes == 1:
            return method(lm, requests, disable_tqdm)
        own = [i for i, one in enumerate(requests) if one.doc_id % state.num_processes == state.process_index]
        hidden = disable_tqdm or not state.is_main_process
        results = method(lm, [requests[i] for i in own], hidden) if own else []
        gathered = dict(gather_object(list(zip(own, results, strict=True))))
        return [gathered[i] for i in range(len(requests))]

    return split


class SplitLM(HFLM):
    """`HFLM` that splits the requests over the processes itself.

    For the harness every process is the only one, so the few-shot examples do not depend on the number of processes.
    `truncated` counts the different contexts of this process that did not fit into the model's window.
    """

    rank, world_size, truncated = 0, 1, 0
    loglikelihood = split_over_processes(HFLM.loglikelihood)
    loglikelihood_rolling = split_over_processes(HFLM.loglikelihood_rolling)

    @split_over_processes
    def generate_until(self, requests, disable_tqdm=False):
        for context, options in (request.args for request in requests):
            most = self.max_length - normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]
            self.truncated += len(self.tok_encode(context)) > most
        return super().generate_until(requests, disable_tqdm)

    def check_answers(self, pairs):
        """Raise `UserError` if an answer of `pairs`, as in `inspect`, is longer than the model's window."""
        if (longest := max((len(answer) for _, answer in pairs), default=0)) > self.max_length:
            raise UserError(
                f"an answer has {longest} tokens, and the model's context window {self.max_length}: leave this task out"
            )

    def inspect(self, pairs):
        """Count the contexts that will be cut, and check the tokens of `pairs`: (context, answer), lists of ids."""
        self.check_answers(pairs)
        most = self.max_length + 1
        self.truncated += len({tuple(context) for context, answer in pairs if len(context) + len(answer) > most})
        embeddings = self.model.get_input_embeddings().weight.shape[0]
        check_tokens(self.tokenizer, [ids for pair in pairs for ids in pair], embeddings)

    def _loglikelihood_tokens(self, requests, *args, **options):
        self.inspect([ids for _, *ids in requests])
        return super()._loglikelihood_tokens(requests, *args, **options)


class SharedContextLM(SplitLM):
    """`HFLM` that computes equal requests, equal contexts and shared prefixes of contexts once.

    `max_rows` is the maximum number of contexts in a batch; None: only the number of tokens counts.
    """

    def __init__(self, model, tokenizer, max_rows=None, **options):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=max_rows or 16, **options)
        self.max_rows, self.batch_tokens = max_rows, CPU_TOKENS if self.device.type == "cpu" else GPU_TOKENS

    @split_over_processes
    def loglikelihood(self, requests, disable_tqdm=False):
        pairs = [request.args for request in requests]
        reason = "a context is empty"
        if all(context for context, _ in pairs):
            tokenized = self.tokenize(pairs)
            self.check_answers(tokenized)
            windows = [truncate_window(*ids, self.max_length) for ids in tokenized]
            reason = unsupported_reason(self.model, max(len(context) + len(answer) for context, answer in windows))
            if not all(context and answer for context, answer in windows):
                reason = "a context or an answer is empty"
        if reason:
            if not disable_tqdm:
                print(f"hf-shared uses the method of hf: {reason}", file=sys.stderr)
            return HFLM.loglikelihood(self, requests, disable_tqdm)
        self.inspect(tokenized)
        return self.score(windows, disable_tqdm)

    def tokenize(self, pairs):
        """Tokenize (context, answer) pairs of text in large batches; the ids are those of `HFLM`: list of two lists."""
        tokenized, context_ids = [], {}
        for start in range(0, len(pairs), TOKENIZER_BATCH):
            batch = pairs[start : start + TOKENIZER_BATCH]
            # As in `HFLM`, the spaces at the end of a context belong to the answer.
            contexts = [context.rstrip() for context, _ in batch]
            context_ids |= self._encode(set(contexts) - context_ids.keys())
            whole_ids = self._encode({context + answer for context, answer in batch})
            for context, (spaced, answer) in zip(contexts, batch, strict=True):
                ids = context_ids[context]
                tokenized.append((ids, whole_ids[spaced + answer][len(ids) :]))
        return tokenized

    def _encode(self, texts):
        """Tokenize texts as `tok_encode` does: dict of text -> ids. No second BOS is put before a first one."""
        options = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        bos, encoded = self.tokenizer.decode(self.prefix_token_id), {}
        for has_bos, own in ((True, {"add_special_tokens": False}), (False, options)):
            if found := [text for text in texts if text.startswith(bos) == has_bos]:
                ids = self.tokenizer(found, return_attention_mask=False, **own)["input_ids"]
                encoded |= zip(found, ids, strict=True)
        return encoded

    def score(self, windows, disable_tqdm=False):
        """Compute the log-likelihoods of windows; each time the GPU's memory is full, halve `batch_tokens`.

        Args:
            windows: list of (context, answer), tuples of token ids.

        Returns:
            list of (log-likelihood, whether greedy decoding gives the answer).

        Raises:
            torch.OutOfMemoryError: `MIN_TOKENS` do not fit either.
        """
        results = [None] * len(windows)

        def score_rest(batch_tokens):
            if batch_tokens < self.batch_tokens:
                print(f"The memory is full: going on with {batch_tokens} tokens in a batch", flush=True)
            self.batch_tokens = batch_tokens
            left = [i for i, result in enumerate(results) if result is None]
            unfinished = [windows[i] for i in left]
            for places, result in window_loglikelihoods(self.model, unfinished, batch_tokens, self.max_rows):
                for place in places:
                    results[left[place]] = result
                bar.update(len(places) * tokens[left[places[0]]])

        tokens = [len(context) + len(answer) for context, answer in windows]
        options = {"desc": "Scoring", "unit": " tokens", "unit_scale": True}
        with progress_bar(total=sum(tokens), shown=not disable_tqdm, **options) as bar:
            halve_if_out_of_memory(score_rest, self.batch_tokens, MIN_TOKENS)
        return results
