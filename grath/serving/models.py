"""The models of inference servers, and LoRA adapters that are loaded there while they run."""

import json

from grath.common.errors import UserError
from grath.serving.client import TRY_AGAIN, Refused, Unavailable, send, send_until

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
# The last option keeps LoRA off the LM head, where vLLM 0.32 fails at several requests for log-probabilities at once.
START = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and `vllm serve BASE --enable-lora --lora-target-modules q_proj k_proj v_proj`"
)


async def served_models(session, url, timeout):
    """List the models of a server: list of dicts with at least `id`."""
    text = await send_until(session, timeout, send, f"{url}/v1/models")
    try:
        models = json.loads(text)["data"]
        if all(isinstance(model["id"], str) for model in models):
            return models
    except (ValueError, TypeError, LookupError):
        pass
    raise UserError(f"{url}/v1/models lists no models: is it a server with the OpenAI completions API?")


async def model_names(session, url, timeout):
    """Return the names of the models and adapters that a server has: set of str."""
    return {model["id"] for model in await served_models(session, url, timeout)}


async def load_adapter(session, url, name, folder, timeout):
    """Load a LoRA adapter on a server by vLLM's API, unless the server has it. Return whether it was loaded now.

    Raises:
        Refused: the server cannot; the message says how to start it so that it can.
    """
    if name in await model_names(session, url, timeout):
        return False
    # vLLM answers 500 where it cannot use the adapter.
    try_again = [status for status in TRY_AGAIN if status != 500]
    try:
        body = {"lora_name": name, "lora_path": folder}
        await send_until(session, timeout, send, f"{url}{LOAD}", body, try_again)
    except Refused as error:
        if name in await model_names(session, url, timeout):  # another program has loaded it meanwhile
            return False
        raise Refused(
            f"{error}: the server must see the folder {folder}, and be started with {START}, with a --max-lora-rank of "
            "at least the adapter's; or serve the merged model that `python -m grath.export` writes",
            error.status,
        ) from None
    return True


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
    try:
        await send(session, f"{url}{UNLOAD}", {"lora_name": name})
    except (Unavailable, Refused):
        return
