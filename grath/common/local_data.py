"""Load data sets from local folders, always with the current content.

`datasets` 5.2 names the cache entry of a local folder by its relative layout only, so a second folder of the same
layout, or an edited one, would get the rows of the first. Here the cache folder is named by a hash of the content.
"""

from pathlib import Path

from grath.common.files import file_hash, hash_of
from grath.common.layout import resolve_local


def load_dataset(path, *args, **kwargs):
    """Call `datasets.load_dataset`; for a local folder (also in `DATASETS_ROOT`), use a cache named by its content."""
    from datasets import config
    from datasets.load import load_dataset

    path = resolve_local(path)
    if Path(path).is_dir():
        own = Path(config.HF_DATASETS_CACHE) / "local" / content_hash(path)[:16]
        kwargs.setdefault("cache_dir", str(own))
    return load_dataset(path, *args, **kwargs)


def content_hash(folder):
    """Return the SHA-256, in hexadecimal, of the names and bytes of a data set's files; hidden ones do not count."""
    lines = []
    for file in sorted(Path(folder).rglob("*")):
        name = file.relative_to(folder)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            lines.append(f"{name.as_posix()} {file_hash(file)}")
    return hash_of(lines)
