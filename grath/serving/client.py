"""HTTP requests to inference servers with the OpenAI completions API (vLLM, SGLang, llama.cpp).

`send` is the only place that reads a response: up to a number of bytes, and without following a redirect. `send_all`
limits the time. A message contains a server's text only as `show` returns it. The API key comes from the environment
variable OPENAI_API_KEY, and no message contains it.
"""

import asyncio
import errno
import os
import random
import re
import sys
from base64 import b64encode
from urllib.parse import urlsplit

from grath.common.errors import UserError, printable
from grath.common.files import parse_json

KEY = "OPENAI_API_KEY"
# Seconds before a request is sent again: doubled from the first to the second value.
FIRST_WAIT, LONGEST_WAIT = 0.5, 30
# Seconds of failures after which a line says what is waited for.
SILENT_WAIT = 10
# HTTP statuses of a server that is busy, starting or broken; every other one from 400 on refuses the request.
TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, *range(520, 525), 529}
NOT_FOUND = 404
# Maximum bytes of a response; for a completion, see `completions`. Characters of a server's text in a message.
MOST_BYTES, MOST_SHOWN = 2**21, 300


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
        if "@" in url or contains_key(url):
            raise UserError(f"a server's address is recorded, so it may contain no password: set {KEY} instead")
        try:
            parts = urlsplit(url)
            (parts.hostname or "").encode("idna")
            sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and len(url.split()) == 1
        except ValueError:
            sound = False
        if not sound or parts.query or parts.fragment:
            raise UserError(f"{show(url)!r} is not a server's address, such as http://host:8000")
        checked.append(url.rstrip("/").removesuffix("/v1"))
    return tuple(dict.fromkeys(checked))


def show(text):
    """Return a server's text for a message: one short line, control characters escaped; nothing of it with the key."""
    if not isinstance(text, str):
        return type(text).__name__
    if contains_key(text):
        return "(a text with the API key)"
    return printable(" ".join(text.replace(_key() or "\0", "***").split())[:MOST_SHOWN])


