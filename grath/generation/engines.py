"""The engines that write completions, behind one function: on this machine, or on inference servers."""

from contextlib import contextmanager
from functools import partial

import torch
from accelerate import PartialState

from grath.common.errors import UserError
from grath.generation.cache import common_prefix_length
from grath.generation.engine import generate_shared_prefix, select_generate_fn
from grath.generation.hf import generate_hf
from grath.modeling.loading import eos_token_ids, load_for_inference
from grath.modeling.memory import USABLE, fitting_rows, read_shape
from grath.modeling.precision import SERVER
from grath.serving.completions import generate_server
from grath.serving.served import compare_with_local, serve

# Rows of a batch on a CPU, and where the engine does not support the model.
BATCH_SIZE = 64


@contextmanager
def open_engine(engine, model, tokenizer, precision, max_new_tokens, batch_size=None, servers=(), timeout=600):
    """Load a model, or find it on servers, for greedy completions.

    Args:
        engine: `shared_prefix`, `generate` or `server`.
        model: hub name, model folder or adapter folder.
        tokenizer: its tokenizer.
        precision: a precision from `resolve_precision`; not used on servers.
        max_new_tokens: maximum number of tokens of a completion.
        batch_size: rows of a batch, or requests in flight at each server; None: `select_rows`, or the server's.
        servers: addresses for the engine `server`.
        timeout: seconds to wait for a server that does not respond.

    Yields:
        (generate, window): a function (prompts as lists of token ids, on_done), where on_done is called for each
        completion with the index of its prompt, its text and its number of tokens; and the context window in tokens, or
        None if it is not known.
    """
    if engine == SERVER:
        if not servers:
            raise UserError("--engine server needs --server_url http://host:port")
        if PartialState().num_processes > 1:
            raise UserError("--engine server runs in one process: the servers share the questions")
        with serve(model, servers, timeout) as served:
            print(compare_with_local(served, model, tokenizer), flush=True)
            yield partial(generate_on_servers, served, model, tokenizer, max_new_tokens, batch_size), served.window
        return
    loaded = load_for_inference(model, precision)
    generate = partial(generate_here, engine, loaded, precision, tokenizer, max_new_tokens, batch_size)
    yield generate, getattr(loaded.config, "max_position_embeddings", None)


def generate_on_servers(served, model, tokenizer, max_new_tokens, batch_size, prompts, on_done):
    """Generate greedy completions on servers, as the function that `open_engine` yields.

    Args:
        served: what `serve` yielded for `model`.
    """
    print(f"Asking {len(prompts)} questions ({', '.join(served.urls)})", flush=True)
    generate_server(served, prompts, max_new_tokens, eos_token_ids(model, tokenizer), on_done, batch_size)


def generate_here(engine, model, precision, tokenizer, max_new_tokens, batch_size, prompts, on_done):
    """Generate greedy completions with a loaded model, as the function that `open_engine` yields."""
    generate_fn, reason, name = generate_hf, None, "generate"
    if engine == "shared_prefix":
        generate_fn, reason = select_generate_fn(model, prompts, max_new_tokens)
    if generate_fn is generate_shared_prefix:
        name, batch_size = "shared_prefix", batch_size or select_rows(model, precision, prompts, max_new_tokens)
    batch_size = batch_size or BATCH_SIZE
    state = PartialState()
    if reason:
        state.print(f"Falling back to plain batched generation: {reason}")
    state.print(f"Asking {len(prompts)} questions ({name}, {model.device}, batches of {batch_size})")

    def done(index, ids):
        on_done(index, tokenizer.decode(ids, skip_special_tokens=True), len(ids))

    generate_fn(model, prompts, max_new_tokens, batch_size, eos_token_ids(model, tokenizer), done)


def select_rows(model, precision, prompts, max_new_tokens):
    """Return the engine's rows: as many as the GPU's memory takes, because a step takes hardly longer for more of them.

    Args:
        prompts: list of lists of token ids.
    """
    if model.device.type != "cuda":
        return BATCH_SIZE
    prefix = common_prefix_length(prompts)
    own = max(map(len, prompts)) - prefix + max_new_tokens
    room = USABLE * torch.cuda.get_device_properties(model.device).total_memory
    return fitting_rows(read_shape(model.config.to_dict()), precision, room, prefix=prefix, own=own) or 1
