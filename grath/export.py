"""Merge an adapter into its base model and save the result as an ordinary model folder.

    python -m grath.export ADAPTER OUT

transformers, vLLM and the evaluation harness load OUT like any other model. The base is loaded in 16 or 32 bits even if
the adapter was trained on a quantized base. The merged model's logits are checked against those of base and adapter
before OUT appears.
"""

import gc
import json
import shutil
from pathlib import Path

from grath.common.arguments import Parser
from grath.common.errors import UserError, run_main
from grath.common.files import atomic_write_text, check_writable, file_hash, sha256
from grath.common.layout import ADAPTER, MERGE_RECORD
from grath.modeling.identity import model_identity
from grath.modeling.loading import load_model, load_tokenizer, resolve_base_and_adapter
from grath.modeling.precision import DTYPES

PROMPTS = ("Why is the sky blue?", "What do plants need to grow?", "Which metal is liquid at room temperature?")


def logits(model, tokenizer):
    """Return the logits of every position of `PROMPTS`: (tokens, V) in float32."""
    import torch

    with torch.inference_mode():
        ids = [tokenizer(prompt, return_tensors="pt").input_ids.to(model.device) for prompt in PROMPTS]
        return torch.cat([model(prompt).logits[0] for prompt in ids]).float()


def main():
    parser = Parser(__doc__)
    parser.add_argument("adapter", help="the adapter folder")
    parser.add_argument("out", type=Path, help="the model folder to create")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16", help="precision of the merged weights")
    args = parser.parse_args()
    base, adapter = resolve_base_and_adapter(args.adapter)
    if not adapter:
        raise UserError(f"{args.adapter} is not a LoRA adapter folder (no adapter_config.json)")
    model_identity(args.adapter)  # checks that its base is the one that it was trained on
    if args.out.exists():
        raise UserError(f"{args.out} exists already: choose another folder")
    check_writable(args.out)

    import torch
    from filelock import FileLock, Timeout

    tokenizer = load_tokenizer(args.adapter)
    model = load_model(args.adapter, args.precision).eval()
    unmerged = logits(model, tokenizer)
    with model.disable_adapter():
        effect = (unmerged - logits(model, tokenizer)).abs().mean().item()
    partial, lock = (args.out.with_name(f".{args.out.name}.{end}") for end in ("partial", "lock"))
    held = FileLock(lock)
    try:
        held.acquire(blocking=False)
    except Timeout:
        raise UserError(f"another process is writing {args.out}: wait for it, or choose another folder") from None
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        model.merge_and_unload().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        del model
        gc.collect()
        merged = load_model(str(partial), args.precision).eval()
        difference = (logits(merged, tokenizer) - unmerged).abs().mean().item()
        # It may be a tenth of the adapter's effect, plus the rounding of the weights.
        if not difference <= 0.1 * effect + torch.finfo(merged.dtype).eps * unmerged.abs().mean().item():
            raise UserError(
                f"the merged model's logits differ by {difference:.2g} from those of base and adapter; the adapter "
                f"itself changes them by {effect:.2g}: nothing was saved; try --precision fp32"
            )
        merge = {"adapter_sha256": sha256(Path(adapter) / ADAPTER), "precision": args.precision}
        merge["files"] = {file.name: file_hash(file) for file in sorted(partial.glob("*.safetensors"))}
        atomic_write_text(partial / MERGE_RECORD, json.dumps(merge) + "\n")
        partial.rename(args.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock.unlink(missing_ok=True)
    print(f"Merged {adapter} into {base} in {args.precision}")
    print(f"  mean change of the logits: {effect:.2g} by the adapter, {difference:.2g} more by the merge")
    print(f"Wrote {args.out}; next: ./evaluation.sh {args.out}")


if __name__ == "__main__":
    run_main(main)
