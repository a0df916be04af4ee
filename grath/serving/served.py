"""A local model's or adapter's counterpart on inference servers: found by name, loaded, and compared."""

import asyncio
import gc
import math
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from grath.common.errors import UserError
from grath.common.files import sha256
from grath.common.paths import ADAPTER
from grath.modeling.loading import has_local_weights, load_for_inference, resolve_base_and_adapter
from grath.serving.client import open_session, server_urls
from grath.serving.completions import Served, complete_all
from grath.serving.models import check_adapters, load_adapter, served_models, unload_adapter

# Its tokens are likely enough to be stable in 16 bits, and open enough to tell one model from another.
PROBE = (
    "A glacier is a river of ice. It forms where more snow falls in winter than melts in summer, and its own weight "
    "presses the snow into ice that flows downhill, a few"
)
# Mean absolute difference of the probe's log-probabilities in nats. SmolLM2-135M in bf16 differs from itself in fp32 by
# 0.07.
SAME_MODEL = 0.25
# Local tokens that the token that a server generates must be among.
BEST = 5
# Seconds of the first attempt to reach the servers.
FIRST_TIMEOUT = 10
NO_PROMPT_LOGPROBS = (
    "returns no log-probabilities for the tokens of a prompt, so scores from it would be chance: use a server that "
    "does, such as vLLM or SGLang"
)


@contextmanager
def serve(model, urls, timeout):
    """Find a model on servers, and load it there if it is an adapter; at the end, unload what was loaded.

    Servers that do not answer are left out while another one does.

    Args:
        model: hub name, model folder or adapter folder.
        urls: list of the servers' addresses.
        timeout: seconds to wait for a server.

    Yields:
        `Served`.

    Raises:
        UserError: a server has another model, or cannot load adapters.
        TimeoutError: no server answers in time.
    """
    base, adapter = resolve_base_and_adapter(model)
    found = asyncio.run(_entries(base, server_urls(urls), timeout))
    windows = [own["max_model_len"] for own in found.values() if isinstance(own.get("max_model_len"), int)]
    name = f"grath-{sha256(Path(adapter) / ADAPTER)[:12]}" if adapter else next(iter(found.values()))["id"]
    served = Served(tuple(found), name, adapter, min(windows, default=None), timeout)
    try:
        if adapter:
            asyncio.run(_load(served))
        yield served
    finally:
        if served.loaded:
            asyncio.run(_unload(served))


def describe_servers(model, urls, timeout, adapters):
    """Describe what every server has for a model: its name there, and the longest sequence that it takes.

    Args:
        adapters: whether the servers must be able to load adapters.

    Raises: as `serve`; also if one server of several does not answer.
    """
    urls = server_urls(urls)
    found = asyncio.run(_entries(resolve_base_and_adapter(model)[0], urls, timeout, adapters))
    if missing := [url for url in urls if url not in found]:
        raise UserError(f"no response from {missing[0]}")
    return "; ".join(
        f"{url} has {own['id']}, at most {own.get('max_model_len', 'an unknown number of')} tokens"
        for url, own in found.items()
    )


async def _entries(base, urls, timeout, adapters=False):
    """Return the entry of the model `base` in the list of each server that answers: url -> dict."""

    async def entry(session, url, seconds):
        models = await served_models(session, url, seconds)
        own = next((one for one in models if _is_named(one, base)), None)
        if own is None:
            listed = ", ".join(one["id"] for one in models) or "no model"
            raise UserError(
                f"{url} serves {listed}, not {base}: serve it there, under that name or its last part "
                "(vLLM: --served-model-name, llama.cpp: --alias)"
            )
        if adapters:
            await check_adapters(session, url)
        return own

    # A server that is lost for good does not delay the others by the whole timeout.
    for seconds in dict.fromkeys((min(FIRST_TIMEOUT, timeout), timeout)):
        async with open_session(seconds) as session:
            answers = await asyncio.gather(*(entry(session, url, seconds) for url in urls), return_exceptions=True)
        lost = [answer for answer in answers if isinstance(answer, TimeoutError)]
        if len(lost) < len(urls):
            break
    else:
        raise lost[0]
    found = dict(zip(urls, answers, strict=True))
    for url, answer in tuple(found.items()):
        if isinstance(answer, TimeoutError):
            print(f"Going on without {url}: {answer.strerror}", file=sys.stderr, flush=True)
            del found[url]
        elif isinstance(answer, BaseException):
            raise answer
    names = {own["id"] for own in found.values()}
    if len(names) > 1:
        raise UserError(f"the servers have {base} under several names ({', '.join(sorted(names))}): give it one")
    return found


