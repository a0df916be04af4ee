#!/usr/bin/env python
"""Stage 3 of GRATH: direct preference optimisation with LoRA.

    accelerate launch dpo.py --dataset_path PAIRS --model_name_or_path MODEL --output_dir DIR --seed 0
    accelerate launch dpo.py --dataset_name ai2_arc/ARC-Challenge --model_name_or_path MODEL --output_dir DIR --seed 0

MODEL is a hub name or a model folder in the first round, the last round's adapter folder in the later ones: training
goes on with that adapter. Saves one adapter against the pretrained base in DIR, with its record, log and plot, and
checkpoints in DIR/checkpoint-N, from the last of which the same command goes on after an interruption.
Without further flags the settings are those of the paper's code; every option of TRL's DPOConfig works under its own
name.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

from grath.chat import MODEL_TYPES, template_for
from grath.cli import (
    LORA_ALPHA,
    LORA_DROPOUT,
    LORA_R,
    PAPERS_BATCH,
    HelpFormatter,
    OneLineErrors,
    UserError,
    check_ranges,
    check_writable,
    run,
)
from grath.models import ADAPTER, load_model, load_tokenizer, sha256, split_adapter
from grath.pairs import read_pairs
from grath.questions import KEYED_SETS, keyed_pairs, load_hub_split


@dataclass
class ScriptArguments:
    """What the stage itself takes."""

    model_name_or_path: str = field(metadata={"help": "hub name, model folder or LoRA adapter's folder"})
    dataset_path: str | None = field(default=None, metadata={"help": "a pair file"})
    dataset_name: str | None = field(
        default=None,
        metadata={"help": f"{', '.join(KEYED_SETS)}, or a hub data set in TRL's preference format; instead of a file"},
    )
    reference: str = field(
        default="rolling",
        metadata={
            "help": "rolling: the model that the round starts from; fixed: the pretrained base in every round",
            "choices": ("rolling", "fixed"),
        },
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "tokenizer's name; if left out, the model's"})
    model_type: str = field(
        default="auto", metadata={"help": "chat tags; auto: the tokenizer's chat template", "choices": MODEL_TYPES}
    )
    lora_r: int = field(default=LORA_R, metadata={"help": "rank of the LoRA matrices"})
    lora_alpha: int = field(default=LORA_ALPHA, metadata={"help": "LoRA's scale is lora_alpha / lora_r"})
    lora_dropout: float = field(
        default=LORA_DROPOUT, metadata={"help": "recorded, and active with --no_disable_dropout only, as in TRL"}
    )
    sanity_check: bool = field(default=False, metadata={"help": "train on the first 1000 pairs only"})
    num_sample: int | None = field(default=None, metadata={"help": "train on the first N pairs only"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "replace what is in output_dir"})


def parse_args():
    from transformers import HfArgumentParser

    from grath.settings import GrathDPOConfig

    class Parser(OneLineErrors, HfArgumentParser):
        """One-line errors for transformers' dataclass parser."""

    parser = Parser(
        (ScriptArguments, GrathDPOConfig), description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False
    )
    try:
        script_args, config, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(str(error)) from None
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if bool(script_args.dataset_path) == bool(script_args.dataset_name):
        raise UserError("give either --dataset_path (a pair file) or --dataset_name")
    check_ranges(vars(script_args))
    return script_args, config


def load_preferences(args, config, tokenizer, template):
    """The training set and its counts: tokenised by `grath.chat`, or (counts None) as it is for TRL to tokenise."""
    from grath.trainer import keep_trainable, tokenise

    limit = min(args.num_sample or 10**9, 1000 if args.sanity_check else 10**9)
    if args.dataset_name and args.dataset_name not in KEYED_SETS:
        dataset = load_hub_split(args.dataset_name, None, "train")
        if not {"chosen", "rejected"} <= set(dataset.column_names):
            raise UserError(f"{args.dataset_name} is not in TRL's preference format: no columns chosen and rejected")
        tokenizer.chat_template = template
        return dataset.select(range(min(limit, len(dataset)))), None
    rows = read_pairs(args.dataset_path) if args.dataset_path else keyed_pairs(args.dataset_name, config.seed)
    return keep_trainable(tokenise(rows[:limit], tokenizer, template), config.max_length)


