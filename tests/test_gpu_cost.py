"""The count of what a GPU does, on a few questions."""

import json
import re
import sys

import pytest
from support import PROJECT, call, cells_of

from grath.common.errors import UserError
from grath.modeling.norms import fuse_norms

STAGES = ("pairs", "dpo", "arc_challenge", "hellaswag", "mmlu", "truthfulqa")
COUNTED = {"questions", "forwards", "launches", "host_syncs", "tokens", "peak_gb", "minutes"}


@pytest.mark.slow
def test_every_stage_is_counted(tiny_llama, tmp_path):
    file = tmp_path / "cost.json"
    script = PROJECT / "benchmarks" / "gpu_cost.py"
    small = ("--limit", "20", "--dpo_steps", "1", "--tokenizer", tiny_llama)
    done = call(sys.executable, script, *small, "--markdown", "--json", file, env={"DATASETS_ROOT": ""})
    content = json.loads(file.read_text())
    assert set(STAGES) <= set(content["stages"]) and content["total_minutes"] > 0
    assert done.stdout.startswith("| stage |")
    for name, stage in content["stages"].items():
        assert set(stage) >= COUNTED and min(stage[key] for key in COUNTED) >= 0, name
        assert f"| {name} | {stage['questions']:,} | {stage['forwards']:,} | {stage['launches']:,} |" in done.stdout
    rows = [row for row in cells_of(done.stdout) if row[0].startswith("`./run_")]
    assert [(row[0], *row[1:3]) for row in rows[:2]] == [("`./run_llama2.sh`", form, "2") for form in ("int8", "fp16")]
    assert (
        len(rows) == 6 and rows[0][3] == f"{content['total_minutes']:.0f} min ({content['total_minutes'] / 60:.1f} h)"
    )
    stages = content["stages"]
    # Half the steps in two iterations save the minutes of one training, and these are rounded.
    llama2, zephyr = (float(rows[i][3].split()[0]) for i in (0, 2))
    assert llama2 - zephyr == pytest.approx(stages["dpo"]["minutes"], abs=1)
    assert stages["dpo"]["minutes"] > 1
    # Prefix and prefills of 16 rows, then a step for each token of the longest completions: 40 to 100 tokens.
    assert 40 + 3 <= stages["pairs"]["forwards"] <= 100 + 3
    # A synchronization for each pass but the prefix's.
    assert stages["pairs in fp16"]["host_syncs"] == stages["pairs"]["forwards"] - 1
    # Two operations for each of the 6.5 billion parameters in a layer's matrices, for each token.
    for name in ("pairs in fp16", "arc_challenge", "mmlu"):
        assert stages[name]["pflop"] == pytest.approx(2 * 6.5e9 * stages[name]["tokens"] / 1e15, rel=0.1, abs=0.01)
    assert stages["pairs"]["launches"] > 2 * stages["pairs in fp16"]["launches"]
    assert stages["hellaswag"]["forwards"] <= 0.25 * 20 and stages["arc_challenge"]["forwards"] <= 0.3 * 20
    for name in ("arc_challenge", "hellaswag"):
        assert stages[name]["host_syncs"] <= stages[name]["forwards"]
    # The reference's passes, of 16 pairs, and 1,000 steps.
    assert stages["dpo"]["forwards"] == 1002 < stages["dpo on 24 GB"]["forwards"]
    assert all(stage["peak_gb"] <= 22 for name, stage in stages.items() if not re.match("(pairs|dpo)(?!.*24 GB)", name))


def test_the_layers_that_are_not_run_are_counted(monkeypatch, llama_tokenizer):
    """Two layers, and as often as there are more, the difference to three, is what a run of all layers gives."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.syspath_prepend(str(PROJECT / "benchmarks"))
    import gpu_cost

    from grath.evaluation.loglikelihood import window_loglikelihoods
    from grath.generation import attention

    monkeypatch.setattr(attention, "fused_kernels_differ", lambda *_: None)
    monkeypatch.setitem(gpu_cost.LLAMA_2_7B, "num_hidden_layers", 6)
    windows = [((*range(1, 60), i), (j, 3)) for i in range(9) for j in (1, 2)] + [((7,) * 50, (3,))]
    run = lambda model, python: list(window_loglikelihoods(model, windows, 200))  # noqa: E731
    ours = gpu_cost.count_7b(10, run)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**gpu_cost.LLAMA_2_7B)).half().eval()
    direct = gpu_cost.Count(10)
    operators, python = gpu_cost.counter(direct, fuse_norms(model))
    with python, operators:
        run(model, python)
    assert len(ours.forwards) == len(direct.forwards) > 2
    for name in ("tokens", "launches", "host_syncs", "flops", "host"):
        assert ours.total(name) == pytest.approx(direct.total(name), rel=1e-9), name
    assert ours.seconds("H100 80 GB") == pytest.approx(direct.seconds("H100 80 GB"), rel=1e-9)
    assert ours.peak_bytes == direct.peak_bytes


def test_too_few_steps_to_measure_are_refused(monkeypatch):
    monkeypatch.syspath_prepend(str(PROJECT / "benchmarks"))
    import gpu_stages

    monkeypatch.setattr(sys, "argv", ["gpu_stages.py", "--dpo_steps", "5"])
    with pytest.raises(UserError, match="the first 5 are not measured"):
        gpu_stages.main()


@pytest.mark.slow
def test_the_stages_are_measured(monkeypatch, tiny_llama, tmp_path):
    monkeypatch.syspath_prepend(str(PROJECT / "benchmarks"))
    import gpu_cost
    import gpu_stages

    for name, size in gpu_cost.NARROW.items():
        monkeypatch.setitem(gpu_cost.LLAMA_2_7B, name, size)
    file = tmp_path / "stages.json"
    small = ["--limit", "3", "--layers", "2", "--rows", "4", "--dpo_steps", "6", "--tokenizer", str(tiny_llama)]
    monkeypatch.setattr(sys, "argv", ["gpu_stages.py", *small, "--json", str(file)])
    gpu_stages.main()
    stages = json.loads(file.read_text())
    of_pairs = {"pairs, 4 rows", "pairs, copied", "pairs in int8"}
    assert set(stages) == {*of_pairs, "dpo", "arc_challenge", "hellaswag", "mmlu", "truthfulqa"}
    assert all(stage["minutes"] > 0 for stage in stages.values())
    for name in of_pairs:
        tokens = stages[name]["tokens_per_s"] * stages[name]["seconds"]
        assert 40 <= tokens / stages[name]["questions"] <= 100
