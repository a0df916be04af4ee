"""Completions of many requests from one or more servers, each exactly once.

A request is sent again until it has its response. A lost or busy server is waited for, and another one may answer
meanwhile.
"""

import asyncio
import random
from dataclasses import dataclass, field

from grath.common.signals import SignalReceived
from grath.serving.client import (
    FIRST_WAIT,
    LONGEST_WAIT,
    Outage,
    Refused,
    Unavailable,
    open_session,
    send_completion,
)
from grath.serving.models import load_adapter

# Requests in flight at each server; those that the server refuses as too many wait.
MOST_IN_FLIGHT = 512
UNKNOWN_MODEL = 404


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
    timeout: float = 600
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
    loop = asyncio.get_running_loop()
    waiting, left, outage = asyncio.Queue(), len(bodies), Outage(served.timeout)
    finished, loading = loop.create_future(), {url: asyncio.Lock() for url in served.urls}
    for index in range(len(bodies)):
        waiting.put_nowait(index)

    async def answer(session, url, index):
        """Send a request; where a restarted server has lost the adapter, load it again for the next attempt."""
        try:
            return await send_completion(session, url, {"model": served.name, **bodies[index]})
        except Refused as error:
            if not served.adapter or error.status != UNKNOWN_MODEL:
                raise
            try:
                async with loading[url]:
                    if await load_adapter(session, url, served.name, served.adapter, min(30, served.timeout)):
                        served.loaded.add(url)
            except TimeoutError:
                pass
            except Refused:
                if len(served.urls) == 1:  # else another server may answer
                    raise
            raise Unavailable(str(error)) from None

    async def work(session, url):
        nonlocal left
        wait = FIRST_WAIT
        while True:
            index = await waiting.get()
            try:
                response = await answer(session, url, index)
            except Unavailable as error:
                waiting.put_nowait(index)
                outage.failed(url, error)
                # Servers that lost many requests at once do not get all of them back at once.
                await asyncio.sleep(wait * random.uniform(0.5, 1))
                wait = min(2 * wait, LONGEST_WAIT)
            else:
                on_done(index, response)
                outage.succeeded()
                left, wait = left - 1, FIRST_WAIT
                if not left:
                    finished.set_result(None)

    def on_error(loop, context):
        """A signal may arrive in one of the loop's own callbacks, where its exception would only be logged."""
        error = context.get("exception")
        if isinstance(error, SignalReceived) and not finished.done():
            finished.set_exception(error)
        else:
            loop.default_exception_handler(context)

    loop.set_exception_handler(on_error)
    async with open_session(served.timeout) as session:
        count = min(in_flight or MOST_IN_FLIGHT, len(bodies))
        workers = [asyncio.create_task(work(session, url)) for _ in range(count) for url in served.urls]
        try:
            done, _ = await asyncio.wait([finished, *workers], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


def generate_server(served, prompts, max_new_tokens, eos_ids, on_done, in_flight=None):
    """Generate greedy completions of tokenized prompts on servers.

    Args:
        served, in_flight: as in `complete_all`.
        prompts, max_new_tokens, eos_ids: as in `generate_shared_prefix`.
        on_done: function that is called for each completion with the index of its prompt, its text, and its number of
            tokens if the server says it (else 0).
    """
    # A server may take other defaults from the model's generation_config.json.
    options = {"max_tokens": max_new_tokens, "temperature": 0, "top_p": 1, "repetition_penalty": 1}
    bodies = [{"prompt": prompt, **options, "stop_token_ids": list(eos_ids)} for prompt in prompts]

    def done(index, response):
        usage = response.get("usage") or {}
        on_done(index, response["choices"][0]["text"], usage.get("completion_tokens") or 0)

    asyncio.run(complete_all(served, bodies, done, in_flight))
