"""Compare DPO with plain TRL and with this project's trainer, on the same tokenized pairs, steps and seed.

    python benchmarks/training.py --dataset_path PAIRS --dtype bf16 --steps 16
    python benchmarks/training.py --dataset_path PAIRS --dtype fp32 --steps 4 --same_order

`trl`: TRL's `DPOTrainer` with a `peft_config`. `precomputed`: the same, with the reference's log-probabilities computed
before training. `ours`: `grath.dpo.trainer`. TRL turns gradient checkpointing on by default. The sequences are short
and need none, so TRL trains without it, as `ours` does; --gradient_checkpointing compares with TRL's own default.

`before` is the time until the first step, with the reference pass over the pairs of the steps; `trl` computes the
reference in every step. `ratio` compares the steps, `iteration` the paper's 1,000 steps with the reference pass
over 1,119 pairs, as computed from these figures. The peak memory includes what earlier ways have left allocated. With
--same_order, every way takes the pairs in the order of their file, so that the losses can be compared step by step.
"""

import tempfile
import time
from pathlib import Path

from generation import peak_bytes, reset_peak
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer

from grath.common.arguments import Parser, positive_int
from grath.common.defaults import MAX_LENGTH, MAX_STEPS, PAIRS_PER_STEP
from grath.common.errors import run_main
from grath.common.layout import PROJECT
from grath.dpo.config import GrathDPOConfig
from grath.dpo.dataset import filter_pairs, tokenize_pairs
from grath.dpo.trainer import GrathDPOTrainer, lora_config
from grath.modeling.chat import template_for
from grath.modeling.cpu_matmul import prepare_for_training
from grath.modeling.loading import load_model, load_tokenizer
from grath.modeling.precision import DTYPES
from grath.pairs.files import read_pairs
from grath.pairs.questions import LABELED_DATASETS, gold_pairs

WAYS = ("trl", "precomputed", "ours")
PAPER_PAIRS = 1119


class PlainTrainer(DPOTrainer):
    """TRL's trainer on pairs that are tokenized already."""

    def _prepare_dataset(self, dataset, *_):
        return dataset


def train(way, args, tokenizer, pairs, folder):
    """Train in one way.

    Returns:
        dict of `before` (s, until the first step), `pairs`, `seconds` (of all steps), `tokens` (of the pairs trained
        on), `losses` (one per step) and `peak` (bytes of memory).
    """
    reset_peak()
    settings = {
        "output_dir": folder, "max_steps": args.steps, "warmup_steps": 0, "learning_rate": 5e-4, "logging_steps": 1,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "seed": 0, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True,
    } | ({"train_sampling_strategy": "sequential"} if args.same_order else {})  # fmt: skip
    model = load_model(args.model, args.dtype)
    common = {"model": model, "train_dataset": pairs, "processing_class": tokenizer, "peft_config": lora_config()}
    start = time.perf_counter()
    if way == "ours":
        config = GrathDPOConfig(precision=args.dtype, **settings)
        common["model"] = prepare_for_training(model)
        trainer = GrathDPOTrainer(args=config, reference="rolling", **common)
    else:
        cpu = {} if model.device.type == "cuda" else {"use_cpu": True, "dataloader_pin_memory": False}
        bf16 = {"bf16": False} if args.dtype == "fp32" else {}
        own = {
            "gradient_checkpointing": args.gradient_checkpointing,
            "precompute_ref_log_probs": way == "precomputed",
        }
        trainer = PlainTrainer(args=DPOConfig(**settings, **cpu, **bf16, **own), **common)
    before = time.perf_counter() - start
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "before": before,
        "pairs": len(getattr(trainer, "pairs", pairs)),
        "seconds": time.perf_counter() - start - before,
        "tokens": log[-1]["num_tokens"],
        "losses": [entry["loss"] for entry in log],
        "peak": peak_bytes(),
    }


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", default=str(PROJECT / "models" / "smollm2"), help="hub name or model folder")
    add("--dtype", choices=sorted(DTYPES), default="bf16", help="dtype of the base's weights")
    add("--dataset_path", type=Path, help="pair file")
    gold = {"choices": sorted(LABELED_DATASETS), "default": "ai2_arc/ARC-Challenge"}
    add("--dataset_name", **gold, help="data set of gold pairs, if there is no --dataset_path")
    add("--pairs", type=positive_int, default=256, help="maximum number of pairs")
    add("--steps", type=positive_int, default=16, help="optimizer steps of 16 pairs")
    add("--same_order", action="store_true", help="take the pairs in the order of their file")
    checkpointing = "train with gradient checkpointing in `trl` and `precomputed`, which is TRL's own default"
    add("--gradient_checkpointing", action="store_true", help=checkpointing)
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="ways to compare")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    rows = read_pairs(args.dataset_path) if args.dataset_path else gold_pairs(args.dataset_name, 0)
    tokenized = tokenize_pairs(rows[: args.pairs], tokenizer, template_for(tokenizer, "auto"))
    pairs = filter_pairs(tokenized, MAX_LENGTH)[0]
    if args.same_order:  # TRL's last step of an epoch would be smaller
        pairs = pairs.select([i % len(pairs) for i in range(PAIRS_PER_STEP * args.steps)])
    with tempfile.TemporaryDirectory() as folder:
        results = {way: train(way, args, tokenizer, pairs, folder) for way in args.ways}

    def iteration(found):
        """Seconds of the paper's iteration."""
        return found["before"] / found["pairs"] * PAPER_PAIRS + found["seconds"] / args.steps * MAX_STEPS

    checkpointing = "with" if args.gradient_checkpointing else "without"
    print(f"{args.pairs} pairs, {args.steps} steps, {args.dtype}; TRL {checkpointing} gradient checkpointing")
    print(
        f"{'way':14}{'before':>8}{'s/step':>8}{'tokens/s':>10}{'peak MB':>9}{'ratio':>7}{'iteration':>11}{'memory':>8}"
        f"{'largest loss difference':>25}"
    )
    first = results[args.ways[0]]
    for way, found in results.items():
        difference = max(abs(a - b) for a, b in zip(found["losses"], first["losses"], strict=True))
        print(
            f"{way:14}{found['before']:8.1f}{found['seconds'] / args.steps:8.2f}"
            f"{found['tokens'] / found['seconds']:10.0f}{found['peak'] / 1e6:9.0f}"
            f"{first['seconds'] / found['seconds']:7.2f}{iteration(first) / iteration(found):11.2f}"
            f"{found['peak'] / first['peak']:8.2f}{difference:25.6f}"
        )


if __name__ == "__main__":
    run_main(main)
