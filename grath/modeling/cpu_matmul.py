"""Matrix products on a CPU: which way is the fastest, by a measurement, and frozen weights prepared for it once.

A way is one of `WAYS`. Products of 16-bit numbers are exact in float32, so the ways differ in the order of summation.
"""

import time
from contextlib import contextmanager, suppress
from functools import cache

from grath.modeling.devices import print_once
from grath.modeling.lora import has_other_adapter, merge_lora

# torch's own product; weights in oneDNN's layout; 16-bit weights in float32, in oneDNN's layout.
WAYS = ("plain", "packed", "float32")
# Rows of activations in the products that are timed: a batch, and a single row.
TIMED_ROWS = (128, 1)
SECONDS_PER_WAY = 0.03
# Weight rows converted to float32 at a time, where all weights are not kept in float32.
CHUNK = 1024
# With fewer rows of activations, this conversion costs more than it saves.
MIN_ROWS = 64


def choose_way(model):
    """Choose one of the `WAYS` to multiply by the linear layers of a model, and print it: `plain` on a GPU.

    On a CPU the first process times the products of the largest layer but the LM head, and chooses for all processes.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    head, state = model.get_output_embeddings(), PartialState()
    weights = [layer.weight.detach() for layer in _frozen_linear_layers(model) if layer is not head]
    if not weights:
        return "plain"
    chosen = [None]
    if state.is_main_process:
        weight = max(weights, key=lambda weight: weight.numel())
        milliseconds = time_products(weight)
        chosen = [min(milliseconds, key=lambda way: sum(milliseconds[way]))]
        times = ", ".join(f"{way} {batch:.2f} and {row:.2f} ms" for way, (batch, row) in milliseconds.items())
        print(f"Matrix products of {str(weight.dtype)[6:]} weights: {chosen[0]}; 128 rows and 1 row take {times}")
    return broadcast_object_list(chosen)[0]


def time_products(weight):
    """Time the products of a weight (m, d) in each of the `WAYS` that this CPU and this torch have.

    Returns:
        dict of way -> list of milliseconds, one for each of `TIMED_ROWS`.
    """
    import torch

    inputs = [torch.ones((rows, weight.shape[1]), dtype=weight.dtype) for rows in TIMED_ROWS]
    products = {}
    for way in WAYS if weight.itemsize == 2 else WAYS[:2]:
        with suppress(AttributeError, RuntimeError):  # oneDNN is missing, or has no such product on this CPU
            product = make_product(weight, None, way)
            for x in inputs:  # the first product of a shape prepares its kernel
                product(x)
            products[way] = product
    milliseconds = {way: [] for way in products}
    for x in inputs:
        best = dict.fromkeys(products, float("inf"))
        end = time.perf_counter() + SECONDS_PER_WAY * len(products)
        while time.perf_counter() < end:
            for way, product in products.items():
                start = time.perf_counter()
                product(x)
                best[way] = min(best[way], time.perf_counter() - start)
        for way, seconds in best.items():
            milliseconds[way].append(1000 * seconds)
    return milliseconds


def make_product(weight, bias, way):
    """Return a function x (..., d) -> x weight^T + bias (..., m) for inference.

    Args:
        weight: (m, d).
        bias: (m,) or None.
        way: one of `WAYS`. A copy of the weight is made, except in `plain`.
    """
    import torch

    if way == "plain":
        return lambda x: torch.nn.functional.linear(x, weight, bias)
    dtype = torch.float32 if way == "float32" else weight.dtype
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), TIMED_ROWS[0])
    bias = None if bias is None else bias.to(dtype)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, bias, "none", [], "").to(x.dtype)


def prepare_linear_layers(model):
    """Prepare the linear layers of a model for inference in the way that `choose_way` finds; return the model.

    A LoRA adapter is merged into float32 weights, and the base model is returned. The weights in torch's layout are
    freed, but the LM head's, which the input embeddings can share: the model can neither be trained nor saved. A model
    with another kind of adapter is left as it is.
    """
    import psutil
    import torch
    from accelerate import PartialState

    adapted = hasattr(model, "peft_config")
    way = "plain" if adapted and has_other_adapter(model) else choose_way(model)
    if way == "plain":
        return model
    layers = _frozen_linear_layers(model)
    need = 2 * 4 * sum(layer.weight.numel() for layer in layers) * PartialState().num_processes
    if way == "float32" and need > psutil.virtual_memory().available:
        print_once("The memory is too small for the weights in float32: they are converted for each product")
        _convert_for_each_product(layers)
        return model
    with torch.no_grad():
        if adapted and (way == "float32" or all(layer.weight.dtype == torch.float32 for layer in layers)):
            model = merge_lora(model)
            layers = _frozen_linear_layers(model)
        head = model.get_output_embeddings()
        for layer in layers:
            layer.forward = make_product(layer.weight.detach(), layer.bias, way)
            if layer is not head:
                layer.weight = None
    return model


@contextmanager
def fp32_cpu_matmul(model):
    """Train with float32 products of the frozen 16-bit linear layers, if `choose_way` finds them faster.

    No second copy of the weights is kept: they are converted for each product of 64 or more rows.
    """
    layers = [layer for layer in _frozen_linear_layers(model) if layer.weight.itemsize == 2]
    converted = layers if layers and choose_way(model) == "float32" else []
    _convert_for_each_product(converted)
    try:
        yield
    finally:
        for layer in converted:
            del layer.forward


def _frozen_linear_layers(model):
    """List the linear layers of a model on a CPU. The matrices of a LoRA adapter are in a `ModuleDict` of theirs."""
    from torch.nn import Linear, ModuleDict

    parents = (parent for parent in model.modules() if not isinstance(parent, ModuleDict))
    layers = dict.fromkeys(layer for parent in parents for layer in parent.children() if type(layer) is Linear)
    return [layer for layer in layers if layer.weight.device.type == "cpu" and layer.weight.is_floating_point()]


def _convert_for_each_product(layers):
    """Let linear layers convert their weights to float32, a chunk at a time, for each product of `MIN_ROWS` or more."""
    import torch

    def converting(layer, original):
        def forward(x):
            trained = layer.weight.requires_grad and torch.is_grad_enabled()
            if trained or x.numel() < MIN_ROWS * x.shape[-1]:
                return original(x)
            return _fp32_product()(x, layer.weight, layer.bias)

        return forward

    for layer in layers:
        layer.forward = converting(layer, layer.forward)


@cache
def _fp32_product():
    """Return `product(x, weight, bias)` with float32 products, for x (..., d), weight (m, d) and bias (m) or None."""
    import torch
    from torch.nn.functional import linear

    class Float32Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            ctx.save_for_backward(weight)
            chunks = weight.split(CHUNK)
            biases = [None] * len(chunks) if bias is None else bias.float().split(CHUNK)
            x32 = x.float()
            products = (linear(x32, chunk.float(), own) for chunk, own in zip(chunks, biases, strict=True))
            return torch.cat([product.to(x.dtype) for product in products], -1)

        @staticmethod
        def backward(ctx, gradient):
            chunks = ctx.saved_tensors[0].split(CHUNK)
            parts = zip(gradient.split(CHUNK, -1), chunks, strict=True)
            return sum(part.float() @ chunk.float() for part, chunk in parts).to(gradient.dtype), None, None

    return Float32Product.apply
