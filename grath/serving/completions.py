"""A model on inference servers: its LoRA adapter there, and the completions of many requests, each exactly once.

A request is sent again until it has its response. A lost or busy server is waited for, and another one may answer
meanwhile. `_check` compares every response with its request.
"""

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePath
from queue import SimpleQueue
from threading import Thread

from grath.common.errors import UserError
from grath.common.files import fits
from grath.serving import client
from grath.serving.client import Refused, Unavailable, send_until, show

# Requests in flight at each server; those that the server refuses as too many wait.
MOST_IN_FLIGHT = 512
# Maximum bytes of a response: a fixed number, and a number for each token in it. vLLM sends up to 300 for a token's
# log-probabilities.
BYTES, BYTES_PER_TOKEN = 2**18, 2**11
# What vLLM, SGLang, llama.cpp and TGI call the end of a complete completion; the first two are from older servers.
FINISHED = (None, "", "stop", "length", "eos_token")
# vLLM's API to load adapters while it runs.
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
# The last option keeps LoRA off the LM head, where vLLM 0.32 fails on several requests for log-probabilities at once.
START = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and `vllm serve BASE --enable-lora --lora-target-modules q_proj k_proj v_proj`"
)


@dataclass(frozen=True)
class Served:
    """A model on one or more servers."""

    urls: tuple[str, ...]  # without /v1
    name: str  # the model's name there
    timeout: float  # seconds of failures, without any response, after which requests fail
    adapter: str | None = None  # the adapter's folder, which a restarted server loads again
    window: int | None = None  # the longest sequence of tokens that every server takes, if they say
    names: frozenset = frozenset()  # what the servers may call the model in a response, in addition to `name`
    loaded: set = field(default_factory=set)  # the servers on which this process has loaded the adapter


def request_completions(served, bodies, in_flight=None, text_of=None, try_again=client.TRY_AGAIN):
    """Send completion requests to all servers of a model, each until it has its response.

    Args:
        served: `Served`.
        bodies: list of dicts, without the model's name.
        in_flight: most requests in flight at each server; None is `MOST_IN_FLIGHT`.
        text_of: function of a token id that returns the token's text without white space around it, or None where a
            server may write another; if given, a response must have the log-probabilities of the prompt's tokens.
        try_again: HTTP statuses after which a request is sent again.

    Yields:
        (index, response's dict) of each request once, as the responses come. A response has one choice.

    Raises:
        Refused: a server refuses a request, and the message is its reason; or a response contradicts its request.
        TimeoutError: no request had a response for the timeout of `served`.
    """
    loop, results = asyncio.new_event_loop(), SimpleQueue()

    async def ask():
        async with client.open_session(served.timeout) as session:
            send = partial(_request, session, served, bodies, text_of, try_again)
            senders = [(url, partial(send, url, asyncio.Lock())) for url in served.urls]
            # The servers take turns, so that they share few requests too.
            senders *= min(in_flight or MOST_IN_FLIGHT, len(bodies))
            await client.send_all(senders, len(bodies), served.timeout, lambda *found: results.put(found))

    asking = loop.create_task(ask())
    asking.add_done_callback(results.put)
    asking.add_done_callback(lambda _: loop.stop())
    # A signal's exception is raised at any line of the main thread, which must not be one of the event loop.
    thread = Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        while (found := results.get()) is not asking:
            yield found
        asking.result()
    finally:
        loop.call_soon_threadsafe(asking.cancel)
        thread.join()
        loop.close()


async def _request(session, served, bodies, text_of, try_again, url, loading, index):
    """Send a request, and check its response; where a restarted server has lost the adapter, load it again first."""
    body = {"model": served.name, **bodies[index]}
    ids = body["prompt"][0] if isinstance(body["prompt"][0], list) else body["prompt"]
    tokens = body.get("max_tokens", 0) + (len(ids) if body.get("echo") else 0)
    try:
        found = await client.send(session, f"{url}/v1/completions", body, try_again, BYTES + BYTES_PER_TOKEN * tokens)
    except Refused as error:
        if not served.adapter or error.status != client.NOT_FOUND:
            raise
        try:
            async with loading:
                with suppress(TimeoutError):
                    await load_adapter(url, served, min(30, served.timeout))
        except Refused:
            if len(served.urls) == 1:  # else another server may answer
                raise
        raise Unavailable(str(error)) from None
    if wrong := _check(found, served, ids, text_of, body.get("max_tokens", 0)):
        raise Refused(f"{url} {wrong}", 200)
    return found


