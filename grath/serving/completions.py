"""A model on inference servers: its LoRA adapter there, and the completions of many requests, each exactly once.

A request is sent again until it has its response. A lost or busy server is waited for, and another one may answer
meanwhile.
"""

import asyncio
import json
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from threading import Thread

from grath.common.defaults import SERVER_TIMEOUT
from grath.common.errors import UserError
from grath.serving.client import NOT_FOUND, TRY_AGAIN, Refused, Unavailable, open_session, send, send_all, send_until

# Requests in flight at each server; those that the server refuses as too many wait.
MOST_IN_FLIGHT = 512
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


def request_completions(served, bodies, in_flight=None):
    """Send completion requests to all servers of a model, each until it has its response.

    Args:
        served: `Served`.
        bodies: list of dicts, without the model's name.
        in_flight: most requests in flight at each server; None is `MOST_IN_FLIGHT`.

    Yields:
        (index, response's dict) of each request once, as the responses come.

    Raises:
        Refused: a server refuses a request; the message is its reason.
        TimeoutError: no request had a response for the timeout of `served`.
    """
    loop, results = asyncio.new_event_loop(), SimpleQueue()
    asking = loop.create_task(_request_completions(served, bodies, in_flight, lambda *found: results.put(found)))
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


async def _request_completions(served, bodies, in_flight, on_done):
    async with open_session(served.timeout) as session:
        senders = [(url, partial(_request, session, served, url, asyncio.Lock(), bodies)) for url in served.urls]
        # The servers take turns, so that they share few requests too.
        senders *= min(in_flight or MOST_IN_FLIGHT, len(bodies))
        await send_all(senders, len(bodies), served.timeout, on_done)


async def _request(session, served, url, loading, bodies, index):
    """Send a request, and check its response; where a restarted server has lost the adapter, load it again first."""
    try:
        response = json.loads(await send(session, f"{url}/v1/completions", {"model": served.name, **bodies[index]}))
        if isinstance(response["choices"][0]["text"], str):
            return response
    except (ValueError, TypeError, LookupError):
        pass
    except Refused as error:
        if not served.adapter or error.status != NOT_FOUND:
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
    raise Unavailable("the response is incomplete, or no completion")


async def served_models(session, url, timeout):
    """List the models and adapters of a server: list of dicts with at least `id`."""
    text = await send_until(session, timeout, f"{url}/v1/models")
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
    body = {"lora_name": served.name, "lora_path": served.adapter}
    try:
        # vLLM answers 500 where it cannot use the adapter.
        await send_until(session, timeout, f"{url}{LOAD}", body, TRY_AGAIN - {500})
        served.loaded.add(url)
    except Refused as error:
        if served.name in {model["id"] for model in await served_models(session, url, timeout)}:
            return  # it was loaded before
        raise Refused(
            f"{error}: the server must see the folder {served.adapter}, and be started with {START}, with a "
            "--max-lora-rank of at least the adapter's; or serve the merged model that `python -m grath.export` writes",
            error.status,
        ) from None
