"""Matrix products on a CPU: measure which way is the fastest, and prepare a model's weights for it once.

A way is one of `WAYS`. Where float32 is the fastest, a model in 16 bits computes in it throughout.
"""

import os
import time
from contextlib import suppress

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.nn.functional import linear

# Families whose attention is exactly softmax(q k^T * scaling) v with a causal mask, and whose layers are only called.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# torch's own product; weights in oneDNN's layout; 16-bit weights in float32, in oneDNN's layout.
WAYS = ("plain", "packed", "float32")
# Rows of activations in the products that are timed: a batch, and a single row.
TIMED_ROWS = (128, 1)
SECONDS = 0.2
# float32 changes results, so it must take at most this share of the time of 16 bits: a near tie never decides.
CLEARLY_FASTER = 0.8


def choose_way(model):
    """Choose one of the `WAYS` to multiply by the linear layers of a model: `plain` on a GPU.

    On a CPU the first process times the products of the largest layer, apart from the LM head, and chooses for all;
    `GRATH_DEBUG=1` prints them. A line says if `float32` would be clearly faster, but does not fit in the memory.
    """
    layers, head = _linear_layers(model), model.get_output_embeddings()
    weights = [layer.weight.detach() for layer in layers if layer is not head]
    if not weights:
        return "plain"
    chosen, state = [None], PartialState()
    if state.is_main_process:
        weight = max(weights, key=lambda weight: weight.numel())
        milliseconds = time_products(weight)
        share = {"float32": 1 / CLEARLY_FASTER}
        ways = sorted(milliseconds, key=lambda way: sum(milliseconds[way]) * share.get(way, 1))
        need = 4 * sum(weight.numel() for weight in model.parameters()) * state.num_processes
        if ways[0] == "float32" and need > psutil.virtual_memory().available:
            size = f"{need / 1e9:.1f} GB"
            print(f"Computing in 16 bits: float32 would be faster on this CPU, but {size} of memory are not free")
            del ways[0]
        chosen = ways[:1]
        if os.environ.get("GRATH_DEBUG") == "1":
            times = ", ".join(f"{way} {batch:.2f} and {row:.2f} ms" for way, (batch, row) in milliseconds.items())
            print(f"Matrix products of {str(weight.dtype)[6:]} weights: {chosen[0]}; 128 rows and 1 row take {times}")
    return broadcast_object_list(chosen)[0]


def time_products(weight):
    """Time the products of a weight (m, d) in each of the `WAYS` that this CPU and this torch have.

    What counts is the time that one thread computes, which other processes on the machine change little.

    Returns:
        dict of way -> list of milliseconds, one for each of `TIMED_ROWS`.
    """
    products = {}
    for way in WAYS if weight.itemsize == 2 else WAYS[:2]:
        dtype = torch.float32 if way == "float32" else weight.dtype
        inputs = [torch.ones((rows, weight.shape[1]), dtype=dtype) for rows in TIMED_ROWS]
        with suppress(AttributeError, RuntimeError):  # oneDNN is missing, or has no such product on this CPU
            product = make_product(weight.to(dtype), None, way)
            for x in inputs:  # the first product of a shape prepares its kernel
                product(x)
            products[way] = product, inputs
    best = {way: [float("inf")] * len(TIMED_ROWS) for way in products}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    end = time.thread_time() + SECONDS
    while time.thread_time() < end:
        for way, (product, inputs) in products.items():
            for i, x in enumerate(inputs):
                start = time.thread_time()
                product(x)
                best[way][i] = min(best[way][i], 1000 * (time.thread_time() - start))
    torch.set_num_threads(threads)
    return best


def make_product(weight, bias, way):
    """Return the function x (..., d) -> x weight^T + bias (..., m) for inference, of a weight (m, d) and a bias (m,).

    Except in the way `plain`, it has a copy of the weight.
    """
    if way == "plain":
        return lambda x: linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, TIMED_ROWS[0])
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


@torch.no_grad()
def prepare_for_inference(model):
    """Prepare a model for inference in the way that `choose_way` finds; return the model.

    A LoRA adapter is merged into float32 weights, and the base model is returned. The weights in torch's layout are
    freed, apart from the LM head's, which the input embeddings can share: the model can neither be trained nor saved.
    A model that is not of `FAMILIES` may read its layers' weights, so only its dtype changes.
    """
    way = choose_way(model)
    if way == "float32":
        model = _in_float32(model)
    if way == "plain" or model.config.model_type not in FAMILIES:
        return model
    if hasattr(model, "peft_config") and _linear_layers(model)[0].weight.dtype == torch.float32:
        model = model.merge_and_unload()
    head = model.get_output_embeddings()
    for layer in _linear_layers(model):
        layer.forward = make_product(layer.weight, layer.bias, way)
        if layer is not head:
            layer.weight = None
    return model


def prepare_for_training(model):
    """Convert a model in 16 bits to float32 if `choose_way` finds that clearly faster; return the model."""
    return _in_float32(model) if choose_way(model) == "float32" else model


def _in_float32(model):
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    note = "the 16-bit model computes in float32, which is faster on this CPU"
    base.load_warnings = [*getattr(base, "load_warnings", []), note]
    return model.float()


def _linear_layers(model):
    """List the linear layers of a model on a CPU, without a LoRA adapter's, which are in a `ModuleDict`."""
    parents = (parent for parent in model.modules() if not isinstance(parent, torch.nn.ModuleDict))
    layers = dict.fromkeys(layer for parent in parents for layer in parent.children() if type(layer) is torch.nn.Linear)
    return [layer for layer in layers if layer.weight.device.type == "cpu" and layer.weight.is_floating_point()]