async def _load(served):
    async with open_session(served.timeout) as session:
        for url in served.urls:
            if await load_adapter(session, url, served.name, served.adapter, served.timeout):
                served.loaded.add(url)


def _is_named(entry, base):
    """Whether an entry of a server's list is the model `base`, by its name or by the path that it was loaded from."""
    names = {name for name in (entry["id"], entry.get("root")) if isinstance(name, str)}
    return base in names or Path(base).name in {Path(name).name for name in names}


async def _unload(served):
    async with open_session(timeout=5) as session:
        await asyncio.gather(*(unload_adapter(session, url, served.name) for url in served.loaded))


def compare_with_local(served, model, tokenizer, prompt_logprobs=False):
    """Compare the model on every server with the local one: a probe's tokens and their log-probabilities.

    Where the local weights are not on this machine, or do not fit into its memory, only the tokens are compared.

    Args:
        served: what `serve` yielded for `model`.
        prompt_logprobs: whether a server must return the log-probabilities of a prompt's tokens.

    Returns:
        one line that says what was compared.

    Raises:
        UserError: a server has another vocabulary or other weights, or lacks log-probabilities that are needed.
    """
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    probes = {url: asyncio.run(_probe(replace(served, urls=(url,)), ids)) for url in served.urls}
    local = _local_logprobs(model, ids)
    means, counts = [], []
    for url, (tokens, logprobs) in probes.items():
        whole = len(tokens) == len(logprobs) == len(ids) + 1 and all(map(_is_number, logprobs[1:]))
        if prompt_logprobs and not (whole and len(set(logprobs[1:])) > 1):
            raise UserError(f"{url} {NO_PROMPT_LOGPROBS}")
        # A server that returns nothing for the prompt may return the token that it generated.
        if whole and [text.strip() for text in map(tokenizer.decode, ids)] != [
            str(text).strip() for text in tokens[:-1]
        ]:
            raise UserError(f"{url} has another vocabulary than {model}: serve the same model there")
        if local is None or not tokens or not _is_number(logprobs[-1]):
            continue
        of_prompt, best = local
        expected = {tokenizer.decode(token).strip(): value for token, value in best.items()}.get(
            str(tokens[-1]).strip()
        )
        pairs = [*zip(of_prompt, logprobs[1:-1], strict=True)] if whole else []
        differences = [
            abs(ours - theirs) for ours, theirs in [*pairs, (-math.inf if expected is None else expected, logprobs[-1])]
        ]
        mean = sum(differences) / len(differences)
        if not mean <= SAME_MODEL:
            raise UserError(
                f"{url} has other weights than {model}: the log-probabilities of a probe differ by {mean:.2f} on "
                "average; serve the same model there"
            )
        means.append(mean)
        counts.append(len(differences))
    if not means:
        what = "has the local tokens; its weights were not compared" if whole else "could not be compared"
        return f"{served.name} on the servers {what}"
    return (
        f"{served.name} on the servers has the local weights (the log-probabilities of {min(counts)} tokens of a probe "
        f"differ by {max(means):.4f} on average)"
    )


def _is_number(value):
    return isinstance(value, int | float) and math.isfinite(value)


async def _probe(served, ids):
    """Return (tokens, log-probabilities) of the probe and one more token, as far as the server returns them."""
    body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    found = []
    await complete_all(served, [body], lambda _, response: found.append(response["choices"][0].get("logprobs")))
    logprobs = found[0] if isinstance(found[0], dict) else {}
    if content := logprobs.get("content"):  # llama.cpp
        return [entry["token"] for entry in content], [entry["logprob"] for entry in content]
    return logprobs.get("tokens") or [], logprobs.get("token_logprobs") or []


def _local_logprobs(model, ids):
    """Return the local model's log-probabilities of the tokens `ids` after the first, and of the best next tokens.

    Returns:
        (list of float, dict of token -> float), or None if the weights are not on this machine or do not fit into it.
    """
    import torch

    from grath.modeling.precision import compute_dtype

    if not has_local_weights(model):
        return None
    precision = "bf16" if compute_dtype() == torch.bfloat16 else "fp16"
    loaded = load_for_inference(model, precision)
    with torch.inference_mode():
        logits = loaded(input_ids=torch.tensor([ids], device=loaded.device)).logits[0].float()
    logprobs = logits.log_softmax(-1).cpu()
    del loaded
    gc.collect()
    torch.cuda.empty_cache()
    best = logprobs[-1].topk(min(BEST, logprobs.shape[1]))
    of_prompt = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    return of_prompt, dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
