"""Which adapters the commands take: plain LoRA on linear layers; every other one is refused in one line by all."""

import json
import shutil

import pytest
from support import BUNDLED, call_here, change_json, check_here, save_adapter, stages, weights
from trainings import margin, train

from grath.common.errors import UserError
from grath.modeling.identity import model_identity

ATTENTION = ["q_proj", "k_proj", "v_proj"]
TAKEN = {
    "rank and scale": {"r": 3, "lora_alpha": 7},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"k_proj": 2}},
    "rank-stabilized": {"use_rslora": True, "target_modules": ["o_proj"]},
    "a pattern of names": {"target_modules": r".*\.(q|k|v)_proj"},
    "all linear layers": {"target_modules": "all-linear", "lora_dropout": 0.1},
    "one layer": {"layers_to_transform": [1]},
    "gaussian": {"init_lora_weights": "gaussian"},
}
REFUSED = {
    "DoRA": {"use_dora": True},
    "the head": {"target_modules": ["q_proj", "lm_head"]},
    "the embedding": {"target_modules": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [3, 4]},
    "whole modules": {"modules_to_save": ["norm"]},
    "biases": {"lora_bias": True, "bias": "lora_only"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "replicated layers": {"layer_replication": [[0, 2], [1, 2]]},
    "LoHa": {"kind": "LoHaConfig"},
    "another task": {"task_type": "FEATURE_EXTRACTION"},
}


@pytest.mark.parametrize("kind", TAKEN)
def test_a_rolling_iteration_starts_from_every_adapter_that_is_taken(kind, tiny_llama, pair_file, tmp_path):
    adapter = save_adapter(tiny_llama, tmp_path / "a", **{"target_modules": ATTENTION, **TAKEN[kind]})
    flags = ("--dataset_path", pair_file, "--max_steps", "1", "--learning_rate", "1e-9")
    _, record = train(adapter, tmp_path / "d", source=flags)
    scale = abs(record["log"][0]["logps/chosen"]) + abs(record["log"][0]["logps/rejected"])
    assert abs(margin(record)) < 1e-5 * scale and abs(record["log"][0]["rewards/chosen"]) < 1e-5 * scale
    _, fixed = train(adapter, tmp_path / "f", "--reference", "fixed", source=flags)
    assert abs(margin(fixed)) > 100 * abs(margin(record))  # so the adapter has an effect
    before, after = weights(adapter), weights(tmp_path / "d")
    assert before.keys() == after.keys()
    assert all((before[name] - after[name]).abs().max() < 1e-6 for name in before)
    own = json.loads((adapter / "adapter_config.json").read_text())
    for recorded, name in {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}.items():
        assert record["settings"][recorded] == own[name]


def commands(adapter, pair_file, folder):
    """What each command that loads an adapter writes: file -> its arguments."""
    return stages(adapter, pair_file, folder) | {
        "x": ("grath.export", adapter, folder / "x"),
        "pairs.distance.json": ("grath.distance", folder / "pairs.json", "--model_name_or_path", adapter),
    }


@pytest.mark.parametrize("kind", REFUSED)
def test_other_adapters_are_refused(kind, tiny_llama, pair_file, tmp_path):
    adapter = save_adapter(tiny_llama, tmp_path / "a", **{"target_modules": ATTENTION, **REFUSED[kind]})
    shutil.copy(pair_file, tmp_path / "pairs.json")
    reason, every = "merge it into its base with PEFT", commands(adapter, pair_file, tmp_path)
    for made, command in every.items() if kind in ("DoRA", "the head", "PiSSA") else [("x", every["x"])]:
        done = call_here(*command, status=2)
        assert reason in done.stderr and len(done.stderr.splitlines()) == 1, (command, done.stderr)
        assert not (tmp_path / made).exists()
    done = check_here({"MODEL_NAME_OR_PATH": str(adapter), "DATA_PATH": str(BUNDLED), "TASKS": ""}, status=2)
    assert f"FAIL  model: the adapter {adapter}" in done.stdout and reason in done.stdout


def test_an_adapter_that_does_not_fit_its_base_is_refused(tiny_llama, pair_file, tmp_path):
    from safetensors.torch import save_file

    adapter = save_adapter(tiny_llama, tmp_path / "a", target_modules=ATTENTION)
    # A layer that the file lacks would keep its initial weights.
    kept = {name: weight for name, weight in weights(adapter).items() if ".layers.1.self_attn.k_proj" not in name}
    save_file(kept, adapter / "adapter_model.safetensors")
    assert "layers.1" in call_here("grath.export", adapter, tmp_path / "x", status=2).stderr
    good = (adapter / "adapter_config.json").read_text()
    damaged, others = "is damaged", "does not fit its base"
    for name, value, reason in [
        ("base_model_name_or_path", "/nowhere/llama", "put it back there"),
        ("base_model_name_or_path", str(adapter), "is an adapter itself"),
        *(("r", "8", damaged), ("target_modules", 5, damaged), ("exclude_modules", 7, damaged)),
        *(("rank_pattern", "abc", damaged), ("alpha_pattern", {"q_proj": "x"}, damaged)),
        *(("layers_to_transform", "x", damaged), ("lora_dropout", [0.5], damaged)),
        *(("target_modules", "(q_proj", others), ("rank_pattern", {"(": 4}, others)),
    ]:
        (adapter / "adapter_config.json").write_text(good)
        change_json(adapter / "adapter_config.json", **{name: value})
        assert reason in call_here("grath.export", adapter, tmp_path / "x", status=2).stderr


def test_an_adapter_is_used_on_the_base_that_it_was_trained_on(model, pair_file, tmp_path):
    """And so are its checkpoints."""
    train(model, tmp_path / "m", "--max_steps", "1", "--save_steps", "1", source=pair_file)
    change_json(model / "config.json", rms_norm_eps=1e-4)
    with pytest.raises(UserError, match="m/checkpoint-1 was made with config.json .*: put its base back"):
        model_identity(str(tmp_path / "m" / "checkpoint-1"))
    for made, command in commands(tmp_path / "m", pair_file, tmp_path).items():
        if made != "pairs.distance.json":
            done = call_here(*command, status=2)
            assert "was made with config.json" in done.stderr and "put its base back" in done.stderr
            assert not (tmp_path / made).exists()
