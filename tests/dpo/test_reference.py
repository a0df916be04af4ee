"""The reference model, rolling or fixed, as the margin of the first step shows it."""

import json

import pytest
from support import weights
from training import margin, train


@pytest.fixture(scope="module", params=["rolling", "fixed"])
def second_iteration(request, first_iteration, pair_file, tmp_path_factory):
    """The second iteration: (reference, folder, the finished process, the record)."""
    output = tmp_path_factory.mktemp("iteration2") / "model"
    flags = ("--reference", request.param)
    return request.param, output, *train(first_iteration[0], output, *flags, source=("--dataset_path", pair_file))


def test_first_iteration_starts_with_zero_margin(first_iteration, tiny_llama):
    output, done, record = first_iteration
    assert abs(margin(record)) < 1e-4
    assert margin(record, 2) > 0.01
    assert record["reference"] == "rolling"
    assert record["reference_model"] == record["base_model"] == str(tiny_llama)
    assert f"reference (rolling): {tiny_llama}" in done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"Saved the adapter in {output}")
    assert not [path for path in output.rglob("ref") if path.is_dir()]


def test_fixed_and_rolling_agree_in_the_first_iteration(first_iteration, tiny_llama, pair_file, tmp_path):
    _, record = train(tiny_llama, tmp_path / "m", "--reference", "fixed", source=("--dataset_path", pair_file))
    assert abs(margin(record)) < 1e-4
    for ours, theirs in zip(weights(tmp_path / "m").values(), weights(first_iteration[0]).values(), strict=True):
        assert (ours - theirs).abs().max() < 1e-6


def test_the_second_iteration_continues_the_adapter(second_iteration, first_iteration, tiny_llama):
    reference, output, _, record = second_iteration
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
    before, after = weights(first_iteration[0]), weights(output)
    assert before.keys() == after.keys()
    change = max((after[name] - before[name]).abs().max() for name in before)
    size = max(before[name].abs().max() for name in before)
    assert 1e-4 < change < size
    assert not [path for path in output.rglob("ref") if path.is_dir()]


def test_precomputing_the_reference_does_not_change_training(second_iteration, first_iteration, pair_file, tmp_path):
    reference = second_iteration[0]
    flags = ("--reference", reference, "--precompute_ref_log_probs", "false")
    _, record = train(first_iteration[0], tmp_path / "m", *flags, source=("--dataset_path", pair_file))
    for ours, theirs in zip(record["log"][:3], second_iteration[3]["log"][:3], strict=True):
        assert ours["rewards/margins"] == pytest.approx(theirs["rewards/margins"], abs=1e-4)
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_margins_on_a_quantized_base(tiny_llama, pair_file, tmp_path, precision, caplog):
    flags = ("--precision", precision, "--reference")
    source = ("--dataset_path", pair_file)
    done, first = train(tiny_llama, tmp_path / "1", *flags, "rolling", source=source)
    assert "MatMul8bitLt" not in done.stderr + caplog.text
    _, rolling = train(tmp_path / "1", tmp_path / "2", *flags, "rolling", source=source)
    _, fixed = train(tmp_path / "1", tmp_path / "3", *flags, "fixed", source=source)
    # int8 scales activations by the largest value of their batch, so the margin is 0 only to that rounding.
    logits_eps = {"nf4": 1e-3, "int8": 5e-2}[precision]
    assert {str(weight.dtype) for weight in weights(tmp_path / "2").values()} == {"torch.float32"}
    assert abs(margin(first)) < logits_eps and abs(margin(rolling)) < logits_eps
    assert margin(fixed) > 0.5 * margin(first, 2) > 0.1
