"""Which device a stage computes on, and what is refused: torch's answers are those of stand-ins, for want of a GPU."""

import os
from pathlib import Path

import pytest
import torch
from conftest import BUNDLED, call

from grath.cli import UserError
from grath.devices import check_devices, machine, sign_of_a_gpu

SEEN = {"DEVICE": "", "ACCELERATE_USE_CPU": "", "CUDA_VISIBLE_DEVICES": "0"}
needs_no_gpu = pytest.mark.skipif(
    any(Path("/dev").glob("nvidia[0-9]*")), reason="there is a GPU, which may well be of use"
)


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    sign_of_a_gpu.cache_clear()
    monkeypatch.setenv("DEVICE", "")
    yield
    sign_of_a_gpu.cache_clear()


@needs_no_gpu
def test_a_gpu_that_torch_cannot_use_is_refused_by_every_stage(tiny_llama, pair_file, tmp_path):
    """Slurm or the user names a GPU, and torch has none: the run must not start on the CPU."""
    ask = ("--save_prefix", "x", "--save_dir", tmp_path / "out", "--data_path", BUNDLED, "--num_query", "1")
    train = ("--dataset_path", pair_file, "--output_dir", tmp_path / "out")
    loop = {"MODEL_NAME_OR_PATH": str(tiny_llama), "RUNS_DIR": str(tmp_path / "runs"), "DATA_PATH": str(BUNDLED)}
    for command, env in (
        (["create_pair_responses.py", "--model_name_or_path", tiny_llama, *ask], {}),
        (["dpo.py", "--model_name_or_path", tiny_llama, *train], {}),
        (["evaluation.sh", tiny_llama, tmp_path / "out"], {"TASKS": "grath_mc1"}),
        (["run_llama2.sh"], loop),
    ):
        done = call(*command, env={**SEEN, **env}, status=2)
        assert "there is a GPU here (CUDA_VISIBLE_DEVICES=0), but torch cannot use it: " in done.stderr
        assert done.stderr.endswith("(DEVICE=cpu says that the CPU is meant)\n") and done.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists() and not (tmp_path / "runs" / "llama2_seed_0").exists()
    call("create_pair_responses.py", "--model_name_or_path", tiny_llama, *ask, env={**SEEN, "DEVICE": "cpu"})
    assert len(list((tmp_path / "out").iterdir())) == 1


def stand_in(monkeypatch, reason=None, count=0):
    """A torch that sees `count` GPUs, or none for a `reason`."""

    def fail():
        raise RuntimeError(reason)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    if reason:
        monkeypatch.setattr(torch.cuda, "init", fail)


def test_torchs_own_reason_is_given(monkeypatch):
    old = "The NVIDIA driver on your system is too old (found version 11040).\nPlease update it."
    stand_in(monkeypatch, old)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError, match=r"\(CUDA_VISIBLE_DEVICES=0,1\).* is too old \(found version 11040\) \(DEVICE"):
        check_devices()


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpus_that_are_hidden_on_purpose_are_not_missed(hidden, monkeypatch):
    stand_in(monkeypatch, "no")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    check_devices(4)
    assert machine() == "the CPU: no GPU is seen"


def test_what_shows_a_gpu(monkeypatch, tmp_path):
    stand_in(monkeypatch, "no")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\necho "GPU 0: NVIDIA H100 (UUID: x)"\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match=r"there is a GPU here \((/dev/nvidia\d|nvidia-smi)\)"):
        check_devices()
    smi.write_text('#!/bin/sh\necho "NVIDIA-SMI has failed because it could not reach the driver."\nexit 9\n')
    sign_of_a_gpu.cache_clear()
    assert not str(sign_of_a_gpu()).startswith("nvidia-smi")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    stand_in(monkeypatch, count=2)
    check_devices(2)
    with pytest.raises(UserError, match=r"NUM_PROCESSES=3, but 2 GPU\(s\) are seen"):
        check_devices(3)
    # What `accelerate launch --num_processes 4` has started by hand.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="NUM_PROCESSES=4"):
        check_devices()
    assert machine() == "2 GPU(s), a GPU"


def test_the_loop_hands_its_processes_to_that_check(tmp_path, monkeypatch):
    import sys

    from grath import supervise

    stand_in(monkeypatch, count=2)
    line = ["supervise", "begin", str(tmp_path / "run"), "--", "NUM_PROCESSES=3"]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(UserError, match="NUM_PROCESSES=3, but 2"):
        supervise.main()
    assert not (tmp_path / "run").exists()


def test_another_word_than_cpu_is_refused(monkeypatch):
    monkeypatch.setenv("DEVICE", "cuda:1")
    with pytest.raises(UserError, match="DEVICE must be cpu, or empty"):
        check_devices()


@pytest.mark.parametrize("precision", ["bf16", "fp32", "int8"])
def test_weights_and_adapter_go_straight_to_the_processes_own_gpu(precision, monkeypatch, tiny_llama, tmp_path):
    """Not to main memory first, once for each process, and not through a context on the first GPU."""
    import accelerate
    import peft

    from grath import models

    class State:
        device = torch.device("cuda:1")

    asked = {}
    (tmp_path / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{tiny_llama}"}}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    monkeypatch.setattr(accelerate, "PartialState", State)
    monkeypatch.setattr(models, "_load", lambda *args, **options: asked.update(options))
    monkeypatch.setattr(peft.PeftModel, "from_pretrained", lambda *args, **options: asked.update(adapter=options))
    models.load_model(str(tmp_path), precision)
    assert asked["device_map"] == {"": State.device}
    assert asked["adapter"]["torch_device"] == "cuda:1"
