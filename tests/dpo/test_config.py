"""The paper's defaults, and options from a YAML file."""

import os
from unittest import mock

import pytest
import torch
from support import call_here
from trainings import refusal
from transformers import integrations

import dpo
from grath.common.errors import UserError
from grath.dpo.config import GrathDPOConfig, step_sizes


def test_defaults_are_the_papers():
    config, gpu = GrathDPOConfig(output_dir="unused"), torch.cuda.is_available()
    assert (config.beta, config.loss_type, config.max_length) == (0.1, ["sigmoid"], 1024)
    assert (config.learning_rate, config.lr_scheduler_type, config.warmup_steps) == (5e-4, "cosine", 100)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps, config.max_steps) == (4, 4, 1000)
    assert (config.seed, config.disable_dropout, config.report_to) == (0, True, [])
    assert (config.optim, config.precision) == (("paged_adamw_32bit", "fp4") if gpu else ("adamw_torch", "bf16"))
    assert config.n_gpu == gpu  # of all that this process sees, it uses one
    assert not config.ddp_find_unused_parameters
    assert GrathDPOConfig(output_dir="unused", ddp_find_unused_parameters=True).ddp_find_unused_parameters


@pytest.mark.parametrize(
    ("processes", "sizes"),
    [(1, (4, 4)), (2, (4, 2)), (3, (4, 1)), (4, (4, 1)), (8, (2, 1)), (16, (1, 1)), (20, (1, 1))],
)
def test_the_processes_share_the_papers_batch(processes, sizes):
    assert step_sizes(processes) == sizes
    # A smaller batch, the advice when the memory is full, does not change the pairs of a step.
    for batch in (1, 2, 4):
        given, accumulation = step_sizes(processes, batch)
        assert given == batch and (batch > sizes[0] or batch * accumulation == sizes[0] * sizes[1])
    assert step_sizes(processes, None, 5) == (4, 5) and step_sizes(processes, 3, 5) == (3, 5)


def test_trackers_and_epochs_that_have_no_effect_are_refused(monkeypatch):
    monkeypatch.setattr(integrations, "get_available_reporting_integrations", lambda: ["wandb"])
    for names in ("none", "all", "wandb", ["wandb"]):
        GrathDPOConfig(output_dir="unused", report_to=names)
    with pytest.raises(UserError, match="there is no tracker trackio, or its package is not installed"):
        GrathDPOConfig(output_dir="unused", report_to=["wandb", "trackio"])
    GrathDPOConfig(output_dir="unused", num_train_epochs=1, max_steps=-1)
    for epochs in (1, 3.0):
        with pytest.raises(UserError, match="--num_train_epochs has no effect unless --max_steps is -1"):
            GrathDPOConfig(output_dir="unused", num_train_epochs=epochs)
    assert GrathDPOConfig(output_dir="unused", max_steps=-1).num_train_epochs == 3


CONFIG = """
dataset_path: pairs.json
model_name_or_path: model
reference: fixed
sanity_check: true
learning_rate: 2e-3
beta: 0.3
loss_type: [sigmoid, ipo]
max_length: null
max_steps: 5
"""


def test_flags_override_the_yaml_file(tmp_path, monkeypatch):
    (tmp_path / "dpo.yaml").write_text(CONFIG)
    flags = ["--config", tmp_path / "dpo.yaml", "--output_dir", tmp_path / "m", "--max_steps", "1", "--beta", "0.2"]
    flags += ["--logging_first_step", "--gradient_checkpointing", "false"]  # a switch needs no value
    monkeypatch.setattr("sys.argv", ["dpo.py", *map(str, flags)])
    args, config = dpo.parse_args()
    assert (args.dataset_path, args.reference, args.sanity_check) == ("pairs.json", "fixed", True)
    assert (config.learning_rate, config.beta, config.loss_type) == (2e-3, 0.2, ["sigmoid", "ipo"])
    assert (config.max_length, config.max_steps, config.warmup_steps) == (None, 1, 100)
    assert config.logging_first_step and not config.gradient_checkpointing


# The content of the file, and how the line begins.
INVALID = [
    ("learnin_rate: 1\nbeta: 0.1\nepochs: 2\n", "unknown keys in the --config file: learnin_rate, epochs (see --help)"),
    ("reference: none\n", "argument --reference: invalid choice: 'none' (choose from "),
    ("", "the --config file {config} must contain a YAML mapping"),
    ("beta: [\n", "the --config file is not YAML: while parsing a flow node "),
    (b"tokenizer_name: caf\xe9\n", "the --config file is not YAML: unacceptable character #x00e9"),
    (None, "cannot read --config {config}: No such file or directory"),
]


@pytest.mark.parametrize(("content", "line"), INVALID)
def test_an_invalid_yaml_file_is_one_line(content, line, tmp_path):
    config = tmp_path / "dpo.yaml"
    if content is not None:
        config.write_bytes(content if isinstance(content, bytes) else content.encode())
    flags = ["--dataset_path", "pairs.json", "--model_name_or_path", "model", "--output_dir", tmp_path / "out"]
    error = call_here("dpo.py", *flags, "--config", config, status=2).stderr
    assert error.startswith(f"dpo.py: error: {line.format(config=config)}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# Options that TRL and transformers refuse only when the training begins, or never.
REFUSED = [
    (["--adam_beta1", "2"], "Invalid beta parameter"),
    (["--optim", "galore_adamw"], "galore"),
    (["--lr_scheduler_type", "cosine_with_min_lr"], "min_lr"),
    (["--lr_scheduler_kwargs", '{"speed": 1}'], "unexpected keyword argument 'speed'"),
    (["--loss_type", "sigmoid", "none"], "argument --loss_type/--loss-type: invalid choice: 'none'"),
    (["--dataloader_num_workers", "-1"], "--dataloader_num_workers must not be negative, not -1"),
    (["--max_grad_norm", "nan"], "--max_grad_norm must be a number, not nan"),
    (["--activation_offloading", "--use_cpu"], "--activation_offloading needs a GPU"),
    (["--eval_on_start"], "--eval_on_start needs an evaluation set"),
    (["--use_liger_kernel"], "--use_liger_kernel needs a package"),
    (["--push_to_hub"], "offline"),
]


@pytest.mark.parametrize(("flags", "reason"), REFUSED)
def test_options_that_a_training_would_refuse_too_late(flags, reason, tiny_llama, pair_file, tmp_path):
    with mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}):
        error = refusal(tiny_llama, tmp_path / "m", *flags, source=pair_file).splitlines()[-1]
    assert error.startswith("dpo.py: error: ") and reason in error
    assert not list((tmp_path / "m").glob("[!.]*"))
