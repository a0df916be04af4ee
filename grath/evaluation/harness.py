"""The model class for lm-evaluation-harness that computes every context once."""

import sys
from functools import cache

from grath.common.errors import UserError
from grath.modeling.memory import BATCH_TOKENS, USABLE, fitting_batch_tokens, read_shape

MODEL_NAME = "hf-shared"
# Requests that are tokenized in one call.
TOKENIZER_BATCH = 1024
# Padded tokens of a batch on a CPU, where larger batches are not faster.
CPU_BATCH_TOKENS = 4096


@cache
def register_shared_context_model():
    """Register the model class `hf-shared` with the harness, and return it."""
    import torch
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import has_bos_prefix

    from grath.evaluation.loglikelihood import truncate_window, window_loglikelihoods
    from grath.generation.attention import explicit_attention, select_attention_fn, unsupported_reason

    @register_model(MODEL_NAME)
    class SharedContextLM(HFLM):
        """`HFLM` that computes equal requests, equal contexts and shared prefixes of contexts once.

        Args:
            precision: one of `PRECISIONS` but `auto`, instead of `dtype`.
            batch_size: maximum number of contexts in a batch; None or "auto": only the number of tokens counts.
        """

        def __init__(self, *args, precision="fp32", batch_size=None, **kwargs):
            self.precision = precision
            self.max_rows = batch_size if isinstance(batch_size, int) else None
            if "dtype" in kwargs:
                raise UserError(f"{MODEL_NAME} takes precision, not dtype")
            super().__init__(*args, batch_size=batch_size or 16, **kwargs)
            if self.world_size == 1 and hasattr(self, "accelerator"):
                # Without a GPU `HFLM` scores every request in every process.
                self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

        def _create_model(self, pretrained, peft=None, **_):
            from grath.modeling.loading import load_for_inference

            self._model = load_for_inference(peft or pretrained, self.precision)
            self._device = self._model.device

        def loglikelihood(self, requests, disable_tqdm=False):
            """Tokenize the requests in large batches; the ids are those of `HFLM`, which tokenizes one at a time."""
            from tqdm import tqdm

            pairs = [request.args for request in requests]
            if self.backend != "causal" or not all(context for context, _ in pairs):
                return super().loglikelihood(requests, disable_tqdm)
            tokenized, context_ids = [], {}
            hidden = disable_tqdm or self.rank != 0
            for start in tqdm(range(0, len(pairs), TOKENIZER_BATCH), disable=hidden, desc="Tokenizing requests"):
                # As in `HFLM`, the spaces at the end of a context belong to the answer.
                split = [
                    (context.rstrip(), context[len(context.rstrip()) :] + answer)
                    for context, answer in pairs[start : start + TOKENIZER_BATCH]
                ]
                new = [
                    context for context in dict.fromkeys(context for context, _ in split) if context not in context_ids
                ]
                context_ids.update(zip(new, self._encode(new), strict=True))
                whole = self._encode([context + answer for context, answer in split])
                for pair, (context, _), ids in zip(pairs[start:], split, whole, strict=False):
                    tokenized.append((pair, context_ids[context], ids[len(context_ids[context]) :]))
            return self._loglikelihood_tokens(tokenized, disable_tqdm=disable_tqdm)

        def _encode(self, texts):
            """Tokenize a list of texts as `tok_encode` does: lists of ids."""
            options = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
            bos = self.tokenizer.decode(self.prefix_token_id)
            groups = {}
            for i, text in enumerate(texts):
                groups.setdefault(has_bos_prefix(text, bos), []).append(i)
            encoded = [None] * len(texts)
            for starts_with_bos, places in groups.items():
                own = {"add_special_tokens": False} if starts_with_bos else options
                ids = self.tokenizer([texts[i] for i in places], return_attention_mask=False, **own)["input_ids"]
                for i, of_text in zip(places, ids, strict=True):
                    encoded[i] = of_text
            return encoded

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
            from tqdm import tqdm

            windows = [truncate_window(context, answer, self.max_length) for _, context, answer in requests]
            reason = self._cannot_share(max((len(c) + len(a) for c, a in windows), default=0))
            if not all(context and answer for context, answer in windows):
                reason = "an answer is empty or longer than the model's window"
            if reason or not requests:
                if reason and self.rank == 0 and not disable_tqdm:
                    print(f"{MODEL_NAME} uses the method of hf: {reason}", file=sys.stderr)
                return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            batch_tokens = self._batch_tokens()
            bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Scoring requests")
            results = [None] * len(requests)
            with bar:
                for places, result in window_loglikelihoods(self.model, windows, batch_tokens, self.max_rows):
                    for place in places:
                        results[place] = result
                        if requests[place][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[place][0], result)
                    bar.update(len(places))
            return results

        def _batch_tokens(self):
            """Return the padded tokens of a batch: on a GPU, where launching kernels takes time, as many as fit."""
            if self.device.type == "cpu":
                return CPU_BATCH_TOKENS
            shape = read_shape(self.config.to_dict())
            attend = select_attention_fn(self.device, self.model.dtype, shape.key_heads, shape.head_size)
            if attend is explicit_attention:
                return BATCH_TOKENS[-1]
            if self.device.type != "cuda":
                return BATCH_TOKENS[0]
            total = torch.cuda.get_device_properties(self.device).total_memory
            return fitting_batch_tokens(shape, self.precision, USABLE * total) or BATCH_TOKENS[-1]

        def _cannot_share(self, length):
            if self.backend != "causal":
                return "the model is not decoder-only"
            if self.softmax_dtype or self.mixed_precision_dtype:
                return "softmax_dtype or mixed_precision_dtype is set"
            if len(set((getattr(self.model, "hf_device_map", None) or {"": 0}).values())) > 1:
                return "the model is spread over several devices"
            return unsupported_reason(self.model, length)

    return SharedContextLM


def patch_fewshot_sampling():
    """Patch the harness so that the few-shot examples of a question do not depend on the number of processes.

    The harness draws examples in each process for its own questions only. With the patch, every process draws for all
    questions in order and then keeps its own.
    """
    from lm_eval.api.task import Task

    build = Task.build_all_requests

    def build_own(task, *args, rank=0, world_size=1, **kwargs):
        build(task, *args, **kwargs)
        task._instances = [request for request in task._instances if request.doc_id % world_size == rank]
        if not task._instances:
            raise UserError(f"there are fewer questions than processes ({world_size}): lower NUM_PROCESSES")

    Task.build_all_requests = build_own
