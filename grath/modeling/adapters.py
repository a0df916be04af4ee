"""Which adapters every command takes: plain LoRA on linear layers, of any rank, as its training saved it."""

import re
from types import NoneType

from grath.common.errors import UserError, first_line
from grath.common.files import read_json
from grath.common.layout import ADAPTER, ADAPTER_CONFIG, TRAINING_RECORD
from grath.common.record import NUMBER, check_files, read_record

# PEFT's own values, where a configuration leaves them out.
PEFT_SIZES = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
LAYERS = (str, [str], NoneType)
CONFIG = {
    "base_model_name_or_path": str,
    "r?": int,
    "lora_alpha?": NUMBER,
    "lora_dropout?": NUMBER,
    **dict.fromkeys(("target_modules?", "exclude_modules?", "layers_pattern?"), LAYERS),
    "layers_to_transform?": (int, [int], NoneType),
    "rank_pattern?": (NoneType, {str: int}),
    "alpha_pattern?": (NoneType, {str: NUMBER}),
    **dict.fromkeys(("use_rslora?", "fan_in_fan_out?"), (bool, NoneType)),
}
# Options of PEFT's LoraConfig that change nothing but the shape and the scale of LoRA, or nothing at all. Every other
# option changes the base's weights, or trains what TRL's copy of the reference would not have.
TAKEN = {name.rstrip("?") for name in CONFIG} | {
    "peft_type", "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "megatron_core",
    "qalora_group_size", "ensure_weight_tying", "eva_config", "loftq_config", "runtime_config",
}  # fmt: skip
# Values of other options with which LoRA is plain.
PLAIN = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva")}
LORA_WEIGHT = re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.weight")
MERGE = "merge it into its base with PEFT (merge_and_unload), if it can be merged, and use the merged model"


def check_adapter(folder):
    """Check the adapter in a folder (Path) before weights are loaded; return its configuration: dict.

    Raises:
        UserError: the files are incomplete, damaged or edited after the training, or it is not plain LoRA on linear
            layers inside the model.
    """
    config = read_json(folder / ADAPTER_CONFIG, "configuration of a LoRA adapter", CONFIG)
    if not config["base_model_name_or_path"]:
        raise UserError(f"{folder / ADAPTER_CONFIG} names no base model")
    if not (folder / ADAPTER).is_file():
        raise UserError(f"{folder} has no {ADAPTER}: the adapter is incomplete, or pickled, which is never loaded")
    if record := read_record(folder / TRAINING_RECORD):
        check_files(record, folder, "train the adapter again")
    if config.get("peft_type") != "LORA" or config.get("task_type") not in ("CAUSAL_LM", None):
        kind = "/".join(str(config.get(name)) for name in ("peft_type", "task_type"))
        raise UserError(f"the adapter {folder} is {kind}, not LoRA for a causal language model: {MERGE}")
    if config.get("revision") not in (None, "", "main"):
        raise UserError(f"the adapter {folder} needs the revision {config['revision']!r} of its base: {MERGE}")
    for name, value in config.items():
        if value and name not in TAKEN and value not in PLAIN.get(name, ()):
            raise UserError(f"the adapter {folder} has {name} {value!r}, so it is not plain LoRA: {MERGE}"[:500])
    for name in _weight_names(folder):
        found = LORA_WEIGHT.fullmatch(name)
        if not found or found[1].endswith(("lm_head", "embed_out")):
            raise UserError(f"the adapter {folder} has {name}, not LoRA on an inner linear layer: {MERGE}"[:500])
    return config


def check_layers(model, folder):
    """Raise `UserError` if a `PeftModel` has LoRA not only on inner linear layers, or weights other than its file's."""
    import torch
    from peft import get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    head = model.get_output_embeddings()
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and (layer is head or not isinstance(layer.get_base_layer(), torch.nn.Linear)):
            raise UserError(f"the adapter {folder} has LoRA on {name}, which is not an inner linear layer: {MERGE}")
    differing = get_peft_model_state_dict(model, save_embedding_layers=False).keys() ^ _weight_names(folder)
    if differing:
        raise UserError(f"the adapter {folder} does not fit its base: {min(differing)} is only in one of the two")
    for name, weight in model.named_parameters():
        if "lora_" in name and not weight.isfinite().all():
            raise UserError(f"the adapter {folder} has a weight that is not finite, in {name}: train it again")


def _weight_names(folder):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / ADAPTER, "numpy") as weights:
            return set(weights.keys())
    except SafetensorError as error:
        raise UserError(f"{folder / ADAPTER} is damaged: {first_line(error)}") from None
