"""The device that a stage uses, and what is refused. Most tests patch torch, so they need no GPU."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import accelerate
import peft
import pytest
import torch
from support import BUNDLED, PROJECT, call, call_here, patch_gpus, stages

from grath.common.errors import UserError
from grath.modeling import loading
from grath.modeling.devices import check_devices, describe_device

SEEN = {"DEVICE": "", "ACCELERATE_USE_CPU": "", "CUDA_VISIBLE_DEVICES": "0"}


@pytest.fixture(autouse=True)
def no_device_is_set(monkeypatch):
    monkeypatch.setenv("DEVICE", "")


@pytest.mark.skipif(
    any(Path("/dev").glob("nvidia[0-9]*")), reason="this machine has a GPU, and torch may be able to use it"
)
def test_a_gpu_that_torch_cannot_use_is_refused_by_every_stage(tiny_llama, pair_file, tmp_path):
    """Slurm or the user names a GPU, and torch sees none: the run must not start on the CPU."""
    out = tmp_path / "out"
    commands = list(stages(tiny_llama, pair_file, out).values())
    loop = {"MODEL_NAME_OR_PATH": str(tiny_llama), "RUNS_DIR": str(out), "DATA_PATH": str(BUNDLED)}
    for done in (
        *(call_here(*command, env=SEEN, status=2) for command in commands),
        call("run_llama2.sh", env={**SEEN, **loop}, status=2),
    ):
        assert "this machine has a GPU (CUDA_VISIBLE_DEVICES=0), but torch cannot use it: " in done.stderr
        assert done.stderr.endswith("(set DEVICE=cpu to use the CPU)\n") and done.stderr.count("\n") == 1
    assert not out.exists()
    call(*commands[0], env={**SEEN, "DEVICE": "cpu"})  # read before torch is imported
    assert list(out.glob("p_*False.json"))


def test_hidden_gpus_are_no_error(monkeypatch):
    patch_gpus(monkeypatch, 0)
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        check_devices(4)
    assert describe_device() == "the CPU (torch sees no GPU)"


def test_the_evidence_of_a_gpu_and_torchs_reason(monkeypatch):
    patch_gpus(monkeypatch, 0)
    old = RuntimeError("The NVIDIA driver is too old (found version 11040).\nPlease update it.")
    monkeypatch.setattr(torch.cuda, "init", Mock(side_effect=old))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError, match=r"\(CUDA_VISIBLE_DEVICES=0,1\).* too old \(found version 11040\) \(set DEVICE"):
        check_devices()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: iter([folder / "nvidia0"]))
    with pytest.raises(UserError, match=r"this machine has a GPU \(/dev/nvidia0\)"):
        check_devices()


def test_more_processes_than_gpus_and_other_devices_are_refused(monkeypatch):
    patch_gpus(monkeypatch, 2)
    check_devices(2)
    with pytest.raises(UserError, match=r"NUM_PROCESSES=3, but torch sees 2 GPU\(s\)"):
        check_devices(3)
    # `accelerate launch --num_processes 4`, started by hand.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="NUM_PROCESSES=4"):
        check_devices()
    assert describe_device() == "2 GPU(s), a GPU"
    monkeypatch.setenv("DEVICE", "cuda:1")
    with pytest.raises(UserError, match="DEVICE must be cpu or empty"):
        check_devices()


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_weights_and_adapter_are_loaded_on_the_gpu_of_the_process(precision, monkeypatch, tiny_llama, tmp_path):
    """Not in main memory first, once for each process, and not through a context on the first GPU."""
    used, device = {}, torch.device("cuda:1")
    monkeypatch.setattr(loading, "resolve_base_and_adapter", lambda name: (str(tiny_llama), name))
    monkeypatch.setattr(loading, "check_layers", lambda model, folder: None)
    monkeypatch.setattr(accelerate, "PartialState", lambda: SimpleNamespace(device=device))
    info = {"missing_keys": set(), "unexpected_keys": set()}
    monkeypatch.setattr(loading, "_load", lambda *args, **options: used.update(options) or (None, info))
    monkeypatch.setattr(peft.PeftModel, "from_pretrained", lambda *args, **options: used.update(adapter=options))
    loading.load_model(str(tmp_path), precision)
    assert used["device_map"] == {"": device}
    assert used["adapter"]["torch_device"] == "cuda:1"


@pytest.mark.parametrize(
    ("module", "given"),
    [(module, {}) for module in ("dpo", "create_pair_responses", "grath.evaluation.run", "grath.run.settings")]
    + [("dpo", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}), ("dpo", {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"})],
)
def test_every_stage_sets_the_allocator_before_torch_is_imported(module, given):
    hook = "event == 'import' and args[0] == 'torch' and os.write(1, str(dict(os.environ)).encode()) and os._exit(0)"
    code = f"import os, sys; sys.addaudithook(lambda event, args: {hook}); import {module}, torch"
    environment = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, env=environment | given, capture_output=True, text=True, check=True
    )
    found = {name: value for name, value in ast.literal_eval(done.stdout).items() if name.endswith("ALLOC_CONF")}
    assert found == (given or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


def test_no_attention_is_computed_by_cudnn(tiny_llama):
    """It makes a plan for every new shape, and in training every step has a new one."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    loading.load_model(str(tiny_llama), "fp32")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
