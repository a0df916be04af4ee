"""Load models and tokenizers from hub names, model folders and LoRA adapter folders, in every precision."""

from functools import cache
from pathlib import Path

from grath.common.errors import UserError, explain_system_error, first_line, printable
from grath.common.files import fits, read_json
from grath.common.layout import ADAPTER_CONFIG, resolve_local
from grath.modeling.adapters import check_adapter, check_layers
from grath.modeling.devices import print_once, this_device
from grath.modeling.precision import DTYPES, compute_dtype


def resolve_base_and_adapter(name):
    """Resolve the name of a model or the folder of a LoRA adapter.

    Returns:
        (base, adapter): the base model's name and the adapter's folder, or (name, None) for a model. A local folder
        becomes an absolute path, so that a record next to an adapter is valid from every working directory.

    Raises:
        UserError: the adapter is not one that we accept, see `grath.modeling.adapters`; or its base is not named or
            not there.
    """
    name = resolve_local(str(name))
    folder = Path(name)
    if not folder.is_dir():
        _check_hub_model(name)
        return name, None
    if not (folder / ADAPTER_CONFIG).is_file():
        return str(folder.resolve()), None
    base = resolve_local(check_adapter(folder)["base_model_name_or_path"])
    if (Path(base) / ADAPTER_CONFIG).is_file():
        raise UserError(f"{base}, the base of the adapter {folder}, is an adapter itself: merge that one first")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UserError(f"the base of the adapter {folder} is not in {base}: put it back there, or link it")
    return resolve_base_and_adapter(base)[0], str(folder.resolve())


@cache
def _check_hub_model(name):
    """Raise `UserError` if a hub name is that of an adapter, as far as the hub or its local copy says."""
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(name, ADAPTER_CONFIG)
    except Exception:  # the hub client raises many kinds of errors; loading the model says what is wrong
        return
    raise UserError(f"{name} is a LoRA adapter: run `hf download {name} --local-dir FOLDER`, and give the folder")


def load_tokenizer(name, tokenizer_name=None):
    """Load the tokenizer of a model, or of an adapter's base model, and give it a padding token if it has none."""
    source = resolve_local(tokenizer_name) if tokenizer_name else resolve_base_and_adapter(name)[0]
    tokenizer = _load("AutoTokenizer", source)
    if not fits(tokenizer.model_max_length, int | float):
        raise UserError(f"the configuration of the tokenizer {source} is damaged: model_max_length is not a number")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokenizer(tokenizer):
    """Raise `UserError` if a tokenizer adds a token after every text: scores would be those of that token."""
    if tokenizer.eos_token is None and tokenizer.bos_token is None:
        raise UserError("the tokenizer has neither BOS nor EOS, so answers cannot be scored: choose another model")
    whole, bare = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    if whole[-1:] != bare[-1:]:
        token = tokenizer.convert_ids_to_tokens(whole[-1])
        raise UserError(
            f"the tokenizer adds {token!r} after every text, so after contexts and answers too: set add_eos_token to "
            "false in its tokenizer_config.json, or take it out of the post_processor in tokenizer.json"
        )


def check_vocabulary(name, tokenizer, sequences):
    """Do what `check_tokens` does for the model `name`, before it is loaded; check the sizes in its configuration."""
    base = resolve_base_and_adapter(name)[0]
    config = _load("AutoConfig", base).get_text_config()
    if not fits(getattr(config, "vocab_size", None), int):
        raise UserError(f"{base} is not a language model: its configuration has no vocab_size")
    for key, least in (("sliding_window", 0), ("max_position_embeddings", 1)):
        if (size := getattr(config, key, None)) is not None and not (fits(size, int) and size >= least):
            raise UserError(f"the configuration of {base} is damaged: {key} is {size!r}"[:300])
    check_tokens(tokenizer, sequences, config.vocab_size)


