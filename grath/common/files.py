"""Files: JSON read with one-line errors, text written atomically, hashes."""

import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path

from grath.common.errors import UserError, first_line

# The hashes of files with at least so many bytes are kept in the user's cache.
CACHED_FROM = 10_000_000


def parse_json(text):
    """Parse JSON from outside; raise `ValueError` also if it is nested too deeply or could not be written again."""
    try:
        content = json.loads(text)
        json.dumps(content, ensure_ascii=False).encode()  # half of a surrogate pair has no bytes
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return content


def fits(content, shape):
    """Return whether parsed JSON has a shape.

    Args:
        shape: a type or a union of types, where a number must be finite; a regular expression, for a whole text; a
            tuple of shapes, one of which must fit; a list of one shape, for lists; a dict of shapes, for dicts: by key,
            where a key that ends with "?" may be missing and other keys are ignored, or {str: shape} for all keys.
    """
    if isinstance(shape, tuple):
        return any(fits(content, one) for one in shape)
    if isinstance(shape, list):
        return isinstance(content, list) and all(fits(one, shape[0]) for one in content)
    if isinstance(shape, dict):
        if not isinstance(content, dict):
            return False
        if str in shape:
            return all(fits(one, shape[str]) for one in content.values())
        return all(
            fits(content[key.rstrip("?")], of_key) if key.rstrip("?") in content else key.endswith("?")
            for key, of_key in shape.items()
        )
    if isinstance(shape, re.Pattern):
        return isinstance(content, str) and bool(shape.fullmatch(content))
    if isinstance(content, int | float) and shape is not object and not abs(content) < 1e300:
        return False
    return isinstance(content, shape) and (shape in (bool, object) or not isinstance(content, bool))


def read_json(path, what, shape=dict):
    """Read the JSON object in a file; raise `UserError` if it does not fit the shape, where `what` says what it is."""
    check_regular(path)
    try:
        content = parse_json(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not fits(content, shape):
        raise UserError(f"{path} is damaged, or not a {what}")
    return content


def check_regular(path):
    """Raise `UserError` if `path` is a pipe or a device, which can be read only once, or never ends."""
    if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
        raise UserError(f"{path} is not a regular file: save its content in one")


def read_json_lines(path, what, shape=dict):
    """Read a JSON-lines file as a list of dicts. A byte order mark and Windows line ends are accepted.

    Raises:
        UserError: the file cannot be read or is empty, or a line does not fit the shape; it names `what`.
    """
    check_regular(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{what} {path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}") from None
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{what} {path}, line {number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({first_line(error)})") from None
        if not fits(row, shape):
            raise UserError(f"{where}: a value is missing or has the wrong type")
        rows.append(row)
    if not rows:
        raise UserError(f"{what} {path} is empty")
    return rows


def atomic_write_text(path, text):
    """Write `text` to `path` in UTF-8, as `atomic_write_bytes` does."""
    atomic_write_bytes(path, text.encode())


def atomic_write_bytes(path, content):
    """Write `content` to `path`, through a temporary file and a rename, so that `path` is never incomplete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder):
    """Raise `UserError` unless `folder`, or its nearest existing parent, is a folder that can be written to."""
    folder = Path(folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{existing} is a file, not a folder: choose another output folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {existing}: choose another output folder or change its permissions")


def sha256(path):
    """Return the SHA-256 of a file in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hash(file):
    """Return the SHA-256 of a file; a large one is hashed once, as long as its inode, size and times stay the same."""
    stat = file.stat()
    if stat.st_size < CACHED_FROM:
        return sha256(file)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    if cache.startswith("~"):  # there is no home
        return sha256(file)
    stamp = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    known = Path(cache, "grath", "-".join(map(str, stamp)))
    with suppress(OSError, UnicodeDecodeError):
        if re.fullmatch("[0-9a-f]{64}", digest := known.read_text(encoding="utf-8")):
            return digest
    digest = sha256(file)
    with suppress(OSError):  # a cache that cannot be written saves no time
        atomic_write_text(known, digest)
    return digest


def hash_of(lines):
    """Return the SHA-256 of lines of text in hexadecimal."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
