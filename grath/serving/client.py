"""HTTP requests to inference servers with the OpenAI completions API (vLLM, SGLang, TGI, llama.cpp).

The API key comes from the environment variable OPENAI_API_KEY, and no message contains it.
"""

import asyncio
import errno
import json
import os
from urllib.parse import urlsplit

from grath.common.errors import UserError

KEY = "OPENAI_API_KEY"
# Seconds before a request is sent again: doubled from the first to the second value.
FIRST_WAIT, LONGEST_WAIT = 0.5, 30
# HTTP statuses of a server that is busy, starting or broken; every other one from 400 on refuses the request.
TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)


class Unavailable(Exception):
    """A request that may succeed later. The message is the reason."""


class Refused(UserError):
    """A request that the server refuses, with the server's reason and its HTTP status."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


def server_urls(urls):
    """Check the servers' addresses, and return them without a trailing /v1: tuple of str.

    Raises:
        UserError: an address is not a plain http or https one.
    """
    checked = []
    for url in urls:
        try:
            parts = urlsplit(url)
            sound = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
        except ValueError:
            sound = False
        if not sound or parts.query or parts.fragment:
            raise UserError(f"{hide_key(url)!r} is no address of a server: it looks like http://host:8000")
        if parts.username is not None:
            raise UserError(f"a server's address is recorded, so it may contain no password: set {KEY} instead")
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
    return ClientSession(
        connector=TCPConnector(limit=0),
        timeout=ClientTimeout(total=None, sock_connect=min(30, timeout), sock_read=timeout),
        headers={"Authorization": f"Bearer {key}"} if key else {},
    )


async def send(session, url, body=None):
    """Send one request: POST with a JSON body, or GET without one. Return the text of the response.

    Raises:
        Unavailable: no response, an incomplete one, or one that says "later".
        Refused: the server refuses the request.
    """
    from aiohttp import ClientError

    try:
        async with session.request("GET" if body is None else "POST", url, json=body) as response:
            status, text = response.status, await response.text()
    except TimeoutError:
        raise Unavailable("no response in time") from None
    except (ClientError, OSError, UnicodeDecodeError) as error:
        raise Unavailable(hide_key(str(error) or type(error).__name__)) from None
    if status in TRY_AGAIN:
        raise Unavailable(f"HTTP {status}: {_reason(text)}")
    if status >= 400:
        raise Refused(f"{url} refuses the request (HTTP {status}): {_reason(text)}", status)
    return text


async def send_completion(session, url, body):
    """Send one completion request; return the response's dict, with at least one choice that has a text.

    Raises: as `send`; a response that is cut short or has another form is `Unavailable`.
    """
    try:
        response = json.loads(await send(session, f"{url}/v1/completions", body))
        if isinstance(response["choices"][0]["text"], str):
            return response
    except (ValueError, TypeError, LookupError):
        pass
    raise Unavailable("the response is incomplete, or no completion")


def _reason(text):
    """Return the server's reason from the body of an error, without the API key."""
    try:
        found = json.loads(text)
        found = found.get("error", found) if isinstance(found, dict) else found
        found = found.get("message", found) if isinstance(found, dict) else found
    except ValueError:
        found = text
    return hide_key(" ".join(str(found).split())[:300]) or "no reason given"


async def send_until(session, timeout, send_fn, *args):
    """Return `await send_fn(session, *args)`; while the server is unavailable, wait and send again.

    Raises:
        TimeoutError: the server was unavailable for `timeout` seconds.
    """
    loop, wait = asyncio.get_running_loop(), FIRST_WAIT
    deadline = loop.time() + timeout
    while True:
        try:
            return await send_fn(session, *args)
        except Unavailable as error:
            if loop.time() + wait > deadline:
                raise lost(args[0], timeout, error) from None
        await asyncio.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT)


def lost(url, timeout, reason):
    """Return the error of a server that has been unavailable for `timeout` seconds."""
    return TimeoutError(errno.ETIMEDOUT, f"no response from {url} for {timeout:g} s ({reason})")
