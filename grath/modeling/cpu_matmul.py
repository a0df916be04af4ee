"""Matrix products on a CPU: measure which way is the fastest, and prepare frozen weights for it once.

A way is one of `WAYS`. Products of 16-bit numbers are exact in float32, so the ways differ in the order of summation.
"""

import os
import time
from contextlib import contextmanager, suppress
from functools import partial

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.nn.functional import linear

from grath.modeling.devices import print_once

# torch's own product; weights in oneDNN's layout; 16-bit weights in float32, in oneDNN's layout.
WAYS = ("plain", "packed", "float32")
# Rows of activations in the products that are timed: a batch, and a single row.
TIMED_ROWS = (128, 1)
SECONDS = 0.2
# With fewer rows of activations, the conversion of 16-bit weights costs more than it saves.
MIN_ROWS = 64


def choose_way(model):
    """Choose one of the `WAYS` to multiply by the linear layers of a model: `plain` on a GPU.

    On a CPU the first process times the products of the largest layer, apart from the LM head, and chooses for all;
    `GRATH_DEBUG=1` prints them.
    """
    head = model.get_output_embeddings()
    weights = [layer.weight.detach() for layer in _linear_layers(model) if layer is not head]
    if not weights:
        return "plain"
    chosen = [None]
    if PartialState().is_main_process:
        weight = max(weights, key=lambda weight: weight.numel())
        milliseconds = time_products(weight)
        chosen = [min(milliseconds, key=lambda way: sum(milliseconds[way]))]
        if os.environ.get("GRATH_DEBUG") == "1":
            times = ", ".join(f"{way} {batch:.2f} and {row:.2f} ms" for way, (batch, row) in milliseconds.items())
            print(f"Matrix products of {str(weight.dtype)[6:]} weights: {chosen[0]}; 128 rows and 1 row take {times}")
    return broadcast_object_list(chosen)[0]


def time_products(weight):
    """Time the products of a weight (m, d) in each of the `WAYS` that this CPU and this torch have.

    Returns:
        dict of way -> list of milliseconds, one for each of `TIMED_ROWS`.
    """
    inputs = [torch.ones((rows, weight.shape[1]), dtype=weight.dtype) for rows in TIMED_ROWS]
    products = {}
    for way in WAYS if weight.itemsize == 2 else WAYS[:2]:
        with suppress(AttributeError, RuntimeError):  # oneDNN is missing, or has no such product on this CPU
            product = make_product(weight, None, way)
            for x in inputs:  # the first product of a shape prepares its kernel
                product(x)
            products[way] = product
    best = {way: [float("inf")] * len(inputs) for way in products}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        for way, product in products.items():
            for i, x in enumerate(inputs):
                start = time.perf_counter()
                product(x)
                best[way][i] = min(best[way][i], 1000 * (time.perf_counter() - start))
    return best


def make_product(weight, bias, way):
    """Return the function x (..., d) -> x weight^T + bias (..., m) for inference, of a weight (m, d) and a bias (m,).

    Except in the way `plain`, it has a copy of the weight.
    """
    if way == "plain":
        return lambda x: linear(x, weight, bias)
    dtype = torch.float32 if way == "float32" else weight.dtype
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), TIMED_ROWS[0])
    bias = None if bias is None else bias.to(dtype)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, bias, "none", [], "").to(x.dtype)


@torch.no_grad()
def prepare_linear_layers(model):
    """Prepare the linear layers of a model for inference in the way that `choose_way` finds; return the model.

    A LoRA adapter is merged into float32 weights, and the base model is returned. The weights in torch's layout are
    freed, apart from the LM head's, which the input embeddings can share: the model can neither be trained nor saved.
    """
    way = choose_way(model)
    if way == "plain":
        return model
    layers = _linear_layers(model)
    need = 2 * 4 * sum(layer.weight.numel() for layer in layers) * PartialState().num_processes
    if way == "float32" and need > psutil.virtual_memory().available:
        print_once("The memory is too small for the weights in float32: they are converted for each product")
        for layer in layers:
            layer.forward = partial(fp32_linear, layer)
        return model
    in_fp32 = way == "float32" or all(layer.weight.dtype == torch.float32 for layer in layers)
    if in_fp32 and hasattr(model, "peft_config"):
        model = merge_lora(model)
        layers = _linear_layers(model)
    head = model.get_output_embeddings()
    for layer in layers:
        layer.forward = make_product(layer.weight, layer.bias, way)
        if layer is not head:
            layer.weight = None
    return model


@contextmanager
def fp32_cpu_matmul(model):
    """Train with float32 products of the frozen 16-bit linear layers, if `choose_way` finds them faster.

    No second copy of the weights is kept: they are converted for each product of 64 or more rows.
    """
    layers = [layer for layer in _linear_layers(model) if layer.weight.itemsize == 2 and not layer.weight.requires_grad]
    converted = layers if layers and choose_way(model) == "float32" else []
    for layer in converted:
        layer.forward = partial(fp32_linear, layer)
    try:
        yield
    finally:
        for layer in converted:
            del layer.forward


def _linear_layers(model):
    """List the linear layers of a model on a CPU, without a LoRA adapter's, which are in a `ModuleDict`."""
    parents = (parent for parent in model.modules() if not isinstance(parent, torch.nn.ModuleDict))
    layers = dict.fromkeys(layer for parent in parents for layer in parent.children() if type(layer) is torch.nn.Linear)
    return [layer for layer in layers if layer.weight.device.type == "cpu" and layer.weight.is_floating_point()]


def fp32_linear(layer, x):
    """Apply a linear layer (m, d) to x (..., d); the weights are converted to float32 for `MIN_ROWS` rows or more."""
    if x.numel() < MIN_ROWS * x.shape[-1]:
        return linear(x, layer.weight, layer.bias)
    return _Float32Product.apply(x, layer.weight, layer.bias)


class _Float32Product(torch.autograd.Function):
    """The product in float32. Autograd itself would keep every converted weight until the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return (gradient.float() @ weight.float()).to(gradient.dtype), None, None


def merge_lora(model):
    """Merge the LoRA adapter of a `PeftModel` into float32 weights, and return the base model."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.get_base_layer().float()
    return model.merge_and_unload()