def contains_key(text):
    """Whether a text (str) contains the API key, also escaped, between other characters, in hexadecimal or base64.

    A placeholder such as EMPTY or not-needed, which may occur in any text, counts as no key.
    """
    key, letters = _key(), _letters(_key())
    if len(letters) < (12 if letters.isalpha() or letters.isdigit() else 8):
        return False
    found, raw = _letters(text), key.encode()
    # In base64, the same bytes look different at each of three offsets.
    encoded = [b64encode(bytes(i) + raw).decode()[-(-8 * i // 6) : 8 * (i + len(raw)) // 6] for i in range(3)]
    return any(_letters(form) in found for form in (letters, raw.hex(), *encoded))


def _letters(text):
    """Return the letters and digits of a text, also those that are escaped: %41, \\x41, \\u0041, &#65; and &#x41;."""
    text = text.replace("\\", "").replace("%25", "%").replace("%25", "%")
    text = re.sub(r"&#(\d{1,3});?", lambda found: chr(int(found[1])), text)
    text = re.sub(r"(?:u00|&#x|x|%)([0-9a-f]{2})", lambda found: chr(int(found[1], 16)), text, flags=re.IGNORECASE)
    return re.sub(r"[\W_]", "", text).lower()


def _key():
    return os.environ.get(KEY, "").strip()


def open_session(timeout):
    """Return an HTTP session that sends the API key, in a running event loop; `timeout`: seconds for a connection."""
    from aiohttp import ClientSession, ClientTimeout, TCPConnector

    key = _key()
    if not key.isprintable():
        raise UserError(f"{KEY} contains a line break or another control character")
    return ClientSession(
        connector=TCPConnector(limit=0),
        timeout=ClientTimeout(total=None, sock_connect=min(30, timeout)),
        headers={"Authorization": f"Bearer {key}"} if key else {},
    )


async def send(session, url, body=None, try_again=TRY_AGAIN, limit=MOST_BYTES):
    """Send one request: POST with a JSON body, or GET without one. Return the response's JSON; None if it is not JSON.

    Raises:
        Unavailable: no response, or one with a status of `try_again`.
        Refused: the server refuses or redirects the request, or sends more than `limit` bytes.
    """
    from aiohttp import ClientConnectorCertificateError, ClientConnectorSSLError, ClientError

    method, content = "GET" if body is None else "POST", bytearray()
    try:
        async with session.request(method, url, json=body, allow_redirects=False) as response:
            status, location = response.status, response.headers.get("Location")
            async for chunk in response.content.iter_any():
                content += chunk
                if len(content) > limit:
                    break
    except (ClientConnectorCertificateError, ClientConnectorSSLError) as error:
        raise UserError(f"{url}: {show(str(error))}") from None
    except (ClientError, OSError) as error:
        raise Unavailable(show(str(error)) or type(error).__name__) from None
    try:
        found = parse_json(content.decode("utf-8-sig"))
    except ValueError:
        found = None
    if status in try_again:
        raise Unavailable(f"HTTP {status}: {_reason(found, content)}")
    if 300 <= status < 400 and location:
        raise Refused(f"{url} redirects to {show(location)}, which is not followed: give the final address", status)
    error = isinstance(found, dict) and (found.get("error") or found.get("object") == "error")
    if status >= 300 or error:
        code = str((error if isinstance(error, dict) else found).get("code")) if error else None
        if status < 300 and code in map(str, try_again - {500}):  # of a proxy
            raise Unavailable(_reason(found, content))
        raise Refused(f"{url} refuses the request (HTTP {status}): {_reason(found, content)}", status)
    if len(content) > limit:
        raise Refused(f"{url} sends more than {limit} bytes, too many for a response to this request", status)
    return found


def _reason(found, content):
    """Return the server's reason from the body of an error: its JSON, and its bytes."""
    for key in ("error", "message"):
        found = found.get(key, found) if isinstance(found, dict) else found
    return show(found if isinstance(found, str) else content.decode(errors="replace")) or "no reason given"


async def send_all(senders, count, timeout, on_done):
    """Call `on_done` with the index and the response of each of `count` requests, as they come.

    A request that fails is sent again, by the sender that is free first. Each may take long while its server sends
    responses to others; it fails if its server meanwhile sends no complete response for `timeout` seconds.

    Args:
        senders: list of (url, function of a request's index that sends it); each has one request in flight.

    Raises:
        TimeoutError: there were failures, and no response, for `timeout` seconds.
    """
    now, failing_since, said = asyncio.get_running_loop().time, None, False
    heard = {url: 0 for url, _ in senders}  # when each server sent its last response
    waiting = asyncio.Queue()
    for index in range(count):
        waiting.put_nowait(index)

    async def in_time(url, request, sent):
        task = asyncio.ensure_future(request)
        try:
            while not task.done():
                left = max(sent, heard[url]) + timeout - now()
                if left <= 0:
                    raise TimeoutError("no response in time")
                await asyncio.wait([task], timeout=left)
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def work(url, send_fn):
        nonlocal failing_since, said
        wait = FIRST_WAIT
        while True:
            index, sent = await waiting.get(), now()
            try:
                response = await in_time(url, send_fn(index), sent)
            except (Unavailable, TimeoutError) as reason:
                waiting.put_nowait(index)
                waiting.task_done()
                since = now() if isinstance(reason, Unavailable) else max(sent, *heard.values())
                failing_since = min(failing_since or since, since)
                seconds = now() - failing_since
                if seconds >= timeout:
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
                failing_since, said, wait, heard[url] = None, False, FIRST_WAIT, now()

    tasks = [asyncio.create_task(waiting.join()), *(asyncio.create_task(work(*sender)) for sender in senders)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def send_until(timeout, url, *args):
    """Return what `send` does; while the server is unavailable, wait and send again, for at most `timeout` seconds."""
    found = []
    async with open_session(timeout) as session:
        sender = (url, lambda _: send(session, url, *args))
        await send_all([sender], 1, timeout, lambda _, response: found.append(response))
    return found[0]
