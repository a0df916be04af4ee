"""Load data sets from local folders, always with the current content.

`datasets` 5.2 names the cache entry of a local folder by its relative layout only, so a second folder of the same
layout, or an edited one, would get the rows of the first. Here the cache folder is named by a hash of the content.
"""

from glob import glob
from pathlib import Path

from grath.common.errors import UserError, explain_system_error, first_line
from grath.common.files import file_hash, hash_of
from grath.common.layout import resolve_local

# The local folders and files that were loaded: name -> content hash.
OPENED = {}


def load_dataset(path, name=None, **options):
    """Call `datasets.load_dataset`; for a local folder (also in `DATASETS_ROOT`), use a cache named by its content.

    Raises:
        UserError: the data set cannot be loaded.
    """
    from datasets import config
    from datasets.load import load_dataset

    folder = Path(resolve_local(path))
    try:
        for file in _files(options.get("data_files") or ()):
            OPENED[str(file)] = file_hash(file)
        if folder.is_dir():
            OPENED[path] = content_hash(folder)
            options.setdefault("cache_dir", str(Path(config.HF_DATASETS_CACHE) / "local" / OPENED[path][:16]))
        return load_dataset(str(folder) if folder.is_dir() else path, name, **options)
    except Exception as error:  # the hub client, the file readers and the builders raise errors of their own
        if explain_system_error(error):
            raise
        what = " ".join(part for part in (path, name) if part)
        split = f"the split {options['split']} of " if options.get("split") else ""
        raise UserError(
            f"cannot load {split}{what}: {first_line(error)} "
            "(pass a hub name, or set DATASETS_ROOT to a folder that prefetch.sh has filled)"
        ) from error


def content_hash(folder):
    """Return the SHA-256, in hexadecimal, of the names and bytes of a data set's files; hidden ones do not count."""
    names = sorted(map(Path, glob("**", root_dir=folder, recursive=True)))  # noqa: PTH207
    return hash_of(f"{name.as_posix()} {file_hash(folder / name)}" for name in names if (folder / name).is_file())


def _files(data_files):
    """Return the local files that the option `data_files` of `datasets.load_dataset` names: list of absolute paths."""
    if isinstance(data_files, str):
        files = [Path(file).resolve() for file in glob(data_files, recursive=True)]  # noqa: PTH207
        return [file for file in files if file.is_file()]
    parts = data_files.values() if isinstance(data_files, dict) else data_files
    return [file for part in parts for file in _files(part)]