def _check(response, served, ids, text_of, most):
    """Return why a response does not answer a request for a completion of the tokens `ids`, or None.

    `most` is the number of tokens that were asked for.

    Raises:
        Unavailable: there is no completion; there may be one on the next try.
    """
    choices = response.get("choices") if isinstance(response, dict) else None
    if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
        raise Unavailable("the response is not JSON with a completion")
    choice, model, usage = choices[0], response.get("model"), response.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    if choice.get("finish_reason") == "content_filter":
        return "filters completions: start it without a filter"
    if choice.get("finish_reason") not in FINISHED:
        raise Unavailable(f"a completion has ended early: {show(choice['finish_reason'])}")
    if len(choices) > 1 or choice.get("index") not in (None, 0):
        return "sends completions other than the one requested"
    choice["index"] = 0
    if model is not None and not is_named(model, {served.name, *served.names}):
        return f"answers with another model, {show(model)}, not {show(served.name)}"
    read, made = usage.get("prompt_tokens"), usage.get("completion_tokens")
    cut = choice.get("finish_reason") == "length"
    # The probe and scores ask for one token.
    if most > 1 and type(made) is int and (made > most or made < most and cut):
        return f"ends completions at another length than {most} tokens: start it without a limit of its own"
    if read is not None and read != len(ids):
        read = show(str(read) if type(read) is int else read)
        return f"has not read the {len(ids)} tokens of a prompt ({read}): start it so that it cuts none"
    if not isinstance(choice.get("text"), str):
        return "sends a completion that is not text"
    if text_of:
        return _check_logprobs(choice.get("logprobs"), [*map(text_of, ids), None])
    return "sends the API key in a completion" if client.contains_key(choice["text"]) else None


def _check_logprobs(logprobs, texts):
    """Return what is wrong with the log-probabilities of tokens, of which some texts are known; None if nothing is."""
    keys = ("tokens", "token_logprobs", "top_logprobs")
    lists = [logprobs.get(key) if isinstance(logprobs, dict) else None for key in keys]
    if not all(isinstance(one, list) and len(one) == len(texts) for one in lists):
        return f"does not return {len(texts)} log-probabilities for as many tokens: start it so that it cuts no prompt"
    tokens, values, tops = lists
    tops = [value for top in tops[1:] for value in (isinstance(top, dict) and top.values()) or (None,)]
    if not all(map(is_logprob, values[1:] + tops)):
        return "returns a log-probability that is missing, or no number up to 0"
    if len(values) > 3 and len(set(values[1:])) == 1:
        return f"returns {values[1]} as the log-probability of every token"
    tokens = [token.strip() if isinstance(token, str) else None for token in tokens]
    same = all(text in (None, token) for token, text in zip(tokens, texts, strict=True))
    return None if same else "returns log-probabilities of tokens other than those sent"


def is_logprob(value):
    """Whether a value from a server is a log-probability, up to rounding."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e6 < value < 0.01


def is_named(name, names):
    """Whether a name from a server is one of `names`, or has the last part of one."""
    return isinstance(name, str) and PurePath(name).name in {PurePath(one).name for one in names}


async def served_models(url, timeout):
    """List the models and adapters of a server: list of dicts of `id`, `names` (set of str) and `window` (or None)."""
    found = await send_until(timeout, f"{url}/v1/models")
    if not fits(found, {"data": [{"id": str}]}):
        raise UserError(f"{url}/v1/models lists no models: is it a server with the OpenAI completions API?")
    for one in found["data"]:
        one["names"] = {name for name in (one["id"], one.get("root")) if isinstance(name, str)}
        window = one.get("max_model_len")
        one["window"] = window if type(window) is int and window > 0 else None
    return found["data"]


async def load_adapter(url, served, timeout):
    """Load a model's LoRA adapter on a server, unless the server has it.

    Raises:
        Refused: the server cannot do this; the message says how to start one that can.
    """
    body = {"lora_name": served.name, "lora_path": served.adapter}
    try:
        # vLLM answers 500 where it cannot use the adapter.
        await send_until(timeout, f"{url}{LOAD}", body, client.TRY_AGAIN - {500})
        served.loaded.add(url)
    except Refused as error:
        if served.name in {model["id"] for model in await served_models(url, timeout)}:
            return  # it was loaded before
        raise Refused(
            f"{error}: the server must see the folder {served.adapter}, and be started with {START}, with a "
            "--max-lora-rank of at least the adapter's; or serve the merged model that `python -m grath.export` writes",
            error.status,
        ) from None
