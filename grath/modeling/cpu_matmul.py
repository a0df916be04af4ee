"""Matrix products on a CPU: which way is the fastest, by a measurement, and frozen weights prepared for it once.

A way is one of `WAYS`. Products of 16-bit numbers are exact in float32, so only the order of summation differs between
them. The output has the dtype of the input in each.
"""

import json
import os
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from grath.common.files import atomic_write_text, read_json
from grath.common.paths import CPU_PRODUCTS_VARIABLE
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
    """Choose how to multiply by the linear layers of a model: by time on a CPU, `plain` elsewhere.

    The products of the largest layer but the LM head are timed in each way, and the choice is printed. If the
    environment variable `CPU_PRODUCTS_VARIABLE` names a file, the choice is read from it or written to it, so that the
    stages of a run make the same one.

    Returns:
        str, one of `WAYS`.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    head = model.get_output_embeddings()
    weights = [layer.weight.detach() for layer in _frozen_linear_layers(model) if layer is not head]
    if not weights:
        return "plain"
    state = PartialState()
    way = [_recorded_way(max(weights, key=lambda weight: weight.numel())) if state.is_main_process else None]
    if state.num_processes > 1:
        broadcast_object_list(way)
    return way[0]


def _recorded_way(weight):
    dtype, file = str(weight.dtype).removeprefix("torch."), os.environ.get(CPU_PRODUCTS_VARIABLE)
    key = f"{dtype} {'x'.join(map(str, weight.shape))}"
    recorded = read_json(Path(file), "record of matrix products") if file and Path(file).exists() else {}
    if key in recorded and _is_available(weight, recorded[key]["way"]):
        return recorded[key]["way"]
    milliseconds = time_products(weight)
    way = min(milliseconds, key=lambda way: sum(milliseconds[way]))
    times = ", ".join(f"{way} {batch:.2f} and {row:.2f} ms" for way, (batch, row) in milliseconds.items())
    print_once(f"Matrix products of {dtype} weights: {way}; 128 rows and 1 row take {times}")
    if file:
        recorded[key] = {"way": way, "milliseconds": milliseconds}
        atomic_write_text(Path(file), json.dumps(recorded, indent=2) + "\n")
    return way


def time_products(weight):
    """Time the products of a weight (m, d) in each of the `WAYS` that this CPU has.

    Returns:
        dict of way -> list of milliseconds, one for each of `TIMED_ROWS`.
    """
    import torch

    inputs = [torch.ones((rows, weight.shape[1]), dtype=weight.dtype) for rows in TIMED_ROWS]
    ways = WAYS[:2] if weight.dtype == torch.float32 else WAYS
    products = {way: make_product(weight, None, way) for way in ways if _is_available(weight, way)}
    for product in products.values():
        for x in inputs:
            product(x)
    found = {way: [] for way in products}
    for x in inputs:
        best = dict.fromkeys(products, float("inf"))
        end = time.perf_counter() + SECONDS_PER_WAY * len(products)
        while time.perf_counter() < end:
            for way, product in products.items():
                start = time.perf_counter()
                product(x)
                best[way] = min(best[way], time.perf_counter() - start)
        for way, seconds in best.items():
            found[way].append(round(1000 * seconds, 4))
    return found


def _is_available(weight, way):
    """Whether this CPU and this torch have the products of a weight."""
    import torch

    if way == "plain" or not torch.backends.mkldnn.is_available():
        return way == "plain"
    try:
        make_product(weight[:16], None, way)(torch.ones((1, weight.shape[1]), dtype=weight.dtype))
    except RuntimeError:  # oneDNN has no such product on this CPU
        return False
    return True


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
    """Prepare the linear layers of a model for inference in the way that `choose_way` finds.

    Where the weights are in float32 then, a LoRA adapter is merged into them. The weights in torch's layout are freed
    (but the LM head's, which can be the input embeddings'), so the model can neither be trained nor saved. A model with
    another kind of adapter is left as it is.

    Returns:
        The model, or the base model of a `PeftModel` whose adapter was merged.
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
        for layer in layers:
            _convert_for_each_product(layer)
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
    import torch

    layers = [layer for layer in _frozen_linear_layers(model) if layer.weight.dtype != torch.float32]
    if not layers or choose_way(model) != "float32":
        layers = []
    for layer in layers:
        _convert_for_each_product(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _frozen_linear_layers(model):
    """List the linear layers of a model on a CPU. The matrices of a LoRA adapter are in a `ModuleDict` of theirs."""
    import torch

    layers = [
        layer
        for parent in model.modules()
        if not isinstance(parent, torch.nn.ModuleDict)
        for layer in parent.children()
        if type(layer) is torch.nn.Linear and layer.weight.device.type == "cpu" and layer.weight.is_floating_point()
    ]
    return list(dict.fromkeys(layers))


def _convert_for_each_product(layer):
    import torch

    original, product = layer.forward, _fp32_product()

    def forward(x):
        trained = layer.weight.requires_grad and torch.is_grad_enabled()
        if trained or x.numel() < MIN_ROWS * x.shape[-1]:
            return original(x)
        return product(x, layer.weight, layer.bias)

    layer.forward = forward


@cache
def _fp32_product():
    """Return `product(x, weight, bias)` with float32 products, for x (..., d), weight (m, d) and bias (m) or None."""
    import torch
    from torch.nn.functional import linear

    def chunks(weight):
        return ((at, weight[at : at + CHUNK].float()) for at in range(0, len(weight), CHUNK))

    class Float32Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            ctx.save_for_backward(weight)
            x32 = x.float()
            out = x.new_empty((*x.shape[:-1], len(weight)))
            for at, chunk in chunks(weight):
                out[..., at : at + CHUNK] = linear(x32, chunk, None if bias is None else bias[at : at + CHUNK].float())
            return out

        @staticmethod
        def backward(ctx, gradient):
            (weight,) = ctx.saved_tensors
            total = sum(gradient[..., at : at + CHUNK].float() @ chunk for at, chunk in chunks(weight))
            return total.to(gradient.dtype), None, None

    return Float32Product.apply