def describe(args, config):
    """What this training is: the first part of its record, and all by which a later start recognises it."""
    from accelerate import PartialState

    from grath.manifest import versions
    from grath.trainer import describe_reference

    processes = PartialState().num_processes
    adapter = split_adapter(args.model_name_or_path)[1]
    return {
        **describe_reference(args.model_name_or_path, args.reference),
        "incoming_adapter": adapter,
        "incoming_adapter_sha256": adapter and sha256(Path(adapter) / ADAPTER),
        "pair_file": args.dataset_path,
        "pair_file_sha256": args.dataset_path and sha256(args.dataset_path),
        "effective_batch": config.per_device_train_batch_size * config.gradient_accumulation_steps * processes,
        "processes": processes,
        "settings": {**vars(args), **config.to_dict()},
        "versions": versions(),
    }


def main():
    args, config = parse_args()
    check_writable(config.output_dir)
    if args.dataset_path:
        read_pairs(args.dataset_path)

    from peft import PeftModel
    from transformers import ProgressCallback

    from grath.checkpoints import PLOT, Bar, TrainingLog, clear, find_earlier, save_adapter, write_record
    from grath.models import float32_products
    from grath.plots import plot_training
    from grath.trainer import GrathDPOTrainer, lora_config, print_once

    start = time.monotonic()
    record = describe(args, config)
    earlier, checkpoint = find_earlier(config.output_dir, record, args.overwrite_output_dir)
    if earlier == "finished":
        print_once(f"{config.output_dir} holds this training, finished; --overwrite_output_dir would train again")
        return
    if args.overwrite_output_dir and config.resume_from_checkpoint:
        raise UserError("--overwrite_output_dir removes the checkpoints that --resume_from_checkpoint goes on from")
    checkpoint = config.resume_from_checkpoint or checkpoint
    tokenizer = load_tokenizer(args.model_name_or_path, args.tokenizer_name)
    template = template_for(tokenizer, args.model_type)
    dataset, counts = load_preferences(args, config, tokenizer, template)
    model = load_model(args.model_name_or_path, config.precision, trainable=True)

    batch = record["effective_batch"]
    print_once(f"policy starts from {record['policy_starts_from']}")
    print_once(f"reference ({args.reference}): {record['reference_model']}")
    print_once(
        f"{config.precision}, {config.optim.value}, {config.max_steps} steps of {batch} pairs, "
        f"{record['processes']} process(es)"
    )
    if batch != PAPERS_BATCH:
        print_once(f"The paper trains with {PAPERS_BATCH} pairs a step, not {batch}")
    lora = lora_config(args.lora_r, args.lora_alpha, args.lora_dropout)
    continued = isinstance(model, PeftModel)
    if continued:
        incoming = model.peft_config["default"]
        for name in ("r", "lora_alpha", "lora_dropout"):
            if getattr(incoming, name) != getattr(lora, name):
                raise UserError(
                    f"the adapter that comes in has {name} {getattr(incoming, name)}, not {getattr(lora, name)}"
                )
    with float32_products(model):
        try:
            trainer = GrathDPOTrainer(
                model=model,
                args=config,
                train_dataset=dataset,
                processing_class=tokenizer,
                peft_config=None if continued else lora,
                reference=args.reference,
            )
        except (ValueError, NotImplementedError) as error:
            raise UserError(str(error)) from None
        record["base_revision"] = getattr(model.config, "_commit_hash", None)
        record["pairs"] = counts or trainer.counts
        if trainer.accelerator.is_main_process and earlier == "nothing":
            clear(config.output_dir)
            write_record(config.output_dir, record)
        trainer.accelerator.wait_for_everyone()
        log = TrainingLog()
        trainer.add_callback(log)
        if not config.disable_tqdm:
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(Bar)
        if checkpoint:
            print_once(f"Going on from {checkpoint}")
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.accelerator.is_main_process:
        plot_training(trainer.state.log_history, Path(config.output_dir) / PLOT)
    record.update(warnings=list(log.said.values()), went_on_from=checkpoint, seconds=round(time.monotonic() - start, 1))
    save_adapter(trainer, record)
    print_once(f"Saved the adapter in {config.output_dir}; next: ./evaluation.sh {config.output_dir}")


if __name__ == "__main__":
    run(main)
