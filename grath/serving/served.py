"""A local model's or adapter's counterpart on inference servers: found by name, loaded, and compared."""

import asyncio
import gc
import math
import os
import sys
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from grath.common.errors import UserError
from grath.common.files import file_hash, hash_of
from grath.common.layout import ADAPTER, ADAPTER_CONFIG
from grath.modeling.loading import has_local_weights, load_for_inference, resolve_base_and_adapter
from grath.serving import completions
from grath.serving.client import (
    NOT_FOUND,
    TRY_AGAIN,
    Refused,
    Unavailable,
    open_session,
    send,
    send_until,
    server_urls,
    show,
)
from grath.serving.completions import LOAD, START, UNLOAD, Served, is_logprob, is_named

# Its tokens are likely enough to be stable in 16 bits, and open enough to tell one model from another.
PROBE = (
    "A glacier is a river of ice. It forms where more snow falls in winter than melts in summer, and its own weight "
    "presses the snow into ice that flows downhill, a few"
)
# Mean absolute difference of the probe's log-probabilities in nats. SmolLM2-135M in bf16 differs from itself in fp32 by
# 0.07.
SAME_MODEL = 0.25
# The token that a server generates must be among this many best local ones.
BEST = 5
# Seconds of the first attempt to reach the servers.
FIRST_TIMEOUT = 10


@contextmanager
def serve(model, urls, timeout):
    """Find a model on servers, and load it there if it is an adapter; yield `Served`; unload what was loaded.

    Servers that do not answer in `timeout` seconds are left out while another one does.

    Raises:
        UserError: a server has another model, or cannot load adapters.
        TimeoutError: no server answers in time.
    """
    base, adapter = resolve_base_and_adapter(model)
    found = asyncio.run(_entries(base, server_urls(urls), timeout))
    windows = [own["window"] for own in found.values() if own["window"]]
    name = next(iter(found.values()))["id"]
    if adapter:
        name = f"grath-{hash_of(file_hash(Path(adapter) / file) for file in (ADAPTER, ADAPTER_CONFIG))[:12]}"
    # An answer with the name of its base does not come from the adapter.
    names = () if adapter else frozenset().union(*(own["names"] for own in found.values()))
    served = Served(tuple(found), name, timeout, adapter, min(windows, default=None), names)
    try:
        for url in served.urls if adapter else ():
            asyncio.run(completions.load_adapter(url, served, timeout))
        yield served
    finally:
        if served.loaded:
            asyncio.run(_unload(served))


async def _unload(served):
    async with open_session(timeout=5) as session:
        for url in served.loaded:
            with suppress(Unavailable, Refused, TimeoutError):  # the server is gone, or has lost the adapter
                await asyncio.wait_for(send(session, f"{url}{UNLOAD}", {"lora_name": served.name}), 5)


def describe_servers(model, urls, timeout, adapters):
    """Describe what every server has for a model: its name there, and the longest sequence that it takes.

    Raise what `serve` does; also if one of the servers does not answer, or cannot load adapters where it must.
    """
    urls = server_urls(urls)
    found = asyncio.run(_entries(resolve_base_and_adapter(model)[0], urls, timeout))
    if missing := [url for url in urls if url not in found]:
        raise UserError(f"no response from {missing[0]}")
    for url in urls if adapters else ():
        try:
            asyncio.run(send_until(timeout, f"{url}{LOAD}", {}, set()))
        except Refused as error:  # the request has no adapter
            if error.status in (200, NOT_FOUND, 405):
                raise UserError(f"{url} cannot load adapters: start it with {START}") from None
    return "; ".join(
        f"{url} has {show(own['id'])}, at most {own['window'] or 'an unknown number of'} tokens"
        for url, own in found.items()
    )


async def _entries(base, urls, timeout):
    """Return the entry of the model `base` in the list of each server that answers: url -> dict."""
    # A server that is lost for good does not delay the others by the whole timeout.
    for seconds in dict.fromkeys((min(FIRST_TIMEOUT, timeout), timeout)):
        entries = (_entry(url, base, seconds) for url in urls)
        answers = dict(zip(urls, await asyncio.gather(*entries, return_exceptions=True), strict=True))
        found = {url: answer for url, answer in answers.items() if not isinstance(answer, TimeoutError)}
        if found:
            break
    for answer in (found or answers).values():
        if isinstance(answer, BaseException):
            raise answer
    for url in urls:
        if url not in found:
            print(f"Going on without {url}: {answers[url].strerror}", file=sys.stderr, flush=True)
    names = {own["id"] for own in found.values()}
    if len(names) > 1:
        raise UserError(
            f"the servers have {base} under several names ({', '.join(map(show, sorted(names)))}): give it one"
        )
    return found


