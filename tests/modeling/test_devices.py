"""The device that a stage uses, and what is refused. Most tests patch torch, so they need no GPU."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import BUNDLED, PROJECT, call

from grath.common.errors import UserError
from grath.modeling.devices import check_devices, describe_device, gpu_evidence

SEEN = {"DEVICE": "", "ACCELERATE_USE_CPU": "", "CUDA_VISIBLE_DEVICES": "0"}
needs_no_gpu = pytest.mark.skipif(
    any(Path("/dev").glob("nvidia[0-9]*")), reason="this machine has a GPU, and torch may be able to use it"
)


@pytest.fixture(autouse=True)
def clear_evidence(monkeypatch):
    gpu_evidence.cache_clear()
    monkeypatch.setenv("DEVICE", "")
    yield
    gpu_evidence.cache_clear()


@needs_no_gpu
def test_a_gpu_that_torch_cannot_use_is_refused_by_every_stage(tiny_llama, pair_file, tmp_path):
    """Slurm or the user names a GPU, and torch sees none: the run must not start on the CPU."""
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
        assert "this machine has a GPU (CUDA_VISIBLE_DEVICES=0), but torch cannot use it: " in done.stderr
        assert done.stderr.endswith("(set DEVICE=cpu to use the CPU)\n") and done.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists() and not (tmp_path / "runs" / "llama2_seed_0").exists()
    call("create_pair_responses.py", "--model_name_or_path", tiny_llama, *ask, env={**SEEN, "DEVICE": "cpu"})
    assert len(list((tmp_path / "out").iterdir())) == 1


def patch_torch(monkeypatch, reason=None, count=0):
    """Let torch see `count` GPUs, or fail to use CUDA with a `reason`."""

    def fail():
        raise RuntimeError(reason)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    if reason:
        monkeypatch.setattr(torch.cuda, "init", fail)


def test_the_error_contains_torchs_own_reason(monkeypatch):
    old = "The NVIDIA driver on your system is too old (found version 11040).\nPlease update it."
    patch_torch(monkeypatch, old)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(
        UserError, match=r"\(CUDA_VISIBLE_DEVICES=0,1\).* is too old \(found version 11040\) \(set DEVICE"
    ):
        check_devices()


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_are_no_error(hidden, monkeypatch):
    patch_torch(monkeypatch, "no")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    check_devices(4)
    assert describe_device() == "the CPU (torch sees no GPU)"


def test_the_evidence_of_a_gpu(monkeypatch, tmp_path):
    patch_torch(monkeypatch, "no")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\necho "GPU 0: NVIDIA H100 (UUID: x)"\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match=r"this machine has a GPU \((/dev/nvidia\d|nvidia-smi)\)"):
        check_devices()
    smi.write_text('#!/bin/sh\necho "NVIDIA-SMI has failed because it could not reach the driver."\nexit 9\n')
    gpu_evidence.cache_clear()
    assert not str(gpu_evidence()).startswith("nvidia-smi")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    patch_torch(monkeypatch, count=2)
    check_devices(2)
    with pytest.raises(UserError, match=r"NUM_PROCESSES=3, but torch sees 2 GPU\(s\)"):
        check_devices(3)
    # `accelerate launch --num_processes 4`, started by hand.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="NUM_PROCESSES=4"):
        check_devices()
    assert describe_device() == "2 GPU(s), a GPU"


def test_the_loop_checks_its_number_of_processes(tmp_path, monkeypatch):
    from grath.pipeline.settings import read_settings, run_folder
    from grath.pipeline.start import start

    patch_torch(monkeypatch, count=2)
    environment = {"MODEL_NAME_OR_PATH": "m", "NUM_QUERY": "1", "RUNS_DIR": str(tmp_path), "RUN_NAME": "run"}
    values = read_settings(environment={**environment, "NUM_PROCESSES": "3"})
    with pytest.raises(UserError, match="NUM_PROCESSES=3, but torch sees 2"):
        start(values)
    assert not run_folder(values).exists()


def test_a_device_other_than_cpu_is_refused(monkeypatch):
    monkeypatch.setenv("DEVICE", "cuda:1")
    with pytest.raises(UserError, match="DEVICE must be cpu or empty"):
        check_devices()


@pytest.mark.parametrize("precision", ["bf16", "fp32", "int8"])
def test_weights_and_adapter_are_loaded_on_the_gpu_of_the_process(precision, monkeypatch, tiny_llama, tmp_path):
    """Not in main memory first, once for each process, and not through a context on the first GPU."""
    import accelerate
    import peft

    from grath.modeling import loading

    class State:
        device = torch.device("cuda:1")

    used = {}
    (tmp_path / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{tiny_llama}"}}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    monkeypatch.setattr(accelerate, "PartialState", State)
    monkeypatch.setattr(loading, "_load", lambda *args, **options: used.update(options))
    monkeypatch.setattr(peft.PeftModel, "from_pretrained", lambda *args, **options: used.update(adapter=options))
    loading.load_model(str(tmp_path), precision)
    assert used["device_map"] == {"": State.device}
    assert used["adapter"]["torch_device"] == "cuda:1"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
    ],
)
@pytest.mark.parametrize("module", ["dpo", "create_pair_responses", "grath.evaluation.run", "grath.pipeline.settings"])
def test_every_stage_sets_the_allocator_before_torch_is_imported(given, expected, module):
    code = f"""
import os, sys, importlib.abc
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print({{n: v for n, v in os.environ.items() if n.endswith("ALLOC_CONF")}})
            sys.exit()
sys.meta_path.insert(0, Watch())
import {module}
import torch
"""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, env=environment | given, capture_output=True, text=True, check=True
    )
    assert ast.literal_eval(done.stdout) == expected


def test_no_attention_is_computed_by_cudnn(tiny_llama):
    """It makes a plan for every new shape, and in training every step has a new one."""
    import torch

    from grath.modeling.loading import load_model

    torch.backends.cuda.enable_cudnn_sdp(True)
    load_model(str(tiny_llama), "fp32")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
