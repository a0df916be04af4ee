"""Stage 3 at the command line: which model is the reference, the paper's defaults, the sources of pairs."""

import json

import pytest
from conftest import HUB, PROJECT, call, needs_hub, pair, write_rows

STEPS = ["--max_steps", "3", "--warmup_steps", "0", "--learning_rate", "1e-2", "--logging_steps", "1"]
LAUNCH = ["accelerate", "launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
          "--dynamo_backend", "no"]  # fmt: skip
SMALL = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--precision", "fp32"]


def train(model, output, *flags, source=("--dataset_path",), status=0, cwd=None):
    done = call(
        "dpo.py", *source, "--model_name_or_path", model, "--output_dir", output, "--seed", "0", *STEPS, *SMALL,
        *flags, status=status, **({"cwd": cwd} if cwd else {}),
    )  # fmt: skip
    return done, json.loads((output / "training.json").read_text()) if status == 0 else None


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def first_round(tiny_llama, pair_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("round1") / "model"
    return output, *train(tiny_llama, output, source=("--dataset_path", pair_file))


@pytest.fixture(scope="module", params=["rolling", "fixed"])
def second_round(request, first_round, pair_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("round2") / "model"
    flags = ("--reference", request.param)
    return request.param, output, *train(first_round[0], output, *flags, source=("--dataset_path", pair_file))


def margin(record, step=0):
    return record["log"][step]["rewards/margins"]


def test_first_round_starts_without_margin(first_round, tiny_llama):
    output, done, record = first_round
    assert abs(margin(record)) < 1e-4
    assert margin(record, 2) > 0.01
    assert record["reference"] == "rolling"
    assert record["reference_model"] == record["base_model"] == str(tiny_llama)
    assert f"reference (rolling): {tiny_llama}" in done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"Saved the adapter in {output}")
    assert not [path for path in output.rglob("ref") if path.is_dir()]


def test_fixed_first_round_is_the_rolling_one(first_round, tiny_llama, pair_file, tmp_path):
    _, record = train(tiny_llama, tmp_path / "m", "--reference", "fixed", source=("--dataset_path", pair_file))
    assert abs(margin(record)) < 1e-4
    for ours, theirs in zip(weights(tmp_path / "m").values(), weights(first_round[0]).values(), strict=True):
        assert (ours - theirs).abs().max() < 1e-6


def test_second_round_starts_from_its_reference_only_if_that_rolls(second_round, first_round):
    reference, _, _, record = second_round
    if reference == "rolling":
        assert abs(margin(record)) < 1e-4
        assert str(first_round[0]) in record["reference_model"]
    else:
        # The policy starts where the first round ended, so the margin against the base is about the last one seen.
        assert margin(record) > 0.5 * margin(first_round[2], 2) > 0.005
        assert record["reference_model"] == record["base_model"]
    assert str(first_round[0]) in record["policy_starts_from"]


def test_second_round_continues_one_adapter_against_the_base(second_round, first_round, tiny_llama):
    _, output, _, _ = second_round
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_llama)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.05)
    assert sorted(config["target_modules"]) == ["k_proj", "q_proj", "v_proj"]
    before, after = weights(first_round[0]), weights(output)
    assert before.keys() == after.keys()
    change = max((after[name] - before[name]).abs().max() for name in before)
    size = max(before[name].abs().max() for name in before)
    assert 1e-4 < change < size
    assert not [path for path in output.rglob("ref") if path.is_dir()]


def test_reference_computed_at_every_step_gives_the_same_training(second_round, first_round, pair_file, tmp_path):
    reference = second_round[0]
    flags = ("--reference", reference, "--precompute_ref_log_probs", "false")
    _, record = train(first_round[0], tmp_path / "m", *flags, source=("--dataset_path", pair_file))
    for ours, theirs in zip(record["log"][:3], second_round[3]["log"][:3], strict=True):
        assert ours["rewards/margins"] == pytest.approx(theirs["rewards/margins"], abs=1e-4)
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


def test_accelerate_launch_trains_the_same(first_round, tiny_llama, pair_file, tmp_path):
    call(
        *LAUNCH, "dpo.py", "--dataset_path", pair_file, "--model_name_or_path", tiny_llama,
        "--output_dir", tmp_path / "m", "--seed", "0", *STEPS, *SMALL,
    )  # fmt: skip
    for ours, theirs in zip(weights(tmp_path / "m").values(), weights(first_round[0]).values(), strict=True):
        assert (ours - theirs).abs().max() < 1e-6


def test_finished_output_is_not_overwritten(first_round, tiny_llama, pair_file):
    before = (first_round[0] / "adapter_model.safetensors").read_bytes()
    done, _ = train(tiny_llama, first_round[0], source=("--dataset_path", pair_file), status=2)
    assert "pass --overwrite_output_dir" in done.stderr
    assert (first_round[0] / "adapter_model.safetensors").read_bytes() == before


