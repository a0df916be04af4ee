"""The paper's defaults, and options from a YAML file."""

from types import SimpleNamespace

import pytest
from support import call_here
from training import SMALL, read_training, train


def test_defaults_are_the_papers():
    from grath.dpo.config import GrathDPOConfig

    config = GrathDPOConfig(output_dir="unused")
    expected = {
        "beta": 0.1,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 100,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_steps": 1000,
        "max_length": 1024,
        "loss_type": ["sigmoid"],
        "seed": 0,
        "disable_dropout": True,
        "report_to": [],
    }
    assert {name: getattr(config, name) for name in expected} == expected
    import torch

    assert config.optim == ("paged_adamw_32bit" if torch.cuda.is_available() else "adamw_torch")
    assert config.precision == ("fp4" if torch.cuda.is_available() else "bf16")
    # Every step uses all weights of the adapter.
    assert config.ddp_find_unused_parameters is False
    assert GrathDPOConfig(output_dir="unused", ddp_find_unused_parameters=True).ddp_find_unused_parameters


@pytest.mark.parametrize(("batch", "processes", "expected"), [(4, 1, 4), (4, 2, 2), (8, 2, 1), (4, 8, 1), (16, 1, 1)])
def test_accumulation_keeps_the_papers_batch(batch, processes, expected):
    from grath.dpo.defaults import step_sizes

    assert step_sizes(processes, batch) == (batch, expected)


def test_only_trackers_on_this_machine_are_accepted(monkeypatch):
    from transformers import integrations

    from grath.common.errors import UserError
    from grath.dpo.config import GrathDPOConfig

    monkeypatch.setattr(integrations, "get_available_reporting_integrations", lambda: ["wandb"])
    for names in ("none", "all", "wandb", ["wandb"]):
        GrathDPOConfig(output_dir="unused", report_to=names)
    with pytest.raises(UserError, match="there is no tracker trackio, or its package is not installed"):
        GrathDPOConfig(output_dir="unused", report_to=["wandb", "trackio"])


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 5, 8, 16, 20])
def test_the_memory_does_not_change_the_pairs_of_a_step(processes):
    from math import prod

    from grath.dpo.defaults import step_sizes

    sizes = {fitting: step_sizes(processes, fitting=fitting) for fitting in (16, 8, 4, 2, 1)}
    assert len({prod(pair) for pair in sizes.values()}) == 1
    assert all(batch <= fitting for fitting, (batch, _) in sizes.items())
    # Nor does a smaller batch, which is the advice when the memory is full.
    assert all(prod(step_sizes(processes, batch)) == prod(sizes[16]) for batch in (1, 2) if batch <= prod(sizes[16]))
    total = processes * prod(sizes[16])
    assert total == 16 if processes in (1, 2, 4, 8, 16) else total <= max(16, processes)
    assert step_sizes(1, 4) == step_sizes(1, None, 4) == (4, 4) and step_sizes(2, None, 5) == (4, 5)


