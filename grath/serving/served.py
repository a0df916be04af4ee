"""A local model's or adapter's counterpart on inference servers: found by name, loaded, and compared."""

import asyncio
import gc
from contextlib import contextmanager
from pathlib import Path

from grath.common.errors import UserError
from grath.common.files import sha256
from grath.common.paths import ADAPTER
from grath.modeling.loading import has_local_weights, load_for_inference, resolve_base_and_adapter
from grath.serving.client import open_session, send_completion, send_until, server_urls
from grath.serving.completions import Served
from grath.serving.models import load_adapter, served_models, unload_adapter

# Its tokens are likely enough to be stable in 16 bits, and open enough to tell one model from another.
PROBE = (
    "A glacier is a river of ice. It forms where more snow falls in winter than melts in summer, and its own weight "
    "presses the snow into ice that flows downhill, a few"
)
# Mean absolute difference of the probe's log-probabilities in nats. SmolLM2-135M in bf16 differs from itself in fp32 by
# 0.07.
SAME_MODEL = 0.25
NO_PROMPT_LOGPROBS = (
    "returns no log-probabilities for the tokens of a prompt, so scores from it would be chance: use a server that "
    "does, such as vLLM or SGLang"
)


@contextmanager
def serve(model, urls, timeout):
    """Find a model on servers, and load it there if it is an adapter; unload the adapter at the end.

    Args:
        model: hub name, model folder or adapter folder.
        urls: list of the servers' addresses.
        timeout: seconds to wait for a server.

    Yields:
        `Served`.

    Raises:
        UserError: a server has another model, or cannot load adapters.
        TimeoutError: a server does not answer in time.
    """
    urls = server_urls(urls)
    base, adapter = resolve_base_and_adapter(model)
    found = asyncio.run(_find(base, adapter, urls, timeout))
    try:
        yield found
    finally:
        if adapter:
            asyncio.run(_unload(found))


def describe_servers(model, urls, timeout):
    """Describe what every server has for a model: its name there, and the longest sequence that it takes.

    Raises: as `serve`; an adapter is not loaded.
    """
    base = resolve_base_and_adapter(model)[0]
    found = asyncio.run(_entries(base, server_urls(urls), timeout))
    return "; ".join(
        f"{url} has {own['id']}, at most {own.get('max_model_len', 'an unknown number of')} tokens"
        for url, own in found.items()
    )


async def _entries(base, urls, timeout):
    """Return every server's entry of the model `base`: url -> dict."""
    found = {}
    async with open_session(timeout) as session:
        for url in urls:
            models = await served_models(session, url, timeout)
            found[url] = next((one for one in models if _is_named(one, base)), None)
            if found[url] is None:
                listed = ", ".join(one["id"] for one in models) or "no model"
                raise UserError(
                    f"{url} serves {listed}, not {base}: serve it there, under that name or its last part "
                    "(vLLM: --served-model-name, llama.cpp: --alias)"
                )
    names = {own["id"] for own in found.values()}
    if len(names) > 1:
        raise UserError(f"the servers have {base} under several names ({', '.join(sorted(names))}): give it one")
    return found


async def _find(base, adapter, urls, timeout):
    found = await _entries(base, urls, timeout)
    name = found[urls[0]]["id"]
    if adapter:
        name = f"grath-{sha256(Path(adapter) / ADAPTER)[:12]}"
        async with open_session(timeout) as session:
            for url in urls:
                await load_adapter(session, url, name, adapter, timeout)
    windows = [own["max_model_len"] for own in found.values() if isinstance(own.get("max_model_len"), int)]
    return Served(urls, name, adapter, min(windows, default=None), timeout)


def _is_named(entry, base):
    """Whether an entry of a server's list is the model `base`, by its name or by the path that it was loaded from."""
    names = {name for name in (entry["id"], entry.get("root")) if isinstance(name, str)}
    return base in names or Path(base).name in {Path(name).name for name in names}


async def _unload(served):
    async with open_session(timeout=5) as session:
        await asyncio.gather(*(unload_adapter(session, url, served.name) for url in served.urls))


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
    probes = asyncio.run(_probe(served, ids))
    expected = _local_logprobs(model, ids)
    largest, compared = 0, 0
    for url, (tokens, logprobs) in zip(served.urls, probes, strict=True):
        if prompt_logprobs and len(tokens) <= len(ids):
            raise UserError(f"{url} {NO_PROMPT_LOGPROBS}")
        # A server that returns nothing for the prompt returns the one token that it generated.
        of_prompt = tokens[:-1][-len(ids) :]
        texts = [tokenizer.decode([token]) for token in ids[len(ids) - len(of_prompt) :]]
        if [text.strip() for text in texts] != [str(token).strip() for token in of_prompt]:
            raise UserError(f"{url} has another vocabulary than {model}: serve the same model there")
        if expected is None or not logprobs:
            continue
        pairs = zip(expected[-len(logprobs) :], logprobs, strict=True)
        differences = [abs(ours - theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
        mean = sum(differences) / max(1, len(differences))
        if not mean <= SAME_MODEL:
            raise UserError(
                f"{url} has other weights than {model}: the log-probabilities of a probe differ by {mean:.2f} on "
                "average; serve the same model there"
            )
        largest, compared = max(largest, mean), len(differences)
    if not compared:
        return f"{served.name}: the servers' tokens are the local ones; weights were not compared"
    return (
        f"{served.name}: the servers' tokens and weights are the local ones (log-probabilities of {compared} tokens of "
        f"a probe differ by {largest:.4f} on average)"
    )


async def _probe(served, ids):
    """Return (tokens, log-probabilities) of the probe and one more token from every server: two lists each."""
    body = {"model": served.name, "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    found = []
    async with open_session(served.timeout) as session:
        for url in served.urls:
            response = await send_until(session, served.timeout, send_completion, url, body)
            logprobs = response["choices"][0].get("logprobs") or {}
            found.append((logprobs.get("tokens") or [], logprobs.get("token_logprobs") or []))
    return found


def _local_logprobs(model, ids):
    """Return the local model's log-probabilities of the tokens `ids` (the first is None) and of the best next one.

    None if its weights are not on this machine or do not fit into its memory.
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
    of_prompt = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    return [None, *of_prompt, logprobs[-1].max().item()]
