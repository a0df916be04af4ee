#!/usr/bin/env python
"""Stage 3 of GRATH: direct preference optimization (DPO) with LoRA.

    accelerate launch dpo.py --dataset_path PAIRS --model_name_or_path MODEL --output_dir DIR --seed 0
    accelerate launch dpo.py --dataset_name ai2_arc/ARC-Challenge --model_name_or_path MODEL --output_dir DIR --seed 0
    accelerate launch dpo.py --config dpo.yaml --output_dir DIR

In the first iteration MODEL is a hub name or a model folder. In later iterations it is the adapter folder of the
previous one, and training continues that adapter. DIR gets one adapter on the pretrained base, its record, log
and plot, and the checkpoints in DIR/checkpoint-N. After an interruption the same command resumes from the last complete
checkpoint.

The defaults are the settings of the paper's code, apart from what docs/differences.md names. Every option of TRL's
DPOConfig works under its own name, apart from those for evaluation: there is none during training. --config reads
options from a YAML file, one per line (`learning_rate: 1e-4`); flags override the file.
"""

import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from grath.common.defaults import LORA_ALPHA, LORA_DROPOUT, LORA_R, PAIRS_PER_STEP, UNCOMPARED
from grath.common.errors import UserError, explain_system_error, run_main
from grath.common.files import check_writable, hash_of, sha256
from grath.common.layout import TRAINING_PLOT, TRAINING_RECORD, record_path, written_path
from grath.common.record import add_warnings, check_inputs, read_record, recording
from grath.dpo import option
from grath.modeling.adapters import PEFT_SIZES, check_adapter
from grath.modeling.chat import MODEL_TYPES, TODAY, lost_prompt, template_for
from grath.modeling.identity import model_identity, tokenizer_identity
from grath.modeling.loading import check_vocabulary, load_model, load_tokenizer, resolve_base_and_adapter
from grath.pairs.files import read_pairs
from grath.pairs.questions import LABELED_DATASETS, load_preferences


@dataclass
class ScriptArguments:
    """The options that are not TRL's."""

    model_name_or_path: str = field(metadata={"help": "hub name, model folder or LoRA adapter folder"})
    dataset_path: str | None = option(None, "a pair file")
    dataset_name: str | None = option(
        None, f"instead of a file: {', '.join(LABELED_DATASETS)}, or rows of one ([:200]), or hub preferences"
    )
    reference: str = option(
        "rolling", "rolling: the model that the iteration starts from; fixed: the base", choices=("rolling", "fixed")
    )
    tokenizer_name: str | None = option(None, "hub name or folder of the tokenizer; by default the model's")
    model_type: str = option("auto", "chat template; auto: the tokenizer's own", choices=MODEL_TYPES)
    lora_r: int = option(LORA_R, "rank of the LoRA matrices; an adapter that is continued keeps its own three values")
    lora_alpha: int = option(LORA_ALPHA, "the scale of LoRA is lora_alpha / lora_r")
    lora_dropout: float = option(LORA_DROPOUT, "active only with --no_disable_dropout, as in TRL; always recorded")
    sanity_check: bool = option(False, "train on the first 1000 pairs only")
    num_sample: int | None = option(None, "train on the first N pairs only")
    overwrite_output_dir: bool = option(False, "remove the training in output_dir, and train again")


def parse_args():
    from grath.dpo.arguments import YamlParser
    from grath.dpo.config import GrathDPOConfig, check_signs

    args, config = YamlParser(__doc__, dataclass_types=(ScriptArguments, GrathDPOConfig)).parse()
    if bool(args.dataset_path) == bool(args.dataset_name):
        raise UserError("give either --dataset_path (a pair file) or --dataset_name")
    if adapter := resolve_base_and_adapter(args.model_name_or_path)[1]:
        own = check_adapter(Path(adapter))
        args.lora_r, args.lora_alpha, args.lora_dropout = ({**PEFT_SIZES, **own}[name] for name in PEFT_SIZES)
    check_signs(vars(args))
    check_writable(config.output_dir)
    return args, config


def load_rows(args, seed):
    """Load the pairs, or the rows of a hub data set in TRL's preference format, and their SHA-256."""
    limit = min(args.num_sample or 10**9, 1000 if args.sanity_check else 10**9)
    if args.dataset_path:
        return read_pairs(Path(args.dataset_path))[:limit], sha256(args.dataset_path)
    rows = load_preferences(args.dataset_name, seed)
    rows = rows[:limit] if isinstance(rows, list) else rows.select(range(min(limit, len(rows))))
    return rows, hash_of(json.dumps(row, default=str) for row in rows)


def own_pairs(args):
    """Return the record of the pairs if the model itself has written them, else None."""
    record = args.dataset_path and read_record(record_path(written_path(Path(args.dataset_path))))
    if record and record.get("model"):
        with suppress(UserError):  # the model that wrote them is gone
            if resolve_base_and_adapter(record["model"]) == resolve_base_and_adapter(args.model_name_or_path):
                return record
    return None


