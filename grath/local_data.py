"""Data sets in local folders: what is loaded is what the folder contains now.

`datasets` 5.2 names the cache entry of a local folder by its relative layout alone, so a second folder of the same
layout, or an edited one, would get the first one's rows. Here every content has a cache folder of its own.
"""

import hashlib
from functools import cache
from pathlib import Path


def load_dataset(path, *args, **kwargs):
    """`datasets.load_dataset`, with a cache folder named by the content where `path` is a local folder."""
    from datasets import config
    from datasets.load import load_dataset

    if Path(path).is_dir():
        own = Path(config.HF_DATASETS_CACHE) / "local" / content_hash(path)[:16]
        kwargs.setdefault("cache_dir", str(own))
    return load_dataset(path, *args, **kwargs)


def data_files(folder):
    """The files of a data set's folder, sorted, without what is hidden, as a downloader's notes are."""
    folder = Path(folder)
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def content_hash(folder):
    """The SHA-256, in hexadecimal, of the names and the bytes of a data set's files."""
    lines = []
    for file in data_files(folder):
        stat = file.stat()
        digest = _file_hash(file.absolute(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        lines.append(f"{file.relative_to(folder).as_posix()} {digest}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@cache
def _file_hash(path, size, modified, changed):
    """The SHA-256 of a file, read once in a process as long as its size and its times stay: MMLU has 57 subjects."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
