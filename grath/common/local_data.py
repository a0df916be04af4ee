"""Load data sets from local folders, always with the current content.

`datasets` 5.2 names the cache entry of a local folder by its relative layout only, so a second folder of the same
layout, or an edited one, would get the rows of the first. Here the cache folder is named by a hash of the content.
"""

from functools import cache
from pathlib import Path

from grath.common.files import hash_of, sha256
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


def data_files(folder):
    """List the files of a data set's folder, sorted, without hidden ones (a downloader's notes)."""
    folder = Path(folder)
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def content_hash(folder):
    """Return the SHA-256, in hexadecimal, of the names and bytes of a data set's files."""
    lines = []
    for file in data_files(folder):
        stat = file.stat()
        digest = _file_hash(file.absolute(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        lines.append(f"{file.relative_to(folder).as_posix()} {digest}")
    return hash_of(lines)


@cache
def _file_hash(path, size, modified, changed):
    """Hash a file once per process as long as its size and times stay the same: MMLU has 57 subjects."""
    return sha256(path)
