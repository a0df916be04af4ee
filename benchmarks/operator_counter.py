"""Count operators, FLOPs, bytes and synchronizations of a model's forward passes; compute their seconds on GPUs."""

import weakref
from dataclasses import dataclass, field

# Dense TFLOP/s in 16 bit and in float32 and TB/s, from NVIDIA's data sheets (H100 SXM, A100 SXM, GeForce RTX 4090),
# times the share that large matrix products and copies are assumed to reach.
GPUS = {
    "H100 80 GB": (0.65 * 989, 0.7 * 67, 0.8 * 3.35),
    "A100 80 GB": (0.75 * 312, 0.8 * 19.5, 0.8 * 2.04),
    "RTX 4090 24 GB": (0.85 * 165, 0.7 * 82.6, 0.8 * 1.01),
}
# Microseconds of the host for an operator. Forward: measured beside an H200, where a step of the engine has 1,597
# kernels and takes 38 ms (docs/hardware.md). Backward passes run in C++: assumed.
HOST_US = {"forward": 24, "backward": 6}


# What runs between two forward passes belongs to the first.
@dataclass
class Forward:
    """A forward pass: tokens, operators, host synchronizations, FLOPs, and seconds of host and GPUs."""

    tokens: int = 0
    launches: int = 0
    host_syncs: int = 0
    flops: float = 0.0
    host: float = 0.0
    gpu: dict = field(default_factory=lambda: dict.fromkeys(GPUS, 0.0))

    def plus(self, factor, other):
        """Return this pass and `factor` times another: the same pass of models with other numbers of layers."""
        add = lambda a, b: a + factor * b  # noqa: E731
        gpu = {name: add(seconds, other.gpu[name]) for name, seconds in self.gpu.items()}
        names = ("launches", "host_syncs", "flops", "host")
        return Forward(self.tokens, *(add(getattr(self, name), getattr(other, name)) for name in names), gpu)


@dataclass
class Count:
    """What a stage did."""

    questions: int
    forwards: list = field(default_factory=list)
    peak_bytes: int = 0
    tokenizer_seconds: float = 0.0

    def total(self, name):
        return sum(getattr(forward, name) for forward in self.forwards)

    def seconds(self, gpu):
        """Return the seconds of all forward passes, each as long as the slower one of host and GPU."""
        return sum(max(forward.host, forward.gpu[gpu]) for forward in self.forwards)


def counter(count, model, width=1, products=None):
    """Return two context managers that count the operators of a model into `count`.

    Args:
        width: of a narrow model, how much wider the real one is: a factor for the bytes of the operators.
        products: of a narrow model, a function of a GPU and of tokens that returns the seconds of the real products.
    """
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    aten = torch.ops.aten
    current = Forward()  # what runs before the first forward pass

    def begin(*_):
        nonlocal current
        current = Forward()
        count.forwards.append(current)

    def embed(module, args):
        # These are the tokens that are computed: `share_prompts` has packed them.
        current.tokens = args[0].numel()
        if products:
            current.gpu = {gpu: seconds + products(gpu, current.tokens) for gpu, seconds in current.gpu.items()}
        python.shape, python.in_flight = args[0].shape, True

    model.base_model.register_forward_pre_hook(begin)
    model.get_input_embeddings().register_forward_pre_hook(embed)

    def tensors_in(values):
        for value in values:
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, (list, tuple)):
                yield from tensors_in(value)

    class Operators(TorchDispatchMode):
        live, storages, counting = 0, set(), True

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if not self.counting:
                return out
            name = func._overloadpacket
            if name in (aten._local_scalar_dense, aten.nonzero):
                current.host_syncs += 1
            inputs, outputs = list(tensors_in(args)), list(tensors_in([out]))
            known = {tensor.untyped_storage()._cdata for tensor in inputs}
            new = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in known]
            for tensor in new:
                self.follow(tensor.untyped_storage())
            # A view launches nothing, and neither does memory without a value.
            if func._schema.is_mutable or (new and "empty" not in func._schema.name):
                flops = 0
                if name is aten.linear:  # in inference mode it is one operator, which torch's registry lacks
                    flops = 2 * inputs[0].numel() * inputs[1].shape[0]
                elif name in flop_registry and not products:
                    flops = flop_registry[name](*args, **(kwargs or {}), out_val=out)
                moved = width * sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, *outputs))
                self.launch(flops, moved, any(tensor.dtype == torch.float32 for tensor in inputs))
            return out

        def launch(self, flops, moved, single):
            backward = torch._C._current_graph_task_id() != -1
            current.launches += 1
            current.flops += flops
            current.host += HOST_US["backward" if backward else "forward"] * 1e-6
            for gpu, (half, full, bandwidth) in GPUS.items():
                current.gpu[gpu] += max(flops / (full if single else half), moved / bandwidth) * 1e-12

        def follow(self, storage):
            """Count the memory of a tensor until it is freed."""
            if storage._cdata not in self.storages:
                self.storages.add(storage._cdata)
                self.live += storage.nbytes()
                count.peak_bytes = max(count.peak_bytes, self.live)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())

        def free(self, key, size):
            self.storages.discard(key)
            self.live -= size

    class Python(TorchFunctionMode):
        """Answers what needs values, which the `meta` device does not have."""

        shape, uploaded, in_flight = None, None, False
        answer = staticmethod(lambda shape: torch.zeros(shape).tolist())

        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if func is torch.Tensor.tolist:
                current.host_syncs += 1
                self.in_flight = False
                if args[0].device.type == "meta":
                    with torch._C.DisableTorchFunction():
                        return self.answer(tuple(args[0].shape))
            if func is torch.tensor:
                self.uploaded = args[0]
                # A transfer from ordinary memory waits for the kernels before it.
                current.host_syncs += self.in_flight and "device" in kwargs
            if func is torch.nn.functional.scaled_dot_product_attention and args[0].device.type == "meta":
                # On a GPU, causal attention is one kernel.
                kernel = aten._scaled_dot_product_flash_attention
                return kernel(*args, 0.0, kwargs["is_causal"], scale=kwargs["scale"])[0]
            return func(*args, **kwargs)

    python = Python()
    return Operators(), python
