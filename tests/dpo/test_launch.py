"""Training under `accelerate launch`: processes and configuration files."""

import pytest
from support import PROJECT, call, pair, weights, write_rows
from training import LAUNCH, SMALL, STEPS, interrupt, read_training, train


def test_accelerate_launch_gives_the_same_adapter(first_iteration, tiny_llama, pair_file, tmp_path):
    call(
        *LAUNCH, "dpo.py", "--dataset_path", pair_file, "--model_name_or_path", tiny_llama,
        "--output_dir", tmp_path / "m", "--seed", "0", *STEPS, *SMALL,
    )  # fmt: skip
    for ours, theirs in zip(weights(tmp_path / "m").values(), weights(first_iteration[0]).values(), strict=True):
        assert (ours - theirs).abs().max() < 1e-6


@pytest.mark.slow
def test_two_processes_resume_the_training_of_one(tiny_llama, tmp_path):
    """With a configuration file; the tests of the loop use one_gpu.yaml. A step of 4 crosses each end of 17 pairs."""
    pairs = [
        pair(f"What is {i}?" + " Say it." * (i % 7), f"It is {i}.", "Nobody knows." * (1 + i % 3)) for i in range(17)
    ]
    source = ("--dataset_path", write_rows(tmp_path / "pairs.json", pairs))
    steps = ("--max_steps", "10", "--save_steps", "2")
    _, single = train(tiny_llama, tmp_path / "1", *steps, source=source)
    interrupt(tmp_path / "1", tmp_path / "2", step=2)
    file = PROJECT / "accelerate_configs" / "data_parallel.yaml"
    done = call(
        "accelerate", "launch", "--config_file", file, "--num_processes", "2", PROJECT / "dpo.py", *source,
        "--model_name_or_path", tiny_llama, "--output_dir", tmp_path / "2", "--seed", "0", *STEPS, *SMALL, *steps,
        "--gradient_accumulation_steps", "1",
    )  # fmt: skip
    double = read_training(tmp_path / "2")
    assert "10 steps of 4 pairs, 2 process(es)" in done.stdout and double["processes"] == 2
    assert "The paper trains on 16 pairs per step, not 4" in done.stdout
    assert double["resumed_from"].endswith("checkpoint-2")
    for name in ("loss", "logps/chosen", "rewards/margins"):
        values = [[line[name] for line in one["log"][:10]] for one in (double, single)]
        assert values[0] == pytest.approx(values[1], abs=1e-3)
    for ours, theirs in zip(weights(tmp_path / "2").values(), weights(tmp_path / "1").values(), strict=True):
        assert (ours - theirs).abs().max() < 1e-4


def test_processes_that_see_different_folders_are_refused(tmp_path, monkeypatch):
    from grath.common.errors import UserError
    from grath.dpo import checkpoints

    monkeypatch.setattr(checkpoints, "gather_object", lambda own: [*own, ("interrupted", "checkpoint-2")])
    settings = {"output_dir": tmp_path / "m", "overwrite_output_dir": False, "model_name_or_path": "model"}
    with pytest.raises(UserError, match="the processes see different files in .*: all machines must share it"):
        checkpoints.agreed_state({}, settings)


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
