"""Helpers of the DPO tests: run a training, read its record and log, make a trainer."""

import json
import shutil
from pathlib import Path

from support import call_here, rows, weights

from grath.dpo.config import GrathDPOConfig
from grath.dpo.dataset import tokenize_pairs
from grath.dpo.trainer import GrathDPOTrainer
from grath.modeling.chat import template_for
from grath.modeling.loading import load_model, load_tokenizer
from grath.pairs.files import read_pairs

STEPS = ["--max_steps", "3", "--warmup_steps", "0", "--learning_rate", "1e-2", "--logging_steps", "1"]
SMALL = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--precision", "fp32"]


def command(model, output, *flags):
    """Return the flags of a training of three steps, or as `flags` say."""
    return ["--model_name_or_path", model, "--output_dir", output, "--seed", "0", *STEPS, *SMALL, *flags]


def train(model, output, *flags, source, status=0, cwd=None):
    """Run dpo.py for three steps with `flags` and `source`, a pair file or flags; return (process, record)."""
    source = ("--dataset_path", source) if isinstance(source, Path) else source
    flags = command(model, output, *source, *flags)
    done = call_here("dpo.py", *flags, status=status, **({"cwd": cwd} if cwd else {}))
    return done, read_training(output) if status == 0 else None


def refusal(model, output, *flags, source):
    """Return what dpo.py prints on standard error when it refuses a training."""
    return train(model, output, *flags, source=source, status=2)[0].stderr


def read_training(output):
    """Return the record of a training; its log is under the key `log`."""
    return {**json.loads((output / "grath.json").read_text()), "log": rows(output / "training_log.jsonl")}


def margin(record, step=0):
    return record["log"][step]["rewards/margins"]


def difference(one, other):
    """Return the largest difference between the weights of two adapters, which have the same names."""
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max() for name in one)


def interrupt(finished, output, step):
    """Copy a finished training to the folder `output` as if it had been killed after a step with a checkpoint."""
    shutil.copytree(finished, output)
    record = json.loads((output / "grath.json").read_text())
    del record["files"]
    (output / "grath.json").write_text(json.dumps(record))
    (output / "adapter_model.safetensors").unlink()
    for checkpoint in output.glob("checkpoint-*"):
        if int(checkpoint.name.partition("-")[2]) > step:
            shutil.rmtree(checkpoint)


def make_trainer(model, pairs, output, precision, reference):
    """A trainer that continues an adapter, before its first step."""
    tokenizer = load_tokenizer(model)
    return GrathDPOTrainer(
        model=load_model(model, precision, trainable=True),
        args=GrathDPOConfig(output_dir=str(output), precision=precision, max_steps=2),
        train_dataset=tokenize_pairs(read_pairs(pairs), tokenizer, template_for(tokenizer, "auto")),
        processing_class=tokenizer,
        reference=reference,
    )
