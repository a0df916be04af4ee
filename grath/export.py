"""Merge an adapter into its base, and save a model folder that transformers, vLLM and the harness load as any other.

    python -m grath.export ADAPTER OUT

The base is loaded in 16 or 32 bit, never in quantised weights, whatever the adapter was trained on. Before OUT appears
the merged model's logits are compared with those of base and adapter.
"""

import gc
import shutil
from pathlib import Path

from grath.cli import Parser, UserError, check_writable, run
from grath.models import DTYPES, load_model, load_tokenizer, split_adapter

PROMPTS = ("Why is the sky blue?", "What do plants need to grow?", "Which metal is liquid at room temperature?")


def logits(model, tokenizer):
    """Logits of every position of the prompts: (tokens, V) in float32."""
    import torch

    with torch.inference_mode():
        ids = [tokenizer(prompt, return_tensors="pt").input_ids.to(model.device) for prompt in PROMPTS]
        return torch.cat([model(prompt).logits[0] for prompt in ids]).float()


def check_merge(merged, unmerged, base, eps):
    """Compare logits (tokens, V) of the merged model with those of base and adapter.

    Their mean difference may be a tenth of what the adapter does to the base, and what rounding at `eps` explains.

    Returns:
        (difference, effect): mean absolute differences of merged and unmerged, and of unmerged and base.

    Raises:
        UserError: they differ by more.
    """
    difference, effect = (merged - unmerged).abs().mean().item(), (unmerged - base).abs().mean().item()
    if not difference <= 0.1 * effect + eps * unmerged.abs().mean().item():
        raise UserError(
            f"the merged model's logits differ by {difference:.2g} from those of base and adapter, which themselves "
            f"differ by {effect:.2g} from the base's: nothing was saved; try --precision fp32"
        )
    return difference, effect


def main():
    parser = Parser(__doc__)
    parser.add_argument("adapter", help="the adapter's folder")
    parser.add_argument("out", type=Path, help="the model folder to make")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16", help="of the merged weights")
    args = parser.parse_args()
    base, adapter = split_adapter(args.adapter)
    if not adapter:
        raise UserError(f"{args.adapter} is no LoRA adapter's folder (no adapter_config.json)")
    if args.out.exists():
        raise UserError(f"{args.out} is there already: choose another folder")
    check_writable(args.out)

    import torch

    tokenizer = load_tokenizer(args.adapter)
    model = load_model(args.adapter, args.precision).eval()
    unmerged = logits(model, tokenizer)
    with model.disable_adapter():
        plain = logits(model, tokenizer)
    merged = model.merge_and_unload()
    eps = torch.finfo(merged.dtype).eps
    difference, effect = check_merge(logits(merged, tokenizer), unmerged, plain, eps)
    partial = args.out.with_name(f".{args.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        del model, merged
        gc.collect()
        saved = logits(load_model(str(partial), args.precision).eval(), tokenizer)
        check_merge(saved, unmerged, plain, eps)
        partial.rename(args.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"Merged {adapter} into {base} in {args.precision}")
    print(f"  the adapter changes logits by {effect:.2g} in the mean, the merge by {difference:.2g} more")
    print(f"Wrote {args.out}; next: ./evaluation.sh {args.out}")


if __name__ == "__main__":
    run(main)
