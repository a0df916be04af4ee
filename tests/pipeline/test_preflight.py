"""CHECK=1: the machine is checked for a run before the run starts."""

import json
import re
import shutil
import sysconfig

import pytest
from support import BUNDLED, call, check_here


def test_check_passes_and_prints_the_plan(tiny_llama, tmp_path):
    env = {"MODEL_NAME_OR_PATH": str(tiny_llama), "NUM_QUERY": "100", "DATA_PATH": str(BUNDLED), "CHECK": "1"}
    env |= {"RUNS_DIR": str(tmp_path / "runs"), "TASKS": "grath_mc1"}
    done = call("run_llama2.sh", env=env)
    checked = [line.split(":")[0].split(maxsplit=1)[1] for line in done.stdout.splitlines() if line.startswith("ok ")]
    assert checked == ["packages", "device", "model", "chat template", "memory", "data", "disk"]
    plan = done.stdout.split("The plan: 8 stages")[1].splitlines()[1:-1]
    assert [line.strip() for line in plan][1:3] == [
        "iteration 1: M_0 writes pairs",
        "iteration 1: DPO trains M_1",
    ]
    assert re.search(r"^ok    disk: .* free, about \d+ MB to write$", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-1] == "Ready: run the same command without CHECK=1"
    assert not (tmp_path / "runs").exists()


def test_check_names_everything_that_is_missing(tiny_llama, tmp_path):
    env = {"MODEL_NAME_OR_PATH": str(tiny_llama), "NUM_QUERY": "500", "DATA_PATH": str(BUNDLED)}
    done = check_here({**env, "RUNS_DIR": "/proc/runs", "TASKS": "hellaswag"}, status=2)
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert failed[0] == "FAIL  data: NUM_QUERY=500, but there are only 160 questions"
    assert failed[1].startswith("FAIL  disk: ") and "/proc" in failed[1]
    assert done.stderr == "grath.pipeline: error: not ready: data, disk; see above\n"
    done = check_here({**env, "NUM_QUERY": "5", "TASKS": "hellaswag"}, status=2)
    assert "FAIL  data: Rowan/hellaswag: " in done.stdout
    done = check_here({**env, "MODEL_NAME_OR_PATH": "nobody/nothing"}, status=2)
    assert "FAIL  model: nobody/nothing: " in done.stdout and "log in with `hf auth login`" in done.stdout


def test_check_and_stages_require_the_same_weights(tiny_llama, tmp_path):
    from grath.common.errors import UserError
    from grath.modeling.loading import check_weights, has_local_weights
    from grath.pipeline.preflight import read_model

    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    assert read_model(str(model))[2] > 10_000 and has_local_weights(str(model))
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    for look in (check_weights, read_model):
        with pytest.raises(
            UserError, match="lacks 1 of 2 weight files, starting with model-00002-of-00002.safetensors"
        ):
            look(str(model))
    assert not has_local_weights(str(model))
    (model / "model.safetensors.index.json").unlink()
    (model / "model-00001-of-00002.safetensors").rename(model / "pytorch_model.bin")
    for look in (check_weights, read_model):
        with pytest.raises(UserError, match="has no safetensors weights"):
            look(str(model))


@pytest.mark.parametrize("names", [["model"], ["model-00001-of-00002"]])
def test_check_does_not_count_half_a_model_of_the_hub(names, tiny_llama, tmp_path, monkeypatch):
    import huggingface_hub

    from grath.common.errors import UserError
    from grath.pipeline.preflight import read_model

    for name in names:
        shutil.copy(tiny_llama / "model.safetensors", tmp_path / f"{name}.safetensors")
    shutil.copy(tiny_llama / "config.json", tmp_path)
    if names != ["model"]:
        shards = {"a": f"{names[0]}.safetensors", "b": "model-00002-of-00002.safetensors"}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: str(tmp_path / "config.json"))
    if names == ["model"]:
        assert read_model("a/b")[2] == read_model(str(tiny_llama))[2]
    else:  # the hub knows, and cannot be asked here
        with pytest.raises(UserError, match="fetch it with prefetch.sh"):
            read_model("a/b")


def test_check_compares_packages_with_the_pins(tmp_path, monkeypatch):
    import torch

    from grath.common.errors import UserError
    from grath.pipeline import machine

    monkeypatch.setattr(machine, "PROJECT", tmp_path)
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# a note\npytest==0.1\nno-such-package==1; python_version < '3'\n")
    assert machine.check_packages(["bf16"]) == f"pytest is {pytest.__version__}, tested is 0.1"
    requirements.write_text(f"pytest=={pytest.__version__}\n")
    assert machine.check_packages(["int8"]) == "as pinned in requirements.txt"
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setenv("PATH", str(tmp_path))
        patch.delenv("CC", raising=False)
        with pytest.raises(UserError, match="there is no C compiler, which Triton needs"):
            machine.check_packages(["int8"])
        patch.setenv("CC", "gcc")
        patch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
        with pytest.raises(UserError, match=r"there is no .*/Python.h, which Triton needs"):
            machine.check_packages(["int8"])
        (tmp_path / "Python.h").touch()
        machine.check_packages(["int8"])
    requirements.write_text("no-such-package==1\n")
    with pytest.raises(UserError, match="no-such-package is missing: pip install -e . -c constraints.txt"):
        machine.check_packages(["bf16"])


