"""The demo with reduced sizes."""

import json
import sys
from pathlib import Path

import pytest
from support import PROJECT, call

pytestmark = pytest.mark.slow


def test_the_demo_on_smollm2_with_reduced_sizes(tmp_path):
    env = {
        "NUM_QUERY": "4",
        "SAMPLES": "0",
        "MAX_STEPS": "1",
        "DPO_BATCH_SIZE": "2",
        "GRADIENT_ACCUMULATION_STEPS": "1",
        "WARMUP_STEPS": "0",
        "ITERATIONS": "1",
        "LIMIT": "2",
        "RUNS_DIR": str(tmp_path),
    }
    # `make` itself, where the tests run in the environment that it makes.
    made = Path(sys.prefix) == PROJECT / ".venv" and (PROJECT / ".venv" / "run.stamp").exists()
    done = call("make", "demo", env=env) if made else call("run_smollm2.sh", env=env)
    table = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("M_")]
    assert table == ["M_0", "M_1"]
    record = json.loads(next((tmp_path / "smollm2_seed_0" / "models").glob("iter_1*/grath.json")).read_text())
    assert record["settings"]["precision"] in ("bf16", "fp4")
