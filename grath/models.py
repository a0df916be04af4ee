"""Loading models and tokenizers: hub names, model folders and LoRA adapters' folders, in every precision."""

import hashlib
import json
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from grath.cli import UserError, explain_system_error, first_line, in_root, read_json
from grath.devices import check_devices

PRECISIONS = ("auto", "fp32", "fp16", "bf16", "int8", "nf4", "fp4")
# What `auto` means: (on a CUDA GPU, on a CPU). The paper loads in 8 bit to generate and in 4 bit to train.
AUTO = {"pairs": ("int8", "bf16"), "dpo": ("fp4", "bf16"), "scores": ("fp16", "fp32")}
ADAPTER = "adapter_model.safetensors"
# What a training tells of itself, beside its adapter.
RECORD = "grath.json"
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def join_processes():
    """accelerate's `PartialState`. Processes wait a day for the slowest of them, not torch's ten minutes."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))


def resolve_precision(precision, stage):
    """What `--precision` means on this machine for a `stage` of `AUTO`.

    Raises:
        UserError: 8 or 4 bit is asked for, and bitsandbytes is not there; or the devices are not as they should be.
    """
    import torch

    check_devices()
    if precision == "auto":
        precision = AUTO[stage][0 if torch.cuda.is_available() else 1]
    if precision not in DTYPES:
        from transformers.utils import is_bitsandbytes_available

        if not is_bitsandbytes_available():
            raise UserError(f"--precision {precision} needs the package bitsandbytes: pip install bitsandbytes")
    return precision


def sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split_adapter(name):
    """Tell an adapter's folder from a model.

    Returns:
        (base, adapter): the base model's name and the adapter's folder, or (name, None) for a model. A local folder
        is given as an absolute path, so that what is recorded beside an adapter holds from every working directory.
    """
    name = in_root(str(name))
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name, None
    config = folder / "adapter_config.json"
    if not config.is_file():
        return str(folder.resolve()), None
    try:
        base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise UserError(f"{config} names no base model: it is no LoRA adapter's configuration")
    if not (folder / ADAPTER).is_file():
        raise UserError(f"{folder} has no {ADAPTER}: the adapter is not complete")
    return in_root(base), str(folder.resolve())


def load_tokenizer(name, tokenizer_name=None):
    """The tokenizer of a model, or of an adapter's base, with a padding token."""
    from transformers import AutoTokenizer

    source = in_root(tokenizer_name) if tokenizer_name else split_adapter(name)[0]
    tokenizer = _load(AutoTokenizer, source, "tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name, precision, trainable=False):
    """A causal language model, with its LoRA adapter if `name` is an adapter's folder.

    Args:
        name: hub name, model folder or adapter folder.
        precision: what `resolve_precision` gave.
        trainable: whether the adapter's weights take gradients.

    Returns:
        `PreTrainedModel`, or `PeftModel` around it, on this process's device.

    Raises:
        UserError: there is no such model, or the adapter does not belong to its base.
    """
    import torch
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM

    base, adapter = split_adapter(name)
    options = {"use_safetensors": True}
    if precision in DTYPES:
        options["dtype"] = getattr(torch, DTYPES[precision])
    else:
        # Training runs under autocast, which takes 16-bit weights of its own kind only.
        options["dtype"] = torch.float16 if precision == "int8" and not trainable else _compute_dtype()
        options["quantization_config"] = _quantization(precision)
    device = PartialState().device
    if device.type != "cpu" or precision not in DTYPES:
        # Weights go straight to the device, not through main memory once for each process.
        options["device_map"] = {"": device}
    check_weights(base)
    model = _load(AutoModelForCausalLM, base, "model", **options)
    if adapter:
        from peft import PeftModel

        try:
            # With no device named, PEFT opens a context on the first GPU in every process.
            model = PeftModel.from_pretrained(model, adapter, is_trainable=trainable, torch_device=str(device))
        except (RuntimeError, ValueError, OSError) as error:
            if explain_system_error(error):
                raise
            raise UserError(f"the adapter {adapter} does not fit its base {base}: {first_line(error)}") from error
    return model


def check_model(name):
    """Raise `UserError` unless the configuration of a model, or of an adapter's base, can be had, and its weights."""
    from transformers import AutoConfig

    base = split_adapter(name)[0]
    _load(AutoConfig, base, "model")
    check_weights(base)


def check_weights(base):
    """Raise `UserError` if `base` is a model folder without weights as safetensors, or with some of them only."""
    folder = Path(base)
    index = folder / "model.safetensors.index.json"
    if (folder / "config.json").is_file() and not any(folder.glob("*.safetensors")):
        raise UserError(f"{base} holds no weights as safetensors, and pickled ones are not read: convert them first")
    if index.is_file():
        shards = read_json(index, "index of weight files").get("weight_map")
        if not isinstance(shards, dict):
            raise UserError(f"{index} is damaged: it names no weight files")
        shards = set(shards.values())
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing:
            raise UserError(
                f"{base} lacks {len(missing)} of {len(shards)} weight files, {missing[0]} first: fetch them again"
            )


def fingerprint(name, prompts, precision, max_new_tokens):
    """A hash of all that a run's kept replies must share: the weights, the prompts' tokens, precision and length.

    In fp32 greedy completions depend on nothing else. In int8 they depend on the batch as well, whose size may change.
    """
    base, adapter = split_adapter(name)
    parts = [base, precision, str(max_new_tokens), json.dumps(prompts)]
    if adapter:
        parts.append(sha256(Path(adapter) / ADAPTER))
    return hash_of(parts + weight_files(base))


def weight_files(folder):
    """A line on each weight file of a model folder: name, size, time of change. Its bytes would take too long."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]


def hash_of(lines):
    """A hash, in hexadecimal, of lines of text."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@contextmanager
def float32_products(model):
    """Let the frozen 16-bit linear layers of `model` multiply in float32 on an x86 CPU without 16-bit matrix units.

    There, a float32 product is up to 1.8 times as fast as a bfloat16 one from 64 rows on, the conversion of the weights
    included. Products of 16-bit numbers are exact in float32, so only the order of the sums differs; what comes out is
    rounded to 16 bit as before. No second copy of the weights is kept.
    """
    import torch

    slow = torch.backends.cpu.get_cpu_capability().startswith("AVX") and not torch.cpu._is_amx_tile_supported()
    layers = [
        layer
        for layer in model.modules()
        if slow
        and type(layer) is torch.nn.Linear
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype in (torch.bfloat16, torch.float16)
    ]
    product = _float32_product() if layers else None

    def forward_of(layer):
        usual = layer.forward

        def forward(x):
            learns = layer.weight.requires_grad and torch.is_grad_enabled()
            few = x.numel() < 64 * x.shape[-1]
            return usual(x) if few or learns else product(x, layer.weight, layer.bias)

        return forward

    for layer in layers:
        layer.forward = forward_of(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _float32_product():
    """`linear` of x (..., d), weight (m, d) and bias (m), with 1,024 rows of the weight in float32 at a time."""
    import torch
    from torch.nn.functional import linear

    def slices(weight):
        return ((at, weight[at : at + 1024].float()) for at in range(0, len(weight), 1024))

    class Float32Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            ctx.save_for_backward(weight)
            wide = x.float()
            out = x.new_empty((*x.shape[:-1], len(weight)))
            for at, part in slices(weight):
                out[..., at : at + 1024] = linear(wide, part, None if bias is None else bias[at : at + 1024].float())
            return out

        @staticmethod
        def backward(ctx, gradient):
            (weight,) = ctx.saved_tensors
            total = sum(gradient[..., at : at + 1024].float() @ part for at, part in slices(weight))
            return total.to(gradient.dtype), None, None

    return Float32Product.apply


def stop_ids(model, tokenizer):
    """Token ids that end a completion: the tokenizer's EOS and those of the model's generation settings."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({tokenizer.eos_token_id, *configured} - {None})


def _compute_dtype():
    import torch

    bf16 = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float16


def _quantization(precision):
    from transformers import BitsAndBytesConfig

    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=precision, bnb_4bit_compute_dtype=_compute_dtype())


def _load(auto_class, source, what, **options):
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{source} is a folder without a {what} (no config.json)")
    try:
        # Said in so many words, or transformers asks at the terminal whether a model's own code may run.
        return auto_class.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # the hub client, the file readers and the model classes each raise their own kinds
        if explain_system_error(error):
            raise
        if "trust_remote_code" in str(error):
            raise UserError(f"{source} needs code of its own, which is never run: choose another model") from error
        whole = " (is every file of it whole?)" if folder.is_dir() else ""
        raise UserError(f"cannot load the {what} {source}: {first_line(error)}{whole}") from error
