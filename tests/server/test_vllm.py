"""The engine `server` against a real vLLM on the CPU, with SmolLM2 in fp32. `make test-server` sets it up."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from support import BUNDLED, HUB, PROJECT, asking, call, needs_hub, rows, score_values, wait_for

pytestmark = pytest.mark.server
VLLM = os.environ.get("VLLM_PYTHON")
SECONDS_TO_START = 900


def listing(url):
    """The names of the models that a server has; None if it does not answer."""
    with suppress(OSError), urllib.request.urlopen(f"{url}/v1/models", timeout=10) as response:
        return [entry["id"] for entry in json.load(response)["data"]]


@pytest.fixture(scope="session")
def vllm(smollm2, tmp_path_factory):
    """The address of a server that can load adapters."""
    if not VLLM:
        pytest.skip("VLLM_PYTHON names no environment with vLLM: `make test-server`")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log"
    command = [
        VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", smollm2, "--port", port, "--dtype", "float32",
        "--enable-lora", "--max-lora-rank", 8, "--lora-target-modules", "q_proj", "k_proj", "v_proj",
        "--max-model-len", 4096, "--max-num-seqs", 128,
    ]  # fmt: skip
    env = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "4", "HF_HUB_OFFLINE": "1"}
    env = {name: value for name, value in env.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS", "VIRTUAL_ENV")}
    with log.open("w") as file:
        process = subprocess.Popen(
            list(map(str, command)), cwd=log.parent, env=env, stdout=file, stderr=file, start_new_session=True
        )
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS_TO_START
    try:
        while not listing(url):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@needs_hub
def test_pairs_are_those_of_the_engine_and_no_response_is_asked_for_twice(vllm, smollm2, tmp_path):
    """128 ARC questions, killed in the middle: the file is that of one process in fp32, byte for byte."""
    env = {"DATASETS_ROOT": str(HUB), "OMP_NUM_THREADS": ""}
    of_arc = ("--data_path", "", "--useFS")
    flags = ("--precision", "auto", "--engine", "server", "--server_url", vllm, "--batch_size", 32)
    command = asking(smollm2, tmp_path / "server", *of_arc, *flags, count=128)
    script = list(map(str, [sys.executable, PROJECT / command[0], *command[1:]]))
    saved = lambda: sum(p.read_text().count("\n[") for p in (tmp_path / "server").glob(".*.responses*"))  # noqa: E731
    with subprocess.Popen(script, env={**os.environ, **env}) as process:
        wait_for(lambda: saved() >= 50, process)
        process.kill()
    done = call(*command, env=env)
    before = int(re.search(r"(\d+) of 128 questions were answered", done.stdout)[1])
    assert 50 <= before < 128 and f"Asking {128 - before} questions" in done.stdout
    call(*asking(smollm2, tmp_path / "here", *of_arc, count=128), env=env)
    (ours,), (theirs,) = (list((tmp_path / name).glob("*_True.json")) for name in ("server", "here"))
    assert len(rows(ours)) > 80 and ours.read_bytes() == theirs.read_bytes()


def test_two_iterations_with_adapters_that_are_loaded_at_run_time(vllm, smollm2, tmp_path):
    env = {
        "MODEL_NAME_OR_PATH": str(smollm2), "RUNS_DIR": str(tmp_path), "SERVER_URL": vllm, "DATA_PATH": str(BUNDLED),
        "NUM_QUERY": "24", "MAX_STEPS": "2", "WARMUP_STEPS": "0", "TASKS": "grath_mc1 grath_mc2", "LIMIT": "20",
        "OMP_NUM_THREADS": "",
    }  # fmt: skip
    call("run_smollm2.sh", env=env)
    run = tmp_path / "smollm2_seed_0"
    again = call("run_smollm2.sh", env=env).stdout
    assert again.count(", finished") == 4
    loaded = Path(re.search(r"M_2 is the LoRA adapter in (.*)", again)[1])
    assert not [name for name in listing(vllm) if name.startswith("grath-")]
    # The served adapter scores as the local one does.
    here = {"TASKS": "grath_mc1 grath_mc2", "LIMIT": "20", "EVAL_PRECISION": "fp32", "OMP_NUM_THREADS": ""}
    call("evaluation.sh", loaded, tmp_path / "here", env=here)
    assert score_values(run / "results" / "iter_2") == pytest.approx(score_values(tmp_path / "here"), abs=0.1)
