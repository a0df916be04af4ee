"""The warnings about a training."""

import pytest
from trainings import refusal, train

from grath.dpo.callbacks import training_warnings
from grath.dpo.config import GrathDPOConfig


def entry(step, chosen, rejected, accuracy=0.6, **more):
    rewards = {"chosen": chosen, "rejected": rejected, "margins": chosen - rejected, "accuracies": accuracy}
    return {"step": step, **{f"rewards/{name}": value for name, value in rewards.items()}, **more}


def warnings_of(log, folder, precision="fp32"):
    """Return the warnings about a training of 1,000 steps, 100 of them warm-up: kind -> sentence."""
    return training_warnings(log, GrathDPOConfig(output_dir=str(folder), precision=precision), 1000)


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ([entry(1, 0, 0, 0), entry(50, -0.3, -0.9)], "chosen answers lose probability together with the rejected ones"),
        ([entry(1, 0, 0, 0), entry(50, 0.3, -0.9, 1.0)], "every chosen answer is preferred already"),
        ([entry(1, 0, 0, 0), entry(150, 0.0001, 0)], "the margin is still 0 at step 150"),
        ([entry(1, 0, 0, 0), entry(90, 0.0001, 0)], None),
        ([entry(1, 0, 0, 0), entry(50, 0.3, -0.9), {"step": 50, "train_runtime": 1.0}], None),
        ([], None),
    ],
)
def test_training_warnings(log, words, tmp_path):
    found = list(warnings_of(log, tmp_path).values())
    assert found == [] if words is None else len(found) == 1 and found[0].startswith(words)


@pytest.mark.parametrize(("precision", "warned"), [("fp32", False), ("bf16", True), ("nf4", True), ("fp16", False)])
def test_no_margin_depends_on_the_precision(precision, warned, tmp_path):
    """A policy that has learned nothing has a margin of rounding errors: the reference is computed in other batches."""
    likelihoods = {"logps/chosen": -70.0, "logps/rejected": -60.0}
    log = [entry(step, 0.02, 0.0, **likelihoods) for step in (1, 50, 150)]
    assert ("no margin" in warnings_of(log, tmp_path, precision)) == warned
    log.append(entry(160, 0.3, 0.0, **likelihoods))
    assert "no margin" not in warnings_of(log, tmp_path, precision)


def test_a_training_that_diverges_ends_with_one_line(tiny_llama, pair_file, tmp_path):
    """An adapter of NaN would be scored 100 in MC1: the first choice is the right one."""
    flags = ("--learning_rate", "1e30", "--max_steps", "4", "--warmup_steps", "0")
    error = refusal(tiny_llama, tmp_path / "out", *flags, source=pair_file)
    assert "the training diverged: the rewards are NaN at step" in error
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_warm_up_longer_than_the_training(tmp_path):
    log = [entry(1, 0, 0, 0), entry(20, 0.0001, 0)]
    found = training_warnings(log, GrathDPOConfig(output_dir=str(tmp_path), precision="fp32", max_steps=20), 20)
    assert found["warm-up"].startswith("the warm-up of 100 steps never ends in 20") and "no margin" in found
    constant = GrathDPOConfig(output_dir=str(tmp_path), precision="fp32", max_steps=20, lr_scheduler_type="constant")
    assert "warm-up" not in training_warnings(log, constant, 20)


def test_the_end_of_a_prompt_that_training_leaves_out(model, pair_file, tmp_path):
    """As in templates of models that begin to reason."""
    template = (model / "chat_template.jinja").read_text() + "{% if add_generation_prompt %}<think>{% endif %}"
    (model / "chat_template.jinja").write_text(template)
    done, record = train(model, tmp_path / "m", "--max_steps", "1", source=pair_file)
    assert record["warnings"][0].startswith("the model is asked with '<think>' at the end of the prompt")
    assert f"Warning: {record['warnings'][0]}" in done.stdout