def test_another_rank_than_the_incoming_adapters_is_refused(first_round, pair_file, tmp_path):
    source = ("--dataset_path", pair_file)
    done, _ = train(first_round[0], tmp_path / "m", "--lora_r", "4", source=source, status=2)
    assert "the adapter that comes in has r 8, not 4" in done.stderr
    assert not (tmp_path / "m").exists()


def test_a_trainer_that_cannot_be_built_leaves_the_old_output(first_round, tiny_llama, pair_file, tmp_path):
    import shutil

    output = tmp_path / "m"
    shutil.copytree(first_round[0], output)
    before = sorted(output.rglob("*"))
    flags = ("--sync_ref_model", "true", "--overwrite_output_dir")
    train(tiny_llama, output, *flags, source=("--dataset_path", pair_file), status=2)
    assert sorted(output.rglob("*")) == before


def test_useless_pairs_are_dropped_and_counted(tiny_llama, tmp_path):
    data = [pair("q1", "same", "same"), pair("q2", "long " * 300, "no"), pair("q3", "yes", "no"), pair("q4", "a", "b")]
    source = ("--dataset_path", write_rows(tmp_path / "pairs.json", data))
    done, record = train(tiny_llama, tmp_path / "m", "--max_length", "128", "--max_steps", "1", source=source)
    assert "4 pairs, 1 with identical answers and 1 over 128 tokens dropped" in done.stdout
    assert record["settings"]["pairs"] == 2
    done, _ = train(tiny_llama, tmp_path / "n", "--max_length", "8", source=source, status=2)
    assert "no pair is left to train on" in done.stderr
    assert not (tmp_path / "n").exists()


@needs_hub
@pytest.mark.parametrize("name", ["ai2_arc/ARC-Challenge", "truthful_qa"])
def test_keyed_sets_by_name(tiny_llama, tmp_path, name):
    done = call(
        *LAUNCH, PROJECT / "dpo.py", "--dataset_name", name, "--model_name_or_path", tiny_llama,
        "--output_dir", tmp_path / "m", "--seed", "0", *SMALL, "--num_sample", "5", "--max_steps", "1", cwd=HUB,
    )  # fmt: skip
    record = json.loads((tmp_path / "m" / "training.json").read_text())
    assert record["settings"]["pairs"] == 5
    assert ("is the TruthfulQA test set" in done.stderr) == (name == "truthful_qa")


def test_a_set_in_trls_preference_format(tiny_llama, tmp_path):
    turn = [{"role": "user", "content": "Is ice cold?"}]
    data = [
        {
            "prompt": turn,
            "chosen": [{"role": "assistant", "content": f"Yes {i}"}],
            "rejected": [{"role": "assistant", "content": "No"}],
        }
        for i in range(4)
    ]
    (tmp_path / "me" / "prefs").mkdir(parents=True)
    write_rows(tmp_path / "me" / "prefs" / "train.jsonl", data)
    source = ("--dataset_name", "me/prefs")
    done, _ = train(tiny_llama, tmp_path / "m", "--max_steps", "1", source=source, cwd=tmp_path)
    assert "4 pairs, 0 with identical answers" in done.stdout


def test_defaults_are_the_papers():
    from grath.settings import GrathDPOConfig

    config = GrathDPOConfig(output_dir="unused")
    expected = {
        "beta": 0.1,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 100,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_steps": 1000,
        "max_length": 1024,
        "loss_type": ["sigmoid"],
        "seed": 0,
        "disable_dropout": True,
        "report_to": [],
    }
    assert {name: getattr(config, name) for name in expected} == expected
    import torch

    assert config.optim == ("paged_adamw_32bit" if torch.cuda.is_available() else "adamw_torch")
    assert config.precision == ("fp4" if torch.cuda.is_available() else "bf16")


def test_answer_scores_are_trls(tiny_llama, llama_tokenizer):
    """Our head, which projects answers only, against the one TRL puts in, on one batch."""
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from grath.trainer import _answer_scores

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    add_fused_lm_head(model)
    ids = torch.tensor([llama_tokenizer("Why is ice lighter than water?")["input_ids"]] * 2)
    labels = ids.clone()
    labels[0, :4] = labels[1, :7] = -100
    theirs = model(input_ids=ids, labels=labels, fused_lm_head=True)
    hidden = model.base_model(ids).last_hidden_state[:, :-1]
    ours = _answer_scores(hidden, labels[:, 1:], model.get_output_embeddings())
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, atol=1e-5, rtol=0)
    assert (ours.log_probs != 0).sum() == (labels[:, 1:] != -100).sum()
