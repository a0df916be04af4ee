"""The identity of a model: hashes of every file that its outputs depend on."""

from pathlib import Path

from grath.common.errors import UserError, first_line
from grath.common.files import file_hash
from grath.common.layout import ADAPTER, ADAPTER_CONFIG, TRAINING_RECORD, resolve_local
from grath.common.record import check_inputs, read_record
from grath.modeling.loading import indexed_shards, resolve_base_and_adapter

FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "*token*.json", "vocab.json",
    "chat_template.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "*tekken*.json", "*.bpe",
    "*.codes",
)  # fmt: skip


def model_identity(name):
    """Identify a model, or an adapter and its base, by everything that its outputs depend on.

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
    found = {"base": _identity(base, "config.json")}
    if adapter:
        folder = Path(adapter)
        checkpoint = folder.name.startswith("checkpoint-") and not (folder / TRAINING_RECORD).is_file()
        output = folder.parent if checkpoint else folder
        trained = (read_record(output / TRAINING_RECORD) or {}).get("inputs", {}).get("model", {}).get("base")
        if isinstance(trained, dict) and trained.keys() & found["base"].keys():
            # The copy of a hub's model in a folder has other keys, and cannot be compared.
            check_inputs({"inputs": trained}, found["base"], f"the adapter {folder}", f"put its base back to {base}")
        found["adapter"] = {file: file_hash(folder / file) for file in (ADAPTER, ADAPTER_CONFIG)}
    return found


def tokenizer_identity(name):
    """Identify a tokenizer of its own, as `model_identity` does a base model: dict."""
    return _identity(resolve_local(name), "tokenizer_config.json")


def _identity(name, of_hub):
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download

        try:
            commit = Path(hf_hub_download(name, of_hub)).parent.name
        except Exception as error:  # the hub client raises many kinds of errors
            raise UserError(f"cannot load the model {name}: {first_line(error)}") from error
        return {"hub": name, "commit": commit}
    found = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    files = {file for file in found if not file.name.startswith(".") and any(map(file.match, FILES))}
    files |= {folder / shard for shard in indexed_shards(folder) if (folder / shard).exists()}
    if lost := [file for file in files if not file.exists()]:
        raise UserError(f"{lost[0]} is a link to a file that does not exist: copy the model with its files (cp -L)")
    return {str(file.relative_to(folder)): file_hash(file) for file in sorted(files) if file.is_file()}
