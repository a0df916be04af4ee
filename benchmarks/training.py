"""DPO through a plain TRL script and through this project's trainer: the same tokenised pairs, steps and seed.

    python benchmarks/training.py --dataset_path PAIRS --dtype bf16 --steps 16
    python benchmarks/training.py --dataset_path PAIRS --dtype fp32 --steps 4 --same_order

`trl`: `DPOTrainer` with a `peft_config` and its defaults. `second_model`: the same, with a second model as reference.
`ours`: `grath.trainer`. Each runs in a process of its own; seconds a step are those of the reference pass, if there is
one, and of the training, over the steps. With --same_order ours takes the pairs in TRL's order, so that the logged
losses can be compared step by step.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from generation import peak_bytes  # noqa: E402

from grath.chat import template_for  # noqa: E402
from grath.cli import PROJECT, Parser, UserError, positive_int, run  # noqa: E402
from grath.models import DTYPES, float32_products, load_model, load_tokenizer  # noqa: E402
from grath.pairs import read_pairs  # noqa: E402
from grath.questions import KEYED_SETS, keyed_pairs  # noqa: E402

WAYS = ("trl", "second_model", "ours")


def train(way, args, folder):
    """Train in one way: dict of `seconds`, `tokens` (of the pairs trained on), `losses`, `peak`."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from grath.settings import GrathDPOConfig
    from grath.trainer import GrathDPOTrainer, keep_trainable, lora_config, tokenise

    class Plain(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

    tokenizer = load_tokenizer(args.model)
    rows = read_pairs(args.dataset_path) if args.dataset_path else keyed_pairs(args.dataset_name, 0)
    tokenised = tokenise(rows[: args.pairs], tokenizer, template_for(tokenizer, "auto"))
    dataset = Dataset.from_list(keep_trainable(tokenised, 1024)[0].to_list())
    settings = {
        "output_dir": folder, "max_steps": args.steps, "warmup_steps": 0, "learning_rate": 5e-4, "logging_steps": 1,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "seed": 0, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    model = load_model(args.model, args.dtype)
    common = {
        "model": model,
        "train_dataset": dataset,
        "processing_class": tokenizer,
        "peft_config": lora_config(),
    }
    if way == "ours":
        order = {"train_sampling_strategy": "random"} if args.same_order else {}
        config = GrathDPOConfig(precision=args.dtype, **settings, **order)
        start = time.perf_counter()
        with float32_products(model):
            trainer = GrathDPOTrainer(args=config, reference="rolling", **common)
            trainer.train()
    else:
        cpu = {} if model.device.type == "cuda" else {"use_cpu": True, "dataloader_pin_memory": False}
        config = DPOConfig(**settings, **cpu, **({"bf16": False} if args.dtype == "fp32" else {}))
        second = load_model(args.model, args.dtype) if way == "second_model" else None
        start = time.perf_counter()
        trainer = Plain(args=config, ref_model=second, **common)
        trainer.train()
    seconds = time.perf_counter() - start
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "seconds": seconds,
        "tokens": log[-1]["num_tokens"],
        "losses": [entry["loss"] for entry in log],
        "peak": peak_bytes(),
    }


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", default=str(PROJECT / "models" / "smollm2"), help="hub name or model folder")
    add("--dtype", choices=sorted(DTYPES), default="bf16", help="of the base's weights")
    add("--dataset_path", type=Path, help="a pair file")
    add("--dataset_name", choices=sorted(KEYED_SETS), default="ai2_arc/ARC-Challenge", help="instead of a file")
    add("--pairs", type=positive_int, default=256, help="pairs to take")
    add("--steps", type=positive_int, default=16, help="optimiser steps of 16 pairs")
    add("--same_order", action="store_true", help="TRL's order of the pairs in both")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="what to compare")
    add("--only", choices=WAYS, help="train in this process in one way, and print its figures as JSON")
    args = parser.parse_args()
    if args.only:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(train(args.only, args, folder)))
        return
    print(f"{args.pairs} pairs, {args.steps} steps, {args.dtype}")
    print(
        f"{'way':14}{'s/step':>8}{'tokens/s':>10}{'peak MB':>9}{'ratio':>7}{'memory':>8}{'largest loss difference':>25}"
    )
    first = None
    for way in args.ways:
        done = subprocess.run([sys.executable, *sys.argv, "--only", way], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{way} failed: {done.stderr.strip().splitlines()[-1]}")
        found = json.loads(done.stdout.splitlines()[-1])
        first = first or found
        difference = max(abs(a - b) for a, b in zip(found["losses"], first["losses"], strict=True))
        print(
            f"{way:14}{found['seconds'] / args.steps:8.2f}{found['tokens'] / found['seconds']:10.0f}"
            f"{found['peak'] / 1e6:9.0f}{first['seconds'] / found['seconds']:7.2f}{found['peak'] / first['peak']:8.2f}"
            f"{difference:25.6f}",
            flush=True,
        )


if __name__ == "__main__":
    run(main)