@pytest.mark.parametrize(("capability", "fits"), [((9, 0), True), ((8, 9), True), ((6, 1), False)])
def test_driver_cuda_and_capability_are_shown_side_by_side(capability, fits, monkeypatch):
    import torch

    from grath.common.errors import UserError
    from grath.pipeline import machine

    monkeypatch.setenv("DEVICE", "")
    for module in (torch.cuda, torch.accelerator):
        monkeypatch.setattr(module, "is_available", lambda: True)
        monkeypatch.setattr(module, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a", "sm_120"])
    monkeypatch.setattr(machine, "driver_cuda_version", lambda: 12080)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    if not fits:
        with pytest.raises(UserError, match="compute capability 6.1; .* this torch has no code for the GPU"):
            machine.check_device(1)
        return
    text = machine.check_device(1)
    name = "{}.{}".format(*capability)
    assert text.startswith(f"1 GPU(s), a GPU, compute capability {name}; driver for CUDA 12.8; torch ")
    assert text.endswith(" for CUDA 13.0 (sm_75, sm_80, sm_90a, sm_120)")


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes torch see `count` GPUs with `free` and `total` bytes."""
    import torch

    def set_memory(free, total=None, count=1):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        # Another program uses 1 GB of the last one.
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (free - 10**9 * (i == count - 1 > 0), total or free))

    return set_memory


def plan_of(stage, size, **settings):
    """What CHECK=1 says of a stage's memory for a Llama-2 of this size."""
    from grath.modeling.memory import llama_2
    from grath.pipeline.machine import check_gpu_memory
    from grath.pipeline.settings import read_settings

    given = {"MODEL_NAME_OR_PATH": "a/b", "NUM_QUERY": "1119"}
    return check_gpu_memory(stage, llama_2(size), read_settings(environment=given | settings))


@pytest.mark.parametrize(
    ("stage", "start"),
    [("pairs", "int8, 96 rows"), ("dpo", "fp4, 8 pairs"), ("scores", "fp16, 16,384 tokens")],
)
def test_the_memory_of_each_stage_is_shown_by_part(stage, start, gpu):
    gpu(23.6e9)
    text = plan_of(stage, "7B")
    need, parts = re.fullmatch(rf"{start}: ([\d.]+) GB of 23.6 GB free \((.*)\)", text).groups()
    sizes = [float(value) * {"GB": 1, "MB": 1e-3}[unit] for value, unit in re.findall(r"([\d.]+) (GB|MB)", parts)]
    assert sum(sizes) == pytest.approx(float(need), abs=0.3) and float(need) < 22
    assert "weights" in parts and ("LoRA and optimizer" in parts) == (stage == "dpo")


# GPU memory, stage, model, settings, and the advice.
@pytest.mark.parametrize(
    ("free", "stage", "size", "settings", "advice"),
    [
        (23.6e9, "pairs", "13B", {"PAIRS_BATCH_SIZE": "64"}, "set PAIRS_BATCH_SIZE=32"),
        (23.6e9, "pairs", "13B", {"PAIRS_PRECISION": "fp16"}, "set PAIRS_PRECISION=int8"),
        (
            23.6e9,
            "pairs",
            "13B",
            {"PAIRS_PRECISION": "fp16", "PAIRS_BATCH_SIZE": "64"},
            "set PAIRS_PRECISION=int8 and PAIRS_BATCH_SIZE=32",
        ),
        (47.6e9, "pairs", "70B", {"PAIRS_BATCH_SIZE": "16"}, "set PAIRS_PRECISION=nf4"),
        (23.6e9, "dpo", "7B", {"DPO_BATCH_SIZE": "16"}, "set DPO_BATCH_SIZE=8"),
        (23.6e9, "scores", "13B", {}, "set EVAL_PRECISION=int8"),
        ((19.7e9, 23.6e9), "scores", "7B", {}, "set EVAL_BATCH_SIZE=4"),  # another program uses the rest
        (47.6e9, "scores", "70B", {}, "set EVAL_PRECISION=nf4"),
        (23.6e9, "dpo", "70B", {}, "and no smaller setting fits: end other programs on the GPU, or use a larger one"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_setting_that_does(free, stage, size, settings, advice, gpu):
    from grath.common.errors import UserError

    gpu(*(free if isinstance(free, tuple) else [free]))
    with pytest.raises(UserError) as refused:
        plan_of(stage, size, **settings)
    assert str(refused.value).endswith(advice) and "\n" not in str(refused.value)
    if "=" in advice:  # the advice fits
        plan_of(stage, size, **settings | dict(re.findall(r"(\w+)=(\w+)", advice)))


def test_the_fullest_gpu_of_the_processes_counts(gpu):
    from grath.common.errors import UserError

    gpu(23.6e9, count=2)
    assert "of 23.6 GB free" in plan_of("dpo", "7B")
    assert "of 22.6 GB free" in plan_of("dpo", "7B", NUM_PROCESSES="2")
    with pytest.raises(UserError, match="NUM_PROCESSES=3, but torch sees 2 GPU"):
        plan_of("dpo", "7B", NUM_PROCESSES="3")


def test_check_prints_a_line_for_each_stage_on_a_gpu(gpu):
    from grath.pipeline.preflight import check_stages

    gpu(80e9)
    config = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    for tasks, url, backend, gold, names in (
        ("grath_mc1", "", "hf-shared", "", ["pairs", "dpo", "scores"]),
        ("grath_mc1", "", "hf-shared", "truthful_qa", ["dpo", "scores"]),
        ("", "", "hf-shared", "", ["pairs", "dpo"]),
        ("grath_mc1", "http://a:1", "server", "", ["dpo"]),
        ("grath_mc1", "http://a:1", "hf-shared", "", ["dpo", "scores"]),
    ):
        values = {"PAIRS_PRECISION": "fp16", "DPO_PRECISION": "bf16", "EVAL_PRECISION": "fp16", "NUM_PROCESSES": "1"}
        values |= {"PAIRS_BATCH_SIZE": "8", "DPO_BATCH_SIZE": "", "GRADIENT_ACCUMULATION_STEPS": "", "NUM_QUERY": "9"}
        values |= {
            "EVAL_BATCH_SIZE": "",
            "TASKS": tasks,
            "MAX_NEW_TOKENS": "100",
            "BACKEND": backend,
            "SERVER_URL": url,
            "GOLD_PAIRS": gold,
        }
        printed = []
        model = ("a model", {**config, "vocab_size": 100}, 10**6)
        check_stages(lambda *check, printed=printed: printed.append((check[0], check[1]())), model, values, [])
        assert [name for name, _ in printed] == [f"memory, {name}" for name in names]
        assert all("of 80.0 GB free" in text for _, text in printed)


def test_a_cpu_is_for_small_models(monkeypatch):
    import psutil

    from grath.common.errors import UserError
    from grath.pipeline.machine import check_memory

    with pytest.raises(UserError, match="torch sees no GPU, and 15.4 GB of weights in bf16 would take weeks"):
        check_memory(7e9, ["bf16"], 1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2e9}))
    assert check_memory(1.35e8, ["bf16", "fp32"], 1).startswith("no GPU; 2.0 GB of main memory free, for 594 MB")
    with pytest.raises(UserError, match="2.0 GB of memory are free, and 594 MB of weights in bf16, fp32 need more"):
        check_memory(1.35e8, ["bf16", "fp32"], 2)


def test_a_start_says_when_fp16_fits(gpu, tmp_path):
    from grath.pipeline.machine import precision_hint
    from grath.pipeline.settings import read_settings

    config = {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32}
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 11008, "vocab_size": 32000}))
    given = {"MODEL_NAME_OR_PATH": str(tmp_path), "NUM_QUERY": "1119"}
    values = read_settings(environment=given)
    assert precision_hint(tmp_path, values) is None  # on a CPU
    gpu(80e9)
    assert precision_hint(tmp_path, values).startswith("PAIRS_PRECISION=fp16 fits too, and is faster: the host limits")
    assert precision_hint(tmp_path / "nothing", values) is None
    assert precision_hint(tmp_path, read_settings(environment={**given, "PAIRS_PRECISION": "nf4"})) is None
    gpu(16e9, 80e9)
    assert precision_hint(tmp_path, values) is None
    gpu(17e9)  # four rows in fp16, 64 in int8
    assert "fp16, 4 rows" in plan_of("pairs", "7B", PAIRS_PRECISION="fp16")
    assert precision_hint(tmp_path, values) is None


def test_the_disk_must_have_room_for_every_iteration(tiny_llama, tmp_path, monkeypatch):
    from grath.common.errors import UserError
    from grath.pipeline.preflight import check_disk, disk_needed, read_model
    from grath.pipeline.settings import read_settings

    given = {"MODEL_NAME_OR_PATH": str(tiny_llama), "NUM_QUERY": "1119", "RUNS_DIR": str(tmp_path), "SAVE_STEPS": "1"}
    model = read_model(str(tiny_llama))
    once, ten_times = (read_settings(environment={**given, "ITERATIONS": count}) for count in ("1", "10"))
    need = disk_needed(model[1], once, 0)
    # Adapters of this model have 24 kB, and a checkpoint three times that.
    assert 1000 * 3 * 24e3 < need < 2 * 1000 * 3 * 24e3
    assert 9 * need < disk_needed(model[1], ten_times, 0) < 11 * need
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 0, 2 * need))
    assert "to write" in check_disk(model, once)
    with pytest.raises(UserError, match="are free in .* and all iterations write about"):
        check_disk(model, ten_times)