def identities(args, wrote):
    """Return the hashes of the model and of its own tokenizer: dict. Refuse pairs that another state of it wrote."""
    found = {"model": model_identity(args.model_name_or_path)}
    if wrote:
        advice = "since then, the model has been replaced; write the pairs again"
        check_inputs({"inputs": wrote["inputs"].get("model", {})}, found["model"], args.dataset_path, advice)
    return found | ({"tokenizer": tokenizer_identity(args.tokenizer_name)} if args.tokenizer_name else {})


def main():
    start = time.monotonic()
    args, config = parse_args()
    rows, digest = load_rows(args, config.seed)

    from transformers import ProgressCallback

    from grath.dpo.callbacks import ProgressBar, TrainingLog
    from grath.dpo.checkpoints import clear_output_dir, resume_state, save_adapter
    from grath.dpo.dataset import drop_special, tokenize_pairs
    from grath.dpo.trainer import GrathDPOTrainer, lora_config
    from grath.modeling.cpu_matmul import prepare_for_training
    from grath.modeling.devices import check_shared, print_once
    from grath.report.plots import plot_training

    settings, processes, warnings = {**vars(args), **config.to_dict()}, config.world_size, []
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    wrote = own_pairs(args)
    inputs = {**identities(args, wrote), "pairs": digest, "effective_batch": batch}
    inputs |= {name: value for name, value in settings.items() if name not in UNCOMPARED}
    state, earlier, checkpoint = resume_state(inputs, settings)
    check_shared((state, checkpoint), config.output_dir)
    if state == "finished":
        print_once(f"{config.output_dir} contains this training, finished; --overwrite_output_dir trains it again")
        return
    tokenizer = load_tokenizer(args.model_name_or_path, args.tokenizer_name)
    tokenizer.chat_template = template_for(tokenizer, args.model_type)
    if lost := lost_prompt(tokenizer, tokenizer.chat_template):
        warnings = [f"the model is asked with {lost!r} at the end of the prompt, and trained without it"]
        print_once(f"Warning: {warnings[0]}")
    if isinstance(rows, list):
        if found := drop_special(rows, tokenizer):
            warnings.append(found)
            print_once(f"Warning: {found}")
        rows = tokenize_pairs(rows, tokenizer, tokenizer.chat_template)
        check_vocabulary(args.model_name_or_path, tokenizer, [ids for row in rows for ids in row.values()])
    base, adapter = resolve_base_and_adapter(args.model_name_or_path)
    policy = f"the adapter {adapter} on {base}" if adapter else base
    reference = policy if args.reference == "rolling" else base
    print_once(f"policy starts from {policy}")
    print_once(f"reference ({args.reference}): {reference}")
    model = load_model(args.model_name_or_path, config.precision, trainable=True)
    if not (config.bf16 or config.fp16):  # autocast would turn float32 back into 16 bits
        model = prepare_for_training(model)
    # Again, because loading may have downloaded another commit.
    inputs |= identities(args, wrote)
    resume_state(inputs, settings)
    lora = None if adapter else lora_config(args.lora_r, args.lora_alpha, args.lora_dropout)
    given = {"train_dataset": rows, "processing_class": tokenizer, "peft_config": lora}
    try:
        trainer = GrathDPOTrainer(model=model, args=config, reference=args.reference, **given)
    except (ValueError, NotImplementedError, ImportError, OSError) as error:  # the last is of --push_to_hub
        if explain_system_error(error) or getattr(error, "errno", None):
            raise
        raise UserError(str(error)) from None
    steps = f"{config.max_steps} steps of {batch} pairs"
    print_once(f"{config.precision}, {config.optim.value}, {steps}, {processes} process(es)")
    if batch != PAIRS_PER_STEP:
        print_once(f"The paper trains on {PAIRS_PER_STEP} pairs per step, not {batch}")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        settings[name] = getattr(config, name)
    log, output = TrainingLog(trainer.steps_per_epoch), Path(config.output_dir)
    trainer.add_callback(log)
    if not config.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressBar)
    write = trainer.is_world_process_zero()
    content = {"reference": args.reference, "policy_starts_from": policy, "reference_model": reference}
    content |= {"base_model": base, "incoming_adapter": adapter, "pair_file": args.dataset_path}
    content |= {"pairs": trainer.counts, "processes": processes}
    content |= {"settings": settings, "resumed_from": checkpoint, "chat_date": str(TODAY), "own_pairs": bool(wrote)}
    path, seen = output / TRAINING_RECORD, None if args.overwrite_output_dir else earlier or {}
    clear = partial(clear_output_dir, output) if state == "nothing" else None
    with recording(path, inputs, earlier, seen, write, start, clear, **content) as record:
        add_warnings(record, [*warnings, *getattr(model, "load_warnings", [])])
        if checkpoint:
            print_once(f"Resuming from {checkpoint}")
        trainer.train(resume_from_checkpoint=checkpoint)
        if write:
            plot_training(trainer.state.log_history, output / TRAINING_PLOT)
        add_warnings(record, log.warnings.values())
        record["files"] = save_adapter(trainer)
    print_once(f"Saved the adapter in {config.output_dir}; next: ./evaluation.sh {config.output_dir}")


if __name__ == "__main__":
    run_main(main)
