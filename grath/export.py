"""Merge an adapter into its base model and save the result as an ordinary model folder.

    python -m grath.export ADAPTER OUT

transformers, vLLM and the evaluation harness load OUT like any other model. The base is loaded in 16 or 32 bits even if
the adapter was trained on a quantized base. The merged model's logits are checked against those of base and adapter
before OUT appears.
"""

import gc
import shutil
from pathlib import Path

from grath.common.arguments import Parser
from grath.common.errors import UserError, run_main
from grath.common.files import check_writable
from grath.modeling.loading import load_model, load_tokenizer, resolve_base_and_adapter
from grath.modeling.precision import DTYPES

PROMPTS = ("Why is the sky blue?", "What do plants need to grow?", "Which metal is liquid at room temperature?")


def logits(model, tokenizer):
    """Return the logits of every position of `PROMPTS`: (tokens, V) in float32."""
    import torch

    with torch.inference_mode():
        ids = [tokenizer(prompt, return_tensors="pt").input_ids.to(model.device) for prompt in PROMPTS]
        return torch.cat([model(prompt).logits[0] for prompt in ids]).float()


def check_merge(merged, unmerged, base, eps):
    """Raise `UserError` unless the merged model computes the same logits as base and adapter.

    The mean difference may be at most a tenth of the adapter's effect, plus the rounding error.

    Args:
        merged, unmerged, base: logits (tokens, V) of the merged model, of base and adapter, and of the base alone.
        eps: relative rounding error of the merged weights.

    Returns:
        (difference, effect): mean absolute differences of merged and unmerged, and of unmerged and base.
    """
    difference, effect = (merged - unmerged).abs().mean().item(), (unmerged - base).abs().mean().item()
    if not difference <= 0.1 * effect + eps * unmerged.abs().mean().item():
        raise UserError(
            f"the merged model's logits differ by {difference:.2g} from those of base and adapter; the adapter itself "
            f"changes them by {effect:.2g}: nothing was saved; try --precision fp32"
        )
    return difference, effect


def main():
    parser = Parser(__doc__)
    parser.add_argument("adapter", help="the adapter folder")
    parser.add_argument("out", type=Path, help="the model folder to create")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16", help="precision of the merged weights")
    args = parser.parse_args()
    base, adapter = resolve_base_and_adapter(args.adapter)
    if not adapter:
        raise UserError(f"{args.adapter} is not a LoRA adapter folder (no adapter_config.json)")
    if args.out.exists():
        raise UserError(f"{args.out} exists already: choose another folder")
    check_writable(args.out)

    import torch

    tokenizer = load_tokenizer(args.adapter)
    model = load_model(args.adapter, args.precision).eval()
    unmerged = logits(model, tokenizer)
    with model.disable_adapter():
        base_logits = logits(model, tokenizer)
    partial = args.out.with_name(f".{args.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.merge_and_unload().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        del model
        gc.collect()
        merged = load_model(str(partial), args.precision).eval()
        eps = torch.finfo(merged.dtype).eps
        difference, effect = check_merge(logits(merged, tokenizer), unmerged, base_logits, eps)
        partial.rename(args.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"Merged {adapter} into {base} in {args.precision}")
    print(f"  mean change of the logits: {effect:.2g} by the adapter, {difference:.2g} more by the merge")
    print(f"Wrote {args.out}; next: ./evaluation.sh {args.out}")


if __name__ == "__main__":
    run_main(main)
