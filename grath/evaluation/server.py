"""The harness's model class for inference servers, `local-completions`, with our own transport."""

import copy
from functools import cache

from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import AutoConfig

from grath.common.errors import UserError
from grath.common.progress import progress_bar
from grath.modeling.loading import context_window, load_tokenizer, resolve_base_and_adapter
from grath.serving.completions import request_completions
from grath.serving.served import compare_with_local


class ServerLM(LocalCompletionsAPI):
    """`local-completions` whose requests go to all servers of a model, wait for a lost one, and never lose an adapter.

    The token ids of a request are those of `hf`. `served` is what `serve` yielded for `model`; `in_flight` is that of
    `request_completions`.

    Raises:
        UserError: a server has another model, or returns no log-probabilities for a prompt's tokens.
    """

    MULTIMODAL = False

    def __init__(self, served, model, in_flight=None):
        self.served, self.in_flight = served, in_flight
        base = resolve_base_and_adapter(model)[0]
        print(compare_with_local(served, model, load_tokenizer(model), prompt_logprobs=True), flush=True)
        own = context_window(AutoConfig.from_pretrained(base))
        self.window = min(filter(None, (own, served.window)), default=2048)
        super().__init__(
            model=served.name,
            base_url=f"{served.urls[0]}/v1/completions",
            tokenizer=base,
            tokenizer_backend="huggingface",
            max_length=self.window,
            num_concurrent=2,  # more than 1: the harness then hands over all requests at once
        )
        self.text_of = cache(self._text_of)

    def _text_of(self, token):
        """Return a token's text for `request_completions`; servers differ in special tokens and parts of characters."""
        text = self.tokenizer.decode(token)
        return None if token in self.tokenizer.all_special_ids or "\ufffd" in text else text.strip()

    def tok_encode(self, string, *args, **kwargs):
        """Tokenize as `hf` does: with the tokenizer's own BOS, and not a second one after a chat template's."""
        first = string if isinstance(string, str) else string[0]
        self.add_bos_token = not first.startswith(self.tokenizer.decode(self.prefix_token_id))
        return super().tok_encode(string, *args, **kwargs)

    def batch_loglikelihood_requests(self, chunks):
        """Return the inputs of requests; refuse those that the server would cut."""
        chunks = list(chunks)
        self._check_length(
            max((len(context) + len(answer) for chunk in chunks for _, context, answer in chunk), default=0)
        )
        return super().batch_loglikelihood_requests(chunks)

    def generate_until(self, requests, disable_tqdm=False):
        """Generate answers; refuse requests whose context the harness would cut."""
        for request in requests:
            context, options = request.args
            options = normalize_gen_kwargs(options, self._max_gen_toks)  # the harness would ignore `max_new_tokens`
            self._check_length(len(self.tok_encode(context)) + options["max_gen_toks"])
            request.arguments = (context, options)
        return super().generate_until(requests, disable_tqdm)

    def _check_length(self, tokens):
        if tokens >= self.window:
            raise UserError(
                f"a context with its answer has {tokens} tokens, and the server takes {self.window - 1}: score this "
                "task with BACKEND=hf-shared, or start the server with a larger maximum length (vLLM: --max-model-len)"
            )

    async def get_batched_requests(self, requests, cache_keys, *, generate=True, ctxlens=None, **kwargs):
        """Send requests (lists of token ids) to the servers; return what each response says, in order."""
        text_of = None if generate else self.text_of
        bodies = [self._create_payload([ids], generate=generate, **copy.deepcopy(kwargs)) for ids in requests]
        answers = [None] * len(requests)
        found = request_completions(self.served, bodies, self.in_flight, text_of)
        for index, response in progress_bar(found, total=len(requests), desc="Scoring", unit=" requests"):
            if generate:
                answers[index] = self.parse_generations(response)
            else:
                answers[index] = self.parse_logprobs(response, [requests[index]], [ctxlens[index]])
        return answers