async def _entry(url, base, timeout):
    """Return the entry of the model `base`, by its name or the path that it was loaded from, in a server's list."""
    models = await completions.served_models(url, timeout)
    for entry in models:
        names = entry["names"]
        if base in names or (is_named(base, names) and not any(_is_other_folder(name, base) for name in names)):
            # vLLM answers with the first of a model's names.
            entry["names"] = set().union(*(one["names"] for one in models if one["names"] & entry["names"]))
            return entry
    listed = show(", ".join(entry["id"] for entry in models)) or "no model"
    raise UserError(
        f"{url} serves {listed}, not {base}: serve it there, under that name or its last part "
        "(vLLM: --served-model-name, llama.cpp: --alias)"
    )


def _is_other_folder(name, base):
    """Whether a path from a server and a model whose weights cannot be compared are two folders of this machine."""
    both = os.path.isabs(name) and os.path.isdir(name) and os.path.isdir(base)  # noqa: PTH112, PTH117
    return both and not os.path.samefile(name, base) and not has_local_weights(base)  # noqa: PTH121


def compare_with_local(served, model, tokenizer, prompt_logprobs=False):
    """Compare the model on every server with the local one: a probe's tokens and their log-probabilities.

    Where the local weights are not on this machine, only the tokens are compared. Return a line that says what was
    compared.

    Args:
        served: what `serve` yielded for `model`.
        prompt_logprobs: whether a server must return the log-probabilities of a prompt's tokens.

    Raises:
        UserError: a server has another vocabulary or other weights, or lacks log-probabilities that are needed.
    """
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    probes = {url: _probe(replace(served, urls=(url,)), ids, prompt_logprobs) for url in served.urls}
    local, compared = _local_logprobs(model, tokenizer, ids), []
    for url, probe in probes.items():
        whole = len(probe) == len(ids) + 1 and all(is_logprob(value) for _, value in probe[1:])
        if prompt_logprobs and not (whole and len({value for _, value in probe[1:]}) > 1):
            raise UserError(
                f"{url} returns no log-probabilities for the tokens of a prompt, so scores from it would be chance: "
                "use a server that does, such as vLLM or SGLang"
            )
        # A server that returns nothing for the prompt may return the token that it generated.
        if whole and [text for text, _ in probe[:-1]] != [text.strip() for text in map(tokenizer.decode, ids)]:
            raise UserError(f"{url} has a different vocabulary from {model}: serve the same model there")
        if local is None or not probe or not is_logprob(probe[-1][1]):
            continue
        of_prompt, best = local
        ours = [*(of_prompt if whole else []), best.get(probe[-1][0], -math.inf)]
        theirs = [value for _, value in probe[-len(ours) :]]
        mean = sum(abs(one - other) for one, other in zip(ours, theirs, strict=True)) / len(ours)
        if not mean <= SAME_MODEL:
            raise UserError(
                f"{url} has different weights from {model}: the log-probabilities of a probe differ by {mean:.2f} on "
                "average; serve the same model there"
            )
        compared.append((mean, len(ours)))
    if not compared:
        what = "has the local tokens; its weights were not compared" if whole else "could not be compared"
        return f"{show(served.name)} on the servers {what}"
    mean, count = max(compared)
    return (
        f"{show(served.name)} on the servers has the local weights (the log-probabilities of {count} tokens of a probe "
        f"differ by {mean:.4f} on average)"
    )


def _probe(served, ids, prompt_logprobs):
    """Return (text, log-probability) of the probe's tokens and one more, as far as the server returns them."""
    body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 1}
    try:
        found = completions.request_completions(served, [body | {"echo": True}], try_again=TRY_AGAIN - {500})
        ((_, response),) = found
    except Refused as error:  # llama.cpp answers 500: it has no echo
        if prompt_logprobs:
            raise UserError(f"{error}; scores need the log-probabilities of a prompt, which vLLM returns") from None
        ((_, response),) = completions.request_completions(served, [body])
    logprobs = response["choices"][0].get("logprobs")
    try:
        if content := logprobs.get("content"):  # llama.cpp
            found = [(entry["token"], entry["logprob"]) for entry in content]
        else:
            found = [*zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)]
    except (AttributeError, LookupError, TypeError, ValueError):  # none, or another form
        return []
    return [(text.strip() if isinstance(text, str) else "", value) for text, value in found]


def _local_logprobs(model, tokenizer, ids):
    """Return the local log-probabilities of the tokens `ids` after the first, and of the best next ones by their text.

    It is None if the weights are not on this machine.
    """
    import torch

    from grath.modeling.precision import compute_dtype

    if not has_local_weights(model):
        return None
    loaded = load_for_inference(model, "bf16" if compute_dtype() == torch.bfloat16 else "fp16")
    with torch.inference_mode():
        logits = loaded(input_ids=torch.tensor([ids], device=loaded.device)).logits[0].float()
    logprobs = logits.log_softmax(-1).cpu()
    del loaded
    gc.collect()
    torch.cuda.empty_cache()
    of_prompt = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    best = logprobs[-1].topk(min(BEST, logprobs.shape[1]))
    texts = [text.strip() for text in map(tokenizer.decode, best.indices.tolist())]
    return of_prompt, dict(zip(texts, best.values.tolist(), strict=True))
