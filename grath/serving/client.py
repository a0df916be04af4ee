"""HTTP requests to inference servers with the OpenAI completions API (vLLM, SGLang, llama.cpp).

The API key comes from the environment variable OPENAI_API_KEY, and no message contains it.
"""

import asyncio
import errno
import json
import os
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

    Args:
        try_again: HTTP statuses that make the server unavailable; every other one from 400 on refuses the request.

    Raises:
        Unavailable: no response, an incomplete one, or one that says "later".
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
        for key in ("error", "message"):
            found = found.get(key, found) if isinstance(found, dict) else found
    except ValueError:
        found = text
    return hide_key(" ".join(str(found).split()))[:300] or "no reason given"


async def send_until(session, timeout, send_fn, *args):
    """Return `await send_fn(session, *args)`; while the server is unavailable, wait and send again.

    Raises:
        TimeoutError: the server was unavailable for `timeout` seconds.
    """
    wait, outage = FIRST_WAIT, Outage(timeout)
    while True:
        try:
            return await send_fn(session, *args)
        except Unavailable as error:
            outage.failed(args[0], error)
        await asyncio.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT)


class Outage:
    """The time since the first failure after the last success, which ends with an error after `timeout` seconds."""

    def __init__(self, timeout):
        self.timeout, self.start, self.said = timeout, None, False

    def succeeded(self):
        self.start, self.said = None, False

    def failed(self, url, reason):
        """Note a failure.

        Raises:
            TimeoutError: there was none but failures for the timeout.
        """
        now = asyncio.get_running_loop().time()
        if self.start is None:
            self.start = now
        if now - self.start > self.timeout:
            raise TimeoutError(errno.ETIMEDOUT, f"no response from {url} for {self.timeout:g} s ({reason})") from None
        if now - self.start > SILENT_WAIT and not self.said:
            self.said = True
            print(f"Waiting up to {self.timeout:g} s for {url} ({reason})", file=sys.stderr, flush=True)
