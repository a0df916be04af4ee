"""HTTP requests to inference servers with the OpenAI completions API (vLLM, SGLang, llama.cpp).

The API key comes from the environment variable OPENAI_API_KEY, and no message contains it.
"""

import asyncio
import errno
import json
import os
import random
import sys
from urllib.parse import urlsplit

from grath.common.errors import UserError

KEY = "OPENAI_API_KEY"
# Seconds before a request is sent again: doubled from the first to the second value.
FIRST_WAIT, LONGEST_WAIT = 0.5, 30
# Seconds of failures after which a line says what is waited for.
SILENT_WAIT = 10
# HTTP statuses of a server that is busy, starting or broken; every other one from 400 on refuses the request.
TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}
NOT_FOUND = 404


class Unavailable(Exception):
    """A request that may succeed later. The message is the reason."""


class Refused(UserError):
    """A request that the server refuses, with the server's reason and its HTTP status."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


def server_urls(urls):
    """Check the servers' http or https addresses, and return them without a trailing /v1: tuple of str."""
    checked = []
    for url in urls:
        if "@" in url:
            raise UserError(f"a server's address is recorded, so it may contain no password: set {KEY} instead")
        try:
            parts = urlsplit(url)
            sound = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
        except ValueError:
            sound = False
        if not sound or parts.query or parts.fragment:
            raise UserError(f"{hide_key(url)!r} is no address of a server: it looks like http://host:8000")
        checked.append(url.rstrip("/").removesuffix("/v1"))
    return tuple(dict.fromkeys(checked))


def hide_key(text):
    """Return `text` without the API key."""
    key = _key()
    return text.replace(key, "***") if key else text


def _key():
    return os.environ.get(KEY, "").strip()


def open_session(timeout):
    """Return an HTTP session that sends the API key; to be used in a running event loop."""
    from aiohttp import ClientSession, ClientTimeout, TCPConnector

    key = _key()
    if not key.isprintable():
        raise UserError(f"{KEY} contains a line break or another control character")
    return ClientSession(
        connector=TCPConnector(limit=0),
        timeout=ClientTimeout(total=None, sock_connect=min(30, timeout), sock_read=timeout),
        headers={"Authorization": f"Bearer {key}"} if key else {},
    )


async def send(session, url, body=None, try_again=TRY_AGAIN):
    """Send one request: POST with a JSON body, or GET without one. Return the text of the response.

    Raises:
        Unavailable: no response, or one with a status of `try_again`.
        Refused: the server refuses the request.
    """
    from aiohttp import ClientConnectorCertificateError, ClientError

    try:
        async with session.request("GET" if body is None else "POST", url, json=body) as response:
            status, text = response.status, await response.text()
    except TimeoutError:
        raise Unavailable("no response in time") from None
    except ClientConnectorCertificateError as error:
        raise UserError(f"{url}: {hide_key(str(error))}") from None
    except (ClientError, OSError, UnicodeDecodeError) as error:
        raise Unavailable(hide_key(str(error) or type(error).__name__)) from None
    if status in try_again:
        raise Unavailable(f"HTTP {status}: {_reason(text)}")
    if status >= 400:
        raise Refused(f"{url} refuses the request (HTTP {status}): {_reason(text)}", status)
    return text


def _reason(text):
    """Return the server's reason from the body of an error, without the API key."""
    try:
        found = json.loads(text)
        for key in ("error", "message"):
            found = found.get(key, found) if isinstance(found, dict) else found
    except ValueError:
        found = text
    return hide_key(" ".join(str(found).split()))[:300] or "no reason given"


async def send_all(senders, count, timeout, on_done):
    """Call `on_done` with the index and the response of each of `count` requests, as they come.

    A request that fails is sent again, by the sender that is free first.

    Args:
        senders: list of (url, function of a request's index that sends it); each has one request in flight.

    Raises:
        TimeoutError: there were failures, and no response, for `timeout` seconds.
    """
    now, failing_since, said = asyncio.get_running_loop().time, None, False
    waiting = asyncio.Queue()
    for index in range(count):
        waiting.put_nowait(index)

    async def work(url, send_fn):
        nonlocal failing_since, said
        wait = FIRST_WAIT
        while True:
            index = await waiting.get()
            try:
                response = await send_fn(index)
            except Unavailable as reason:
                waiting.put_nowait(index)
                waiting.task_done()
                failing_since = failing_since or now()
                seconds = now() - failing_since
                if seconds > timeout:
                    raise TimeoutError(
                        errno.ETIMEDOUT, f"no response from {url} for {timeout:g} s ({reason})"
                    ) from None
                if seconds > SILENT_WAIT and not said:
                    said = True
                    print(f"Waiting up to {timeout:g} s for {url} ({reason})", file=sys.stderr, flush=True)
                # Servers that lost many requests at once do not get all of them back at once.
                await asyncio.sleep(wait * random.uniform(0.5, 1))
                wait = min(2 * wait, LONGEST_WAIT)
            else:
                on_done(index, response)
                waiting.task_done()
                failing_since, said, wait = None, False, FIRST_WAIT

    tasks = [asyncio.create_task(waiting.join()), *(asyncio.create_task(work(*sender)) for sender in senders)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def send_until(session, timeout, url, *args):
    """Return what `send` does; while the server is unavailable, wait and send again, for at most `timeout` seconds."""
    found = []
    sender = (url, lambda _: send(session, url, *args))
    await send_all([sender], 1, timeout, lambda _, response: found.append(response))
    return found[0]