# GB of the smallest GPU, processes, and pairs per forward pass and passes per step for Llama-2 7B in fp4.
@pytest.mark.parametrize(
    ("memory", "processes", "sizes"),
    [(84.9, 1, (16, 1)), (84.9, 4, (4, 1)), (23.6, 1, (8, 2)), (23.6, 2, (8, 1)), (16, 1, (4, 4)), (4, 1, (1, 16))],
)
def test_a_gpu_takes_as_many_pairs_as_fit(memory, processes, sizes, monkeypatch, capsys):
    import torch
    from datasets import Dataset

    from grath.dpo import config as module
    from grath.modeling.memory import llama_2

    def config(**options):
        return module.GrathDPOConfig(output_dir="unused", precision="bf16", optim="adamw_torch", bf16=False, **options)

    gpus = [SimpleNamespace(total_memory=gigabytes * 1e9) for gigabytes in (memory + 1, memory)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    monkeypatch.setattr(module, "load_shape", lambda name: llama_2("7B"))
    given = [config(), config(per_device_train_batch_size=4), config(gradient_accumulation_steps=2)]
    assert [one.fits_batch_size for one in given] == [False] * 3  # on a CPU
    chosen = config()
    chosen.fits_batch_size, chosen.precision = True, "fp4"
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    row = {"prompt_ids": [1] * 50, "chosen_ids": [1] * 40, "rejected_ids": [1] * 40}
    changed = [module.fit_batch_size(one, "a/b", Dataset.from_list([row])) for one in (*given, chosen)]
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    assert changed == [{}] * 3 + [dict(zip(names, sizes, strict=True))]  # for the record
    found = [(one.per_device_train_batch_size, one.gradient_accumulation_steps) for one in (*given, chosen)]
    assert found == [(4, 4), (4, 4), (4, 2), sizes]
    line = f"{sizes[0]} pairs per forward pass, chosen for a GPU of {memory:.0f} GB, and {sizes[1]} passes per step\n"
    assert capsys.readouterr().out == line
    # Longer pairs need more memory; without tokens their length is not known.
    module.fit_batch_size(
        chosen, "a/b", Dataset.from_list([row | {"chosen_ids": [1] * 1000, "rejected_ids": [1] * 1000}])
    )
    assert chosen.per_device_train_batch_size <= sizes[0]
    assert processes > 1 or chosen.per_device_train_batch_size < sizes[0] or sizes[0] == 1
    before = chosen.per_device_train_batch_size
    module.fit_batch_size(chosen, "a/b", Dataset.from_list([{"chosen": "a", "rejected": "b"}]))
    assert chosen.per_device_train_batch_size == before
    # A small GPU that no process uses does not count.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    gpus[1].total_memory = 1
    module.fit_batch_size(chosen, "a/b", Dataset.from_list([row]))
    assert chosen.per_device_train_batch_size >= sizes[0]


def test_the_record_has_the_batch_that_the_gpu_takes(tiny_llama, pair_file, tmp_path, monkeypatch):
    from grath.dpo import config

    def fit(chosen, name, dataset):
        chosen.per_device_train_batch_size, chosen.gradient_accumulation_steps = 4, 1
        return {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}

    monkeypatch.setattr(config, "fit_batch_size", fit)
    _, record = train(tiny_llama, tmp_path / "out", source=["--dataset_path", pair_file])
    assert record["settings"]["per_device_train_batch_size"] == 4
    assert record["settings"]["gradient_accumulation_steps"] == 1
    assert record["effective_batch"] == 4


def test_epochs_without_effect_are_refused():
    from grath.common.errors import UserError
    from grath.dpo.config import GrathDPOConfig

    with pytest.raises(UserError, match="--num_train_epochs has no effect unless --max_steps is -1"):
        GrathDPOConfig(output_dir="unused", num_train_epochs=1)
    assert GrathDPOConfig(output_dir="unused", num_train_epochs=1, max_steps=-1).num_train_epochs == 1


CONFIG = """
dataset_path: {pairs}
model_name_or_path: {model}
reference: fixed
sanity_check: true
learning_rate: 2e-3
beta: 0.3
loss_type: [sigmoid, ipo]
max_length: null
max_steps: 5
"""


def test_flags_override_the_yaml_file(tiny_llama, pair_file, tmp_path):
    config = tmp_path / "dpo.yaml"
    config.write_text(CONFIG.format(pairs=pair_file, model=tiny_llama))
    flags = ["--output_dir", tmp_path / "m", *SMALL, "--max_steps", "1", "--beta", "0.2"]
    call_here("dpo.py", "--config", config, *flags)
    expected = {
        "dataset_path": str(pair_file),
        "model_name_or_path": str(tiny_llama),
        "reference": "fixed",
        "sanity_check": True,
        "learning_rate": 2e-3,
        "beta": 0.2,
        "loss_type": ["sigmoid", "ipo"],
        "max_length": None,
        "max_steps": 1,
        "warmup_steps": 100,
    }
    settings = read_training(tmp_path / "m")["settings"]
    assert {name: settings[name] for name in expected} == expected


# The content of the file, and how the line begins.
INVALID = [
    ("learnin_rate: 1\nbeta: 0.1\nepochs: 2\n", "unknown keys in the --config file: learnin_rate, epochs (see --help)"),
    ("reference: none\n", "in the --config file: argument --reference: invalid choice: 'none' (choose from "),
    ("sanity_check: maybe\n", "in the --config file: argument --sanity_check/--sanity-check: Truthy value expected"),
    ("seed: 1.5\n", "in the --config file: argument --seed: invalid int value: '1.5' (see --help)"),
    ("beta: [0.1, 0.2]\n", "in the --config file: argument --beta: invalid float value: '[0.1, 0.2]' (see --help)"),
    ("beta: 0\n", "--beta must be greater than 0, not 0.0"),
    ("dataset_name: truthful_qa\n", "give either --dataset_path (a pair file) or --dataset_name"),
    ("- beta\n", "Config file {config} must contain a YAML mapping."),
    ("", "Config file {config} must contain a YAML mapping."),
    ("beta: [\n", "the --config file is not YAML: while parsing a flow node "),
    (b"tokenizer_name: caf\xe9\n", "the --config file is not UTF-8 text"),
    (None, "cannot read --config {config}: No such file or directory"),
]


def dpo_with(config, folder):
    """Run dpo.py with a --config file and all other options valid; expect status 2."""
    flags = ["--dataset_path", "pairs.json", "--model_name_or_path", "model", "--output_dir", folder / "out"]
    return call_here("dpo.py", *flags, "--config", config, status=2)


@pytest.mark.parametrize(("content", "line"), INVALID)
def test_an_invalid_yaml_file_is_one_line(content, line, tmp_path):
    config = tmp_path / "dpo.yaml"
    if content is not None:
        config.write_bytes(content if isinstance(content, bytes) else content.encode())
    done = dpo_with(config, tmp_path)
    assert done.stderr.startswith(f"dpo.py: error: {line.format(config=config)}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_name_of_the_yaml_file_is_checked(tmp_path):
    done = dpo_with(tmp_path, tmp_path)
    assert done.stderr == f"dpo.py: error: cannot read --config {tmp_path}: Is a directory\n"
    done = call_here("dpo.py", "--output_dir", tmp_path / "out", "--config", status=2)
    assert done.stderr == "dpo.py: error: argument --config: expected one argument (see --help)\n"
    done = call_here("dpo.py", "--model_name_or_path", "m", "--output_dir", tmp_path / "out", "--conf", "x", status=2)
    assert done.stderr == "dpo.py: error: unrecognized arguments: --conf x (see --help)\n"