def context_window(config):
    """Return the most tokens of a sequence, from a model's configuration: int, or None if it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_tokens(tokenizer, sequences, embeddings):
    """Raise `UserError` if a token of `sequences` (lists of ids) is not one of a model's `embeddings` (int).

    A padding token without an embedding is replaced by the EOS token.
    """
    if (largest := max((max(ids) for ids in sequences if ids), default=0)) >= embeddings:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"the model has {embeddings} embeddings and none for the token {token!r}: use the model's own tokenizer"
        )
    if (tokenizer.pad_token_id or 0) >= embeddings:
        tokenizer.pad_token = tokenizer.eos_token


def load_model(name, precision, trainable=False):
    """Load a causal language model on this process's device; with its LoRA adapter, as a `PeftModel`, if it has one.

    Args:
        precision: a precision from `resolve_precision`.
        trainable: whether the adapter's weights require gradients.

    Raises:
        UserError: the model cannot be loaded or lacks weights, or the adapter is not one that we accept, see
            `grath.modeling.adapters`, or does not fit its base model. Unused weights are only a warning: the model's
            attribute `load_warnings` (list of str), for the record.
    """
    import torch
    from accelerate import PartialState
    from transformers import BitsAndBytesConfig

    base, adapter = resolve_base_and_adapter(name)
    options = {"use_safetensors": True}
    if precision in DTYPES:
        options["dtype"] = getattr(torch, DTYPES[precision])
    else:
        # Training runs under autocast, which needs 16-bit weights of its own dtype.
        options["dtype"] = torch.float16 if precision == "int8" and not trainable else compute_dtype()
        bits = {"load_in_4bit": True, "bnb_4bit_quant_type": precision, "bnb_4bit_compute_dtype": compute_dtype()}
        bits = {"load_in_8bit": True} if precision == "int8" else bits
        options["quantization_config"] = BitsAndBytesConfig(**bits)
    device = PartialState().device
    # cuDNN makes a plan for every new shape of attention, which takes up to a second, and every batch has a new one.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type != "cpu" or precision not in DTYPES:
        # Load the weights straight to the device, not into main memory once for each process.
        options["device_map"] = {"": device}
    check_model(name)
    model, info = _load("AutoModelForCausalLM", base, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{base} lacks {len(missing)} weights, starting with {missing[0]}: download it again")
    if unexpected := sorted(info["unexpected_keys"]):
        first = printable(unexpected[0])[:100]
        model.load_warnings = [f"{base} has {len(unexpected)} unused weights, starting with {first}"]
        print_once(f"Warning: {model.load_warnings[0]}")
    if adapter:
        from peft import PeftModel

        try:
            # Without a device, PEFT opens a CUDA context on the first GPU in every process.
            model = PeftModel.from_pretrained(model, adapter, is_trainable=trainable, torch_device=this_device())
        except Exception as error:  # PEFT raises many kinds of errors if the two do not fit
            if explain_system_error(error):
                raise
            raise UserError(f"the adapter {adapter} does not fit its base {base}: {first_line(error)}") from error
        check_layers(model, Path(adapter))
    return model


def load_for_inference(name, precision):
    """Load a model as `load_model` does, on a CPU with its fastest products; it can neither be trained nor saved."""
    from grath.modeling.cpu_matmul import prepare_for_inference

    return prepare_for_inference(load_model(name, precision)).eval()


def check_model(name, weights=True):
    """Raise `UserError` if a model, or an adapter's base, cannot be configured or, if `weights`, lacks its weights."""
    base = resolve_base_and_adapter(name)[0]
    config = _load("AutoConfig", base)
    if weights:
        check_weights(base)
        check_unquantized(base, config)


def check_unquantized(base, config):
    """Raise `UserError` if the weights of a model (its name and configuration) are quantized already."""
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{base} is quantized already: use the model that it was made from; --precision quantizes it")


def check_weights(base):
    """Raise `UserError` if `base` is a model folder without safetensors weights, or with only some of them."""
    folder = Path(base)
    if (folder / "config.json").is_file() and not any(folder.glob("*.safetensors")):
        raise UserError(f"{base} has no safetensors weights: convert its weights first (pickled ones are never loaded)")
    shards = indexed_shards(folder)
    if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
        lacks = f"{base} lacks {len(missing)} of {len(shards)} weight files"
        raise UserError(f"{lacks}, starting with {missing[0]}: download them again")
    if (generation := folder / "generation_config.json").is_file():  # transformers would ignore a damaged one
        read_json(generation, "generation configuration")


def indexed_shards(folder):
    """Return the weight files that a model folder's index names: set of str, empty without an index."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return set()
    return set(read_json(index, "index of weight files", {"weight_map": {str: str}})["weight_map"].values())


def has_local_weights(name):
    """Whether the weights of a model, or of an adapter's base, are on this machine and fit into its free memory."""
    import psutil
    import torch
    from huggingface_hub import try_to_load_from_cache

    folder = Path(resolve_base_and_adapter(name)[0])
    if not folder.is_dir():
        cached = try_to_load_from_cache(str(folder), "config.json")
        folder = Path(cached).parent if isinstance(cached, str) else folder
    config = folder / "config.json"
    if not all((folder / shard).is_file() for shard in indexed_shards(folder)):
        return False
    if config.is_file() and "quantization_config" in read_json(config, "configuration of a model"):
        return False
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    return 0 < 1.2 * size < free


def eos_token_ids(model, tokenizer):
    """Return the token ids that end a completion: the tokenizer's EOS and those of the model's generation config.

    Args:
        model: `PreTrainedModel`, `PeftModel`, or the name of a model or an adapter, which is not loaded then.
    """
    from transformers import GenerationConfig

    if isinstance(model, str):
        base = resolve_base_and_adapter(model)[0]
        try:
            config = GenerationConfig.from_pretrained(base)
        except OSError:  # an old model has none
            config = GenerationConfig.from_model_config(_load("AutoConfig", base))
    else:
        config = model.generation_config
    configured = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if not all(token is None or fits(token, int) for token in configured):
        raise UserError(f"the model's generation configuration is damaged: eos_token_id is {configured!r}"[:300])
    return sorted({tokenizer.eos_token_id, *configured} - {None})


def _load(auto_class, source, **options):
    """Load by the class of this name; importing `transformers` is slow."""
    import transformers

    loader, folder = getattr(transformers, auto_class), Path(source)
    what, needed = ("tokenizer", "tokenizer_config.json") if auto_class == "AutoTokenizer" else ("model", "config.json")
    if folder.is_dir() and not (folder / needed).is_file():
        raise UserError(f"{source} is a folder without a {what} (no {needed})")
    try:
        # Without an explicit False, transformers asks on the terminal whether it may run the model's own code.
        return loader.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # the hub client, the file readers and the model classes all raise different errors
        if explain_system_error(error):
            raise
        if "trust_remote_code" in str(error):
            raise UserError(f"{source} needs its own model code, which is never run: choose another model") from error
        hint = " (are all its files complete?)" if folder.is_dir() else ""
        raise UserError(f"cannot load the {what} {source}: {first_line(error)}{hint}") from error
