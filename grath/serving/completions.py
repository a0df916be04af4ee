"""A model on inference servers: its LoRA adapter there, and the completions of many requests, each exactly once.

A request is sent again until it has its response. A lost or busy server is waited for, and another one may answer
meanwhile.
"""

import asyncio
import json
import random
from contextlib import suppress
from dataclasses import dataclass, field

from grath.common.defaults import SERVER_TIMEOUT
from grath.common.errors import UserError
from grath.common.signals import SignalReceived
from grath.serving import client
from grath.serving.client import Outage, Refused, Unavailable, open_session, send, send_completion, send_until

# Requests in flight at each server; those that the server refuses as too many wait.
MOST_IN_FLIGHT = 512
UNKNOWN_MODEL = 404
# vLLM's API to load adapters while it runs.
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
# The last option keeps LoRA off the LM head, where vLLM 0.32 fails at several requests for log-probabilities at once.
START = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and `vllm serve BASE --enable-lora --lora-target-modules q_proj k_proj v_proj`"
)


@dataclass(frozen=True)
class Served:
    """A model on one or more servers.

    Attributes:
        urls: the servers, without /v1.
        name: the model's name there.
        adapter: the adapter's folder, which a restarted server loads again; None for a model.
        window: the longest sequence of tokens that every server takes; None if they do not say.
        timeout: seconds of failures, without any response, after which requests fail.
        loaded: the servers on which this process has loaded the adapter.
    """

    urls: tuple[str, ...]
    name: str
    adapter: str | None = None
    window: int | None = None
    timeout: float = SERVER_TIMEOUT
    loaded: set = field(default_factory=set)


async def complete_all(served, bodies, on_done, in_flight=None):
    """Send completion requests to all servers of a model, each until it has its response.

    Args:
        served: `Served`.
        bodies: list of dicts, without the model's name.
        on_done: function that is called once for each request with its index and the response's dict, as they come.
        in_flight: most requests in flight at each server; None is `MOST_IN_FLIGHT`.

    Raises:
        Refused: a server refuses a request; the message is its reason.
        TimeoutError: no request had a response for the timeout of `served`.
    """
    if not bodies:
        return
    finished = asyncio.get_running_loop().create_future()
    waiting, left, outage = asyncio.Queue(), set(range(len(bodies))), Outage(served.timeout)
    for index in left:
        waiting.put_nowait(index)

    async def work(session, url, loading):
        wait = client.FIRST_WAIT
        while True:
            index = await waiting.get()
            try:
                response = await _answer(session, served, url, bodies[index], loading)
            except Unavailable as error:
                waiting.put_nowait(index)
                outage.failed(url, error)
                # Servers that lost many requests at once do not get all of them back at once.
                await asyncio.sleep(wait * random.uniform(0.5, 1))
                wait = min(2 * wait, client.LONGEST_WAIT)
            else:
                on_done(index, response)
                outage.succeeded()
                wait = client.FIRST_WAIT
                left.remove(index)
                if not left:
                    finished.set_result(None)

    def on_error(loop, context):
        """A signal may arrive in one of the loop's own callbacks, where its exception would only be logged."""
        error = context.get("exception")
        if isinstance(error, SignalReceived) and not finished.done():
            finished.set_exception(error)
        else:
            loop.default_exception_handler(context)

    asyncio.get_running_loop().set_exception_handler(on_error)
    async with open_session(served.timeout) as session:
        # The servers take turns, so that they share few requests too.
        servers = [(url, asyncio.Lock()) for url in served.urls] * min(in_flight or MOST_IN_FLIGHT, len(bodies))
        workers = [asyncio.create_task(work(session, *server)) for server in servers]
        try:
            done, _ = await asyncio.wait([finished, *workers], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


async def _answer(session, served, url, body, loading):
    """Send a request; where a restarted server has lost the adapter, load it again for the next attempt."""
    try:
        return await send_completion(session, url, {"model": served.name, **body})
    except Refused as error:
        if not served.adapter or error.status != UNKNOWN_MODEL:
            raise
        try:
            async with loading:
                await load_adapter(session, url, served, min(30, served.timeout))
        except TimeoutError:
            pass
        except Refused:
            if len(served.urls) == 1:  # else another server may answer
                raise
        raise Unavailable(str(error)) from None


def completion_tokens(response):
    """Return the number of tokens of a response's completion, or 0 if the server does not say it."""
    usage = response.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) else 0


async def served_models(session, url, timeout):
    """List the models and adapters of a server: list of dicts with at least `id`."""
    text = await send_until(session, timeout, send, f"{url}/v1/models")
    try:
        models = json.loads(text)["data"]
        if all(isinstance(model["id"], str) for model in models):
            return models
    except (ValueError, TypeError, LookupError):
        pass
    raise UserError(f"{url}/v1/models lists no models: is it a server with the OpenAI completions API?")


async def load_adapter(session, url, served, timeout):
    """Load a model's LoRA adapter on a server, unless the server has it.

    Raises:
        Refused: the server cannot; the message says how to start it so that it can.
    """

    async def is_loaded():
        return served.name in {model["id"] for model in await served_models(session, url, timeout)}

    if await is_loaded():
        return
    body = {"lora_name": served.name, "lora_path": served.adapter}
    try:
        # vLLM answers 500 where it cannot use the adapter.
        await send_until(session, timeout, send, f"{url}{LOAD}", body, client.TRY_AGAIN - {500})
        served.loaded.add(url)
    except Refused as error:
        if not await is_loaded():  # another program may have loaded it meanwhile
            raise Refused(
                f"{error}: the server must see the folder {served.adapter}, and be started with {START}, with a "
                "--max-lora-rank of at least the adapter's; or serve the merged model that `python -m grath.export` "
                "writes",
                error.status,
            ) from None


async def check_adapters(session, url):
    """Raise `UserError` if a server has no API to load adapters."""
    try:
        await send(session, f"{url}{LOAD}", {})
    except Unavailable:
        return
    except Refused as error:  # the request has no adapter
        if error.status == 404:
            raise UserError(f"{url} cannot load adapters: start it with {START}") from None


async def unload_adapter(session, url, name):
    """Unload an adapter from a server; a server that is gone, or does not have it, is no error."""
    with suppress(Unavailable, Refused):
        await send(session, f"{url}{UNLOAD}", {"lora_name": name})
