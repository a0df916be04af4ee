"""Training under `accelerate launch`: processes and configuration files."""

import shutil

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from support import PROJECT, call
from trainings import command, difference, interrupt, read_training

from grath.common.errors import UserError
from grath.modeling.devices import check_shared


def test_accelerate_launch_gives_the_same_adapter(first_iteration, tiny_llama, pair_file, tmp_path):
    """Whatever the user's accelerate configuration says, and whatever another job has left in the environment."""
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text(
        "{compute_environment: LOCAL_MACHINE, distributed_type: 'NO', mixed_precision: bf16, num_processes: 1, "
        "use_cpu: true, dynamo_config: {dynamo_backend: AOT_EAGER}}"
    )
    left = {"PMI_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "WORLD_SIZE": "4", "RANK": "1"}
    flags = command(tiny_llama, tmp_path / "m")
    call("accelerate", "launch", "dpo.py", "--dataset_path", pair_file, *flags, env={"HF_HOME": str(tmp_path), **left})
    assert difference(tmp_path / "m", first_iteration[0]) < 1e-6
    assert not read_training(tmp_path / "m")["settings"]["bf16"]


@pytest.mark.slow
def test_two_processes_run_the_second_iteration_of_one(llama_run, tmp_path):
    """The second iteration loads an adapter in every process. The pair files are equal, byte for byte."""
    whole, settings, _ = llama_run
    run = tmp_path / whole.name
    shutil.copytree(whole, run)
    for path in [*run.glob("data/iter1_*"), *run.glob("data/.iter1_*")]:
        path.unlink()
    (second,) = run.glob("models/iter_2_*")
    shutil.rmtree(second)
    shutil.rmtree(run / "results" / "iter_2")  # of the model that was there
    done = call("run_llama2.sh", env={**settings, "RUNS_DIR": str(tmp_path), "NUM_PROCESSES": "2", "TASKS": ""})
    assert "2 process(es)" in done.stdout
    for path in whole.glob("data/iter*e.json"):
        assert (run / "data" / path.name).read_bytes() == path.read_bytes()
    assert read_training(second)["processes"] == 2
    assert difference(second, whole / second.relative_to(run)) < 1e-5


@pytest.mark.slow
def test_two_processes_resume_the_training_of_one(seventeen, tiny_llama, tmp_path):
    """With a configuration file; the tests of the loop use one_gpu.yaml. A step of 4 crosses each end of 17 pairs."""
    flags, whole, single = seventeen
    interrupt(whole, tmp_path / "2", step=2)
    file = PROJECT / "accelerate_configs" / "data_parallel.yaml"
    flags = command(tiny_llama, tmp_path / "2", *flags, "--gradient_accumulation_steps", "1")
    done = call("accelerate", "launch", "--config_file", file, "--num_processes", "2", PROJECT / "dpo.py", *flags)
    double = read_training(tmp_path / "2")
    assert "12 steps of 4 pairs, 2 process(es)" in done.stdout and double["processes"] == 2
    assert "The paper trains on 16 pairs per step, not 4" in done.stdout
    assert double["resumed_from"].endswith("checkpoint-2")
    for name in ("loss", "logps/chosen", "rewards/margins"):
        values = [[line[name] for line in one["log"][:12]] for one in (double, single)]
        assert values[0] == pytest.approx(values[1], abs=1e-3)
    assert difference(tmp_path / "2", whole) < 1e-4


def test_processes_that_see_different_folders_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("grath.modeling.devices.init_distributed", lambda: None)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [*own, ("interrupted", "checkpoint-2")])
    with pytest.raises(UserError, match="the processes see different files in .*: all machines must share it"):
        check_shared(("nothing", None), tmp_path)


def test_accelerate_configurations_load():
    configs = {path.stem: load_config_from_file(str(path)) for path in (PROJECT / "accelerate_configs").glob("*.yaml")}
    assert all(config.main_process_port == 0 for name, config in configs.items() if name != "one_gpu")
    kinds = {"one_gpu": "NO", "data_parallel": "MULTI_GPU", "fsdp": "FSDP", "deepspeed_zero2": "DEEPSPEED"}
    assert {name: config.distributed_type.name for name, config in configs.items()} == kinds
