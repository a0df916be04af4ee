"""Training under `accelerate launch`: processes and configuration files."""

import pytest
from support import PROJECT, call, weights
from training import LAUNCH, SMALL, STEPS, read_training, train


def test_accelerate_launch_gives_the_same_adapter(first_iteration, tiny_llama, pair_file, tmp_path):
    call(
        *LAUNCH, "dpo.py", "--dataset_path", pair_file, "--model_name_or_path", tiny_llama,
        "--output_dir", tmp_path / "m", "--seed", "0", *STEPS, *SMALL,
    )  # fmt: skip
    for ours, theirs in zip(weights(tmp_path / "m").values(), weights(first_iteration[0]).values(), strict=True):
        assert (ours - theirs).abs().max() < 1e-6


@pytest.mark.slow
def test_two_processes_give_the_same_training(tiny_llama, pair_file, tmp_path):
    """With a configuration file; the tests of the loop use one_gpu.yaml."""
    source, steps = ("--dataset_path", pair_file), ("--max_steps", "7")  # more than two epochs
    _, single = train(tiny_llama, tmp_path / "1", *steps, source=source)
    file = PROJECT / "accelerate_configs" / "data_parallel.yaml"
    done = call(
        "accelerate", "launch", "--config_file", file, "--num_processes", "2", PROJECT / "dpo.py", *source,
        "--model_name_or_path", tiny_llama, "--output_dir", tmp_path / "m", "--seed", "0", *STEPS, *SMALL, *steps,
        "--gradient_accumulation_steps", "1",
    )  # fmt: skip
    assert "7 steps of 4 pairs, 2 process(es)" in done.stdout and read_training(tmp_path / "m")["processes"] == 2
    assert "The paper trains on 16 pairs per step, not 4" in done.stdout
    for ours, theirs in zip(read_training(tmp_path / "m")["log"][:7], single["log"][:7], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["rewards/margins"] == pytest.approx(theirs["rewards/margins"], abs=1e-3)
    for ours, theirs in zip(weights(tmp_path / "m").values(), weights(tmp_path / "1").values(), strict=True):
        assert (ours - theirs).abs().max() < 1e-3


def test_accelerate_configurations_load():
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    configs = {path.stem: load_config_from_file(str(path)) for path in (PROJECT / "accelerate_configs").glob("*.yaml")}
    assert configs["fsdp"].fsdp_config["fsdp_version"] == 2
    assert configs["deepspeed_zero2"].deepspeed_config["zero_stage"] == 2
    assert configs["deepspeed_zero2"].deepspeed_config["gradient_accumulation_steps"] == "auto"
    assert all(config.main_process_port == 0 for name, config in configs.items() if name != "one_gpu")
    assert {name: config.distributed_type for name, config in configs.items()} == {
        "one_gpu": DistributedType.NO,
        "data_parallel": DistributedType.MULTI_GPU,
        "fsdp": DistributedType.FSDP,
        "deepspeed_zero2": DistributedType.DEEPSPEED,
    }
