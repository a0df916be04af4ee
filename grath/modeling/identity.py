"""The identity of a model: hashes of every file that its outputs depend on."""

from pathlib import Path

from grath.common.errors import UserError, first_line
from grath.common.files import file_hash
from grath.common.layout import ADAPTER, ADAPTER_CONFIG, TRAINING_RECORD
from grath.common.record import check_inputs, read_record
from grath.modeling.loading import resolve_base_and_adapter

FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt")


def model_identity(name):
    """Identify a model, or an adapter and its base, by all that its outputs depend on.

    Args:
        name: hub name, model folder or adapter folder.

    Returns:
        dict: "base" and, for an adapter, "adapter", each a dict of file name -> SHA-256 in hexadecimal. For a hub name,
        "base" is its name and the commit that is read.

    Raises:
        UserError: there is no such model, or an adapter is not the one that its training saved, or its base is not the
            one that it was trained on.
    """
    base, adapter = resolve_base_and_adapter(name)
    if (folder := Path(base)).is_dir():
        files = sorted({file for pattern in FILES for file in folder.glob(pattern) if not file.name.startswith(".")})
        found = {"base": {file.name: file_hash(file) for file in files}}
    else:
        found = {"base": {"hub": base, "commit": _commit(base)}}
    if adapter:
        folder = Path(adapter)
        trained = (read_record(folder / TRAINING_RECORD) or {}).get("inputs", {}).get("model", {}).get("base")
        if isinstance(trained, dict) and trained.keys() & found["base"].keys():
            # The copy of a hub's model in a folder has other keys, and cannot be compared.
            check_inputs({"inputs": trained}, found["base"], f"the adapter {folder}", f"put its base back to {base}")
        found["adapter"] = {file: file_hash(folder / file) for file in (ADAPTER, ADAPTER_CONFIG)}
    return found


def _commit(name):
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json")).parent.name
    except Exception as error:  # the hub client raises many kinds
        raise UserError(f"cannot load the model {name}: {first_line(error)}") from error
