"""CHECK=1: the machine is checked for a run before the run starts."""

import json
import re
import shutil
import socket
import sysconfig

import huggingface_hub
import pytest
import torch
from support import BUNDLED, call, check_here, patch_gpus

from grath.common.errors import UserError
from grath.modeling.loading import has_local_weights
from grath.run import check
from grath.run.check import check_disk, read_model
from grath.run.settings import read_settings


def test_check_passes_and_prints_the_plan(tiny_llama, tmp_path):
    env = {"MODEL_NAME_OR_PATH": str(tiny_llama), "NUM_QUERY": "100", "DATA_PATH": str(BUNDLED), "CHECK": "1"}
    env |= {"RUNS_DIR": str(tmp_path / "runs"), "TASKS": "grath_mc1"}
    done = call("run_llama2.sh", env=env)
    checked = [line.split(":")[0].split(maxsplit=1)[1] for line in done.stdout.splitlines() if line.startswith("ok ")]
    assert checked == ["packages", "device", "model", "chat template", "data", "disk"]
    plan = done.stdout.split("The plan: 8 stages")[1].splitlines()[1:-1]
    assert [line.strip() for line in plan][1:3] == ["iteration 1: M_0 writes pairs", "iteration 1: DPO trains M_1"]
    assert re.search(r"^ok    disk: .* free, about \d+ MB to write$", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-1] == "Ready: run the same command without CHECK=1"
    assert not (tmp_path / "runs").exists()


def test_check_names_everything_that_is_missing(tiny_llama, tmp_path):
    env = {"MODEL_NAME_OR_PATH": str(tiny_llama), "NUM_QUERY": "500", "DATA_PATH": str(BUNDLED)}
    done = check_here({**env, "RUNS_DIR": "/proc/runs", "TASKS": "hellaswag"}, status=2)
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert failed[0] == "FAIL  data: NUM_QUERY=500, but there are only 160 questions"
    assert failed[1].startswith("FAIL  disk: ") and "/proc" in failed[1]
    assert done.stderr == "grath.run: error: not ready: data, disk; see above\n"
    done = check_here({**env, "NUM_QUERY": "5", "TASKS": "hellaswag"}, status=2)
    assert "FAIL  data: Rowan/hellaswag: " in done.stdout
    done = check_here({**env, "NUM_QUERY": "5", "TASKS": "grath_mc1 grath_mc3"}, status=2)
    assert "FAIL  data: grath_mc3 is not a task of lm-evaluation-harness" in done.stdout
    done = check_here({**env, "MODEL_NAME_OR_PATH": "nobody/nothing"}, status=2)
    assert "FAIL  model: nobody/nothing: " in done.stdout and "log in with `hf auth login`" in done.stdout


def test_check_reads_the_questions_and_finds_cached_data_sets(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(hub)
    names = {"DATA_NAME": "truthfulqa/truthful_qa", "SUBDATA_NAME": "multiple_choice", "SPLIT": "validation"}
    env = {"MODEL_NAME_OR_PATH": "m", "NUM_QUERY": "1", "TASKS": ""}
    with pytest.raises(UserError, match="truthfulqa/truthful_qa/multiple_choice, row 1: not in the ARC schema"):
        check.check_data(read_settings({**env, **names}))
    assert check.check_data(read_settings(env)) == "30 questions; tasks: none"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    (tmp_path / "Rowan___hellaswag").mkdir()
    check.check_data(read_settings({**env, "DATA_PATH": str(BUNDLED), "TASKS": "hellaswag"}))


def test_the_hub_is_looked_for_where_it_is(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as mirror:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{mirror.getsockname()[1]}")
        for offline, reachable in (("0", True), ("1", False)):
            monkeypatch.setenv("HF_HUB_OFFLINE", offline)
            assert check.hub_is_reachable() == reachable


def test_check_requires_all_weights(model):
    assert read_model(str(model))[1].hidden_size == 64 and has_local_weights(str(model))
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UserError, match="lacks 1 of 2 weight files, starting with model-00002-of-00002"):
        read_model(str(model))
    assert not has_local_weights(str(model))


def test_check_does_not_count_half_a_model_of_the_hub(tiny_llama, tmp_path, monkeypatch):
    for name in ("model.safetensors", "config.json"):
        shutil.copy(tiny_llama / name, tmp_path)

    def download(_, name):
        if not (tmp_path / name).is_file():
            raise FileNotFoundError(name)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert read_model("a/b")[0] == "a/b"
    half, other = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    (tmp_path / "model.safetensors").rename(tmp_path / half)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": half, "b": other}}))
    with pytest.raises(UserError, match="fetch it with prefetch.sh"):  # the hub knows, and cannot be asked here
        read_model("a/b")


def test_check_refuses_a_model_without_the_layers_that_lora_trains(model):
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 600}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="^gpt2 has none of the layers that LoRA trains: q_proj, k_proj, v_proj$"):
        read_model(str(model))


def test_check_compares_packages_with_the_pins(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "PROJECT", tmp_path)
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# a note\npytest==0.1\nno-such-package==1; python_version < '3'\n")
    assert check.check_packages() == f"pytest is {pytest.__version__}, tested with 0.1"
    requirements.write_text(f"pytest=={pytest.__version__}\n")
    assert check.check_packages() == "as pinned in requirements.txt"
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setenv("PATH", str(tmp_path))
        patch.delenv("CC", raising=False)
        with pytest.raises(UserError, match="there is no C compiler, which Triton needs"):
            check.check_packages()
        patch.setenv("CC", "gcc")
        patch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
        with pytest.raises(UserError, match=r"there is no .*/Python.h, which Triton needs"):
            check.check_packages()
        (tmp_path / "Python.h").touch()
        check.check_packages()
    requirements.write_text("no-such-package==1\n")
    with pytest.raises(UserError, match="no-such-package is missing: pip install -e . -c constraints.txt"):
        check.check_packages()


def test_driver_cuda_and_capability_are_shown_side_by_side(monkeypatch):
    monkeypatch.setenv("DEVICE", "")
    patch_gpus(monkeypatch, 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a", "sm_120"])
    monkeypatch.setattr(check, "driver_cuda_version", lambda: 12080)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    text = check.check_device(1)
    assert text.startswith("1 GPU(s), a GPU, compute capability 8.9; driver for CUDA 12.8; torch ")
    assert text.endswith(" for CUDA 13.0 (sm_75, sm_80, sm_90a, sm_120)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    with pytest.raises(UserError, match="compute capability 6.1; .* this torch has no code for the GPU"):
        check.check_device(1)


def test_the_disk_must_have_room_for_every_iteration(tiny_llama, tmp_path, monkeypatch):
    given = {"MODEL_NAME_OR_PATH": str(tiny_llama), "NUM_QUERY": "1119", "RUNS_DIR": str(tmp_path), "SAVE_STEPS": "1"}
    config = read_model(str(tiny_llama))[1]
    once, ten_times = (read_settings({**given, "ITERATIONS": count}) for count in ("1", "10"))
    need, ten_needs = (int(re.search(r"about (\d+) MB", check_disk(config, values))[1]) for values in (once, ten_times))
    assert 1000 < need * 1e6 / check.TOKENIZER < 2000  # in each of 1,000 checkpoints
    assert 9 * need < ten_needs < 11 * need
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 0, 2e6 * need))
    assert "to write" in check_disk(config, once)
    with pytest.raises(UserError, match="are free in .* and all iterations write about"):
        check_disk(config, ten_times)
