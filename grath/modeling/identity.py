"""The identity of a model: hashes of every file that its outputs depend on."""

import os
from contextlib import suppress
from pathlib import Path

from grath.common.errors import UserError, first_line
from grath.common.files import atomic_write_text, sha256
from grath.common.layout import ADAPTER, ADAPTER_CONFIG, TRAINING_RECORD
from grath.common.record import check_files, read_record
from grath.modeling.loading import resolve_base_and_adapter

# Smaller files are hashed at every start.
CACHED_FROM = 10_000_000
FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt")


def model_identity(name):
    """Identify a model, or an adapter and its base, by all that its outputs depend on.

    Args:
        name: hub name, model folder or adapter folder.

    Returns:
        dict: "base" and, for an adapter, "adapter", each a dict of file name -> SHA-256 in hexadecimal. For a hub name,
        "base" is its name and the commit that is read.

    Raises:
        UserError: there is no such model, or an adapter is not the one that its training saved.
    """
    base, adapter = resolve_base_and_adapter(name)
    found = {"base": _folder_identity(Path(base)) if Path(base).is_dir() else {"hub": base, "commit": _commit(base)}}
    if adapter:
        folder = Path(adapter)
        found["adapter"] = {file: file_hash(folder / file) for file in (ADAPTER, ADAPTER_CONFIG)}
        if record := read_record(folder / TRAINING_RECORD):
            check_files(record, folder, "train the adapter again")
    return found


def _folder_identity(folder):
    files = sorted({file for pattern in FILES for file in folder.glob(pattern) if not file.name.startswith(".")})
    return {file.name: file_hash(file) for file in files}


def _commit(name):
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json")).parent.name
    except Exception as error:  # the hub client raises many kinds
        raise UserError(f"cannot load the model {name}: {first_line(error)}") from error


def file_hash(file):
    """Return the SHA-256 of a file; a large one is hashed once, as long as its inode, size and times stay the same."""
    stat = file.stat()
    if stat.st_size < CACHED_FROM:
        return sha256(file)
    stamp = "-".join(str(part) for part in (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    known = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grath" / stamp
    try:
        return known.read_text(encoding="utf-8")
    except OSError:
        digest = sha256(file)
    with suppress(OSError):  # a cache that cannot be written saves no time
        atomic_write_text(known, digest)
    return digest
