"""Counts of what costs time on a GPU, and the benchmark of a GPU's stages."""

import json
import sys
from unittest.mock import Mock

import pytest
from support import PROJECT, call_here, stages, tiny
from transformers import AutoModelForCausalLM

from grath.generation.shared_prefix import generate_shared_prefix


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(PROJECT / "benchmarks"))


def test_forward_passes_of_pairs(llama_tokenizer):
    """One for the few-shot examples, one for each 16 prompts, and then one for each token of the longest completion."""
    from gpu_stages import drawn_lengths
    from made_requests import load_data, pair_prompts

    questions = load_data(40)[0]
    model = tiny("llama", vocab_size=len(llama_tokenizer), max_position_embeddings=8192)
    prompts, passes = pair_prompts(llama_tokenizer, questions), []  # the number of tokens of each forward pass
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: passes.append(args[0].numel()))
    with drawn_lengths(model):
        done = list(generate_shared_prefix(model, prompts, 100, 64, [model.config.vocab_size - 1]))
    lengths = [len(ids) for _, ids in done]
    assert sorted(i for i, _ in done) == [*range(40)] and 40 <= min(lengths) < max(lengths) <= 100
    assert len(passes) == 1 + 3 + max(lengths)
    prefix = passes[0]
    assert prefix > 0.8 * max(map(len, prompts))
    # The first token of each completion is a prefill's.
    assert sum(passes) == prefix + sum(len(prompt) - prefix for prompt in prompts) + sum(lengths)


def test_a_stage_loads_its_model_once(monkeypatch, tiny_llama, pair_file, tmp_path):
    load = Mock(wraps=AutoModelForCausalLM.from_pretrained)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    commands = stages(tiny_llama, pair_file, tmp_path)
    commands["s"] = ("grath.evaluation", tmp_path / "d", *commands["s"][2:])  # of an adapter
    for number, command in enumerate(commands.values(), start=1):
        call_here(*command)
        assert load.call_count == number, command


@pytest.mark.slow
def test_the_stages_are_measured(monkeypatch, tiny_llama, tmp_path):
    import gpu_stages

    narrow = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    monkeypatch.setattr(gpu_stages, "LLAMA_2_7B", gpu_stages.LLAMA_2_7B | narrow)
    file = tmp_path / "stages.json"
    small = ["--limit", "3", "--layers", "2", "--rows", "4", "--dpo_steps", "1", "--tokenizer", str(tiny_llama)]
    monkeypatch.setattr(sys, "argv", ["gpu_stages.py", *small, "--json", str(file)])
    gpu_stages.main()
    stages = json.loads(file.read_text())
    of_pairs = {"pairs, 4 rows", "pairs, copied", "pairs in int8"}
    assert set(stages) == {*of_pairs, "dpo", "arc_challenge", "hellaswag", "mmlu", "truthfulqa"}
    assert all(stage["minutes"] > 0 for stage in stages.values())
    for name in of_pairs:
        tokens = stages[name]["tokens_per_s"] * stages[name]["seconds"]
        assert 40 <= tokens / stages[name]["questions"] <= 100
