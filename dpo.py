#!/usr/bin/env python
"""Stage 3 of GRATH: direct preference optimization (DPO) with LoRA.

    accelerate launch dpo.py --dataset_path PAIRS --model_name_or_path MODEL --output_dir DIR --seed 0
    accelerate launch dpo.py --dataset_name ai2_arc/ARC-Challenge --model_name_or_path MODEL --output_dir DIR --seed 0
    accelerate launch dpo.py --config dpo.yaml --output_dir DIR

In the first iteration MODEL is a hub name or a model folder. In later iterations it is the adapter folder of the
previous one, and training continues that adapter. DIR gets one adapter against the pretrained base, its record, log
and plot, and the checkpoints in DIR/checkpoint-N. After an interruption the same command resumes from the last complete
checkpoint.

The defaults are the settings of the paper's code. Every option of TRL's DPOConfig works under its own name, but those
of evaluation: there is none during training. --config reads options from a YAML file, one per line
(`learning_rate: 1e-4`); flags override the file.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

from grath.common.errors import UserError, run_main
from grath.common.files import check_writable, sha256
from grath.common.paths import ADAPTER
from grath.dpo.defaults import LORA_ALPHA, LORA_DROPOUT, PAPER_EFFECTIVE_BATCH, check_signs
from grath.modeling.chat import MODEL_TYPES, template_for
from grath.modeling.loading import load_model, load_tokenizer, resolve_base_and_adapter
from grath.modeling.memory import LORA_R
from grath.pairs.files import read_pairs
from grath.pairs.questions import LABELED_DATASETS, gold_pairs, labeled_split, load_hub_split


@dataclass
class ScriptArguments:
    """The options that are not TRL's."""

    model_name_or_path: str = field(metadata={"help": "hub name, model folder or LoRA adapter folder"})
    dataset_path: str | None = field(default=None, metadata={"help": "a pair file"})
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": f"instead of a file: {', '.join(LABELED_DATASETS)}, or rows of one ([:200]), or hub preferences"
        },
    )
    reference: str = field(
        default="rolling",
        metadata={
            "help": "rolling: the model that the iteration starts from; fixed: the pretrained base in every iteration",
            "choices": ("rolling", "fixed"),
        },
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "hub name or folder of the tokenizer; by default the model's"}
    )
    model_type: str = field(
        default="auto", metadata={"help": "chat template; auto: the tokenizer's own", "choices": MODEL_TYPES}
    )
    lora_r: int = field(default=LORA_R, metadata={"help": "rank of the LoRA matrices"})
    lora_alpha: int = field(default=LORA_ALPHA, metadata={"help": "the scale of LoRA is lora_alpha / lora_r"})
    lora_dropout: float = field(
        default=LORA_DROPOUT, metadata={"help": "active only with --no_disable_dropout, as in TRL; always recorded"}
    )
    sanity_check: bool = field(default=False, metadata={"help": "train on the first 1000 pairs only"})
    num_sample: int | None = field(default=None, metadata={"help": "train on the first N pairs only"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "replace the contents of output_dir"})


def parse_args():
    from grath.dpo.arguments import YamlParser
    from grath.dpo.config import GrathDPOConfig

    args, config = YamlParser((ScriptArguments, GrathDPOConfig), __doc__).parse()
    if bool(args.dataset_path) == bool(args.dataset_name):
        raise UserError("give either --dataset_path (a pair file) or --dataset_name")
    check_signs(vars(args))
    return args, config


def load_preferences(args, config, tokenizer, template):
    """Load the training set.

    Returns:
        (dataset, counts): tokenized pairs and the counts of `filter_pairs`; or, for a hub data set in TRL's preference
        format, its untokenized rows and None, because TRL tokenizes them.
    """
    from grath.dpo.dataset import filter_pairs, tokenize_pairs

    limit = min(args.num_sample or 10**9, 1000 if args.sanity_check else 10**9)
    if args.dataset_name and not labeled_split(args.dataset_name):
        dataset = load_hub_split(args.dataset_name, None, "train")
        if not {"chosen", "rejected"} <= set(dataset.column_names):
            raise UserError(f"{args.dataset_name} is not in TRL's preference format: no columns chosen and rejected")
        tokenizer.chat_template = template
        return dataset.select(range(min(limit, len(dataset)))), None
    rows = read_pairs(args.dataset_path) if args.dataset_path else gold_pairs(args.dataset_name, config.seed)
    return filter_pairs(tokenize_pairs(rows[:limit], tokenizer, template), config.max_length)


def describe(args, config):
    """Return the first part of the record: everything that identifies this training when it is started again."""
    from accelerate import PartialState

    from grath.common.provenance import versions
    from grath.dpo.trainer import describe_reference

    processes = PartialState().num_processes
    adapter = resolve_base_and_adapter(args.model_name_or_path)[1]
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

    from grath.dpo.callbacks import ProgressBar, TrainingLog
    from grath.dpo.checkpoints import TRAINING_PLOT, clear_output_dir, resume_state, save_adapter, write_record
    from grath.dpo.config import fit_batch_size
    from grath.dpo.trainer import GrathDPOTrainer, check_incoming_adapter, lora_config
    from grath.modeling.cpu_matmul import fp32_cpu_matmul
    from grath.modeling.devices import print_once
    from grath.report.plots import plot_training

    start = time.monotonic()
    record = describe(args, config)
    earlier, checkpoint = resume_state(config.output_dir, record, args.overwrite_output_dir)
    if earlier == "finished":
        print_once(f"{config.output_dir} contains this training, finished; --overwrite_output_dir trains it again")
        return
    tokenizer = load_tokenizer(args.model_name_or_path, args.tokenizer_name)
    template = template_for(tokenizer, args.model_type)
    dataset, counts = load_preferences(args, config, tokenizer, template)
    record["settings"] |= fit_batch_size(config, args.model_name_or_path, dataset)
    model = load_model(args.model_name_or_path, config.precision, trainable=True)

    batch = record["effective_batch"]
    print_once(f"policy starts from {record['policy_starts_from']}")
    print_once(f"reference ({args.reference}): {record['reference_model']}")
    print_once(
        f"{config.precision}, {config.optim.value}, {config.max_steps} steps of {batch} pairs, "
        f"{record['processes']} process(es)"
    )
    if batch != PAPER_EFFECTIVE_BATCH:
        print_once(f"The paper trains on {PAPER_EFFECTIVE_BATCH} pairs per step, not {batch}")
    lora = lora_config(args.lora_r, args.lora_alpha, args.lora_dropout)
    if continued := isinstance(model, PeftModel):
        check_incoming_adapter(model, lora)
    with fp32_cpu_matmul(model):
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
            clear_output_dir(config.output_dir)
            write_record(config.output_dir, record)
        trainer.accelerator.wait_for_everyone()
        log = TrainingLog()
        trainer.add_callback(log)
        if not config.disable_tqdm:
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(ProgressBar)
        if checkpoint:
            print_once(f"Resuming from {checkpoint}")
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.accelerator.is_main_process:
        plot_training(trainer.state.log_history, Path(config.output_dir) / TRAINING_PLOT)
    record["warnings"] = list(log.warnings.values())
    record["resumed_from"] = checkpoint
    record["seconds"] = round(time.monotonic() - start, 1)
    save_adapter(trainer, record)
    print_once(f"Saved the adapter in {config.output_dir}; next: ./evaluation.sh {config.output_dir}")


if __name__ == "__main__":
    run_main(main)
