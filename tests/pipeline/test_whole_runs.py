"""Whole runs of the READMEs with reduced sizes."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from support import HUB, PROJECT, call, needs_hub

pytestmark = pytest.mark.slow


def test_the_demo_on_smollm2_with_reduced_sizes(tmp_path):
    env = {
        "NUM_QUERY": "6",
        "MAX_STEPS": "1",
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


@needs_hub
def test_the_experiments_commands_with_reduced_sizes(tiny_llama, tmp_path):
    """On a tiny model: the first control without scores, dry runs of the others, and the report.

    `test_all_tasks_of_the_leaderboard_offline` scores these very tasks.
    """
    text = (PROJECT / "results" / "README.md").read_text(encoding="utf-8")
    blocks = [block for _, block in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)]
    settings, first, *others, report = next(b for b in blocks if "RUN_NAME=rolling" in b).splitlines()
    for name, value in {"MAX_STEPS": 1, "WARMUP_STEPS": 0}.items():
        settings, changed = re.subn(rf"\b{name}=\d+", f"{name}={value}", settings)
        assert changed == 1
    settings, changed = re.subn(r'TASKS="truthfulqa_mc1 truthfulqa_mc2"', "TASKS=", settings)
    assert changed == 1
    names = [re.match(r"RUN_NAME=(\S+) ", line)[1] for line in (first, *others)]
    compared = re.findall(r"runs/(\S+)", report)
    assert report == " ".join(["python -m grath.report", *(f"runs/{run}" for run in compared)])
    assert [run for run in compared if run.endswith("_seed_0")] == [f"{name}_seed_0" for name in names]
    assert {re.sub(r"_seed_\d$", "", run) for run in compared} == set(names)
    runs = tmp_path / "runs"
    quoted = shlex.quote(str(runs))
    script = f"set -e\n{settings}\n{first}\n" + "".join(f"DRY_RUN=1 {line}\n" for line in others)
    for run in compared[1:]:
        script += f"cp -r {quoted}/{compared[0]} {quoted}/{run}\n"
    env = {"folder": str(HUB), "MODEL_NAME_OR_PATH": str(tiny_llama), "RUNS_DIR": str(runs)}
    done = call("bash", "-c", script + report.replace("runs/", f"{quoted}/"), env=env)
    lines = [line for line in done.stdout.splitlines() if re.match(r"accelerate launch .*dpo\.py", line)]
    words = [shlex.split(line) for line in lines[-9:]]
    models = [line[line.index("--model_name_or_path") + 1] for line in words]
    assert {models[at] for at in (0, 5, 7)} == {"models/qwen2.5-coder-0.5b"}
    assert {models[at] for at in (1, 3, 6, 8)} == {"models/qwen2.5-coder-1.5b"}
    assert "rolling_1.5b_seed_0/models/iter_1" in models[2] and "fixed_1.5b_seed_0/models/iter_1" in models[4]
    assert ["--reference fixed" in line for line in lines[-9:]] == [False] * 3 + [True] * 2 + [False] * 4
    assert ["--dataset_name truthful_qa" in line for line in lines] == [True] * 5 + [False] * 11
    asks = [line for line in done.stdout.splitlines() if "create_pair_responses.py" in line]
    assert ["--demos misconceptions" in line for line in asks] == [False] * 7 + [True, True, False, False]
    assert ["--useGT" in line for line in asks] == [False] * 9 + [True, True]
    assert all("--data_name allenai/ai2_arc --subdata_name ARC-Challenge --split train" in line for line in asks)
    trained = json.loads(next((runs / f"{names[0]}_seed_0" / "models").glob("iter_1*/grath.json")).read_text())
    assert trained["pairs"]["read"] == 200
    facts = (runs / "comparison.md").read_text()
    for name in names:
        assert f"| {name}" in facts
