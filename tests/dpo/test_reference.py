"""The reference model, rolling or fixed, as the margin of the first step shows it."""

import json

import pytest
from peft import get_peft_model_state_dict
from support import change_json, weights
from trainings import difference, make_trainer, margin, train


@pytest.fixture(scope="module", params=["rolling", "fixed"])
def second_iteration(request, first_iteration, pair_file, tmp_path_factory):
    """The second iteration: (reference, folder, the record)."""
    output = tmp_path_factory.mktemp("iteration2") / "model"
    record = train(first_iteration[0], output, "--reference", request.param, source=pair_file)[1]
    return request.param, output, record


def test_first_iteration_starts_with_zero_margin(first_iteration, tiny_llama):
    output, done, record = first_iteration
    assert abs(margin(record)) < 1e-4
    assert margin(record, 2) > 0.01
    assert record["reference"] == "rolling" and record["incoming_adapter"] is None
    assert record["reference_model"] == record["base_model"] == str(tiny_llama)
    assert f"reference (rolling): {tiny_llama}" in done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"Saved the adapter in {output}")
    assert not [path for path in output.rglob("ref") if path.is_dir()]


def test_dropout_that_is_no_module_is_disabled_too(first_iteration, model, pair_file, tmp_path):
    """In a first iteration, where both references are the base."""
    change_json(model / "config.json", attention_dropout=0.3)
    _, record = train(model, tmp_path / "m", "--reference", "fixed", source=pair_file)
    assert record["reference_model"] == record["base_model"] == str(model)
    assert [margin(record, step) for step in (0, 2)] == [margin(first_iteration[2], step) for step in (0, 2)]


def test_pairs_longer_than_the_models_window_are_dropped(model, pair_file, tmp_path):
    change_json(model / "config.json", max_position_embeddings=5)
    done, _ = train(model, tmp_path / "m", source=pair_file, status=2)
    assert "over 5 tokens dropped" in done.stdout and "no pair is left to train on" in done.stderr


def test_the_second_iteration_continues_the_adapter(second_iteration, first_iteration, tiny_llama):
    reference, output, record = second_iteration
    if reference == "rolling":
        assert abs(margin(record)) < 1e-4
        assert str(first_iteration[0]) in record["reference_model"]
    else:
        # The policy starts where the first iteration ended: the margin against the base is about the last logged one.
        assert margin(record) > 0.5 * margin(first_iteration[2], 2) > 0.005
        assert record["reference_model"] == record["base_model"]
    assert str(first_iteration[0]) in record["policy_starts_from"]
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_llama)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.05)
    assert config["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    size = max(weight.abs().max() for weight in weights(first_iteration[0]).values())
    assert 1e-4 < difference(output, first_iteration[0]) < size
    assert not [path for path in output.rglob("ref") if path.is_dir()]


def test_precomputing_the_reference_does_not_change_training(second_iteration, first_iteration, pair_file, tmp_path):
    flags = ("--reference", second_iteration[0], "--precompute_ref_log_probs", "false", "--max_steps", "2")
    _, record = train(first_iteration[0], tmp_path / "m", *flags, source=pair_file)
    for ours, theirs in zip(record["log"][:2], second_iteration[2]["log"], strict=False):
        assert ours["rewards/margins"] == pytest.approx(theirs["rewards/margins"], abs=1e-4)


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_margins_on_a_quantized_base(tiny_llama, pair_file, tmp_path, precision, caplog):
    flags = ("--precision", precision, "--reference")
    done, first = train(tiny_llama, tmp_path / "1", *flags, "rolling", source=pair_file)
    assert "MatMul8bitLt" not in done.stderr + caplog.text
    saved = weights(tmp_path / "1")
    assert {str(weight.dtype) for weight in saved.values()} == {"torch.float32"}
    margins = {}
    for reference in ("rolling", "fixed"):
        _, record = train(tmp_path / "1", tmp_path / reference, *flags, reference, "--max_steps", "1", source=pair_file)
        margins[reference] = margin(record)
    # int8 scales activations by the largest value of their batch, so the margin is 0 only to that rounding.
    logits_eps = {"nf4": 1e-3, "int8": 5e-2}[precision]
    assert abs(margin(first)) < logits_eps and abs(margins["rolling"]) < logits_eps
    assert margins["fixed"] > 0.5 * margin(first, 2) > 0.1
    # The policy's adapter is not rounded.
    trainer = make_trainer(tmp_path / "1", pair_file, tmp_path, precision, "rolling")
    held = get_peft_model_state_dict(trainer.model)
    assert held.keys() == saved.keys() and all((held[name] == saved[name]).all() for name in saved)
