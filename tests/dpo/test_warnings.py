"""The warnings about a training."""

import pytest
from training import train


def entry(step, chosen, rejected, accuracy=0.6):
    return {
        "step": step,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": accuracy,
    }


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
def test_training_warnings(log, words):
    from grath.dpo.callbacks import training_warnings

    found = list(training_warnings(log, 0.1, warmup_steps=100).values())
    assert found == [] if words is None else len(found) == 1 and found[0].startswith(words)


@pytest.mark.parametrize(("precision", "warned"), [("fp32", False), ("bf16", True), ("nf4", True), ("fp16", False)])
def test_no_margin_depends_on_the_precision(precision, warned, tmp_path):
    """A policy that has learned nothing has a margin of rounding errors: the reference is computed in other batches."""
    from grath.dpo.callbacks import logits_eps, training_warnings
    from grath.dpo.config import GrathDPOConfig

    eps = logits_eps(GrathDPOConfig(output_dir=str(tmp_path), precision=precision))
    likelihoods = {"logps/chosen": -70.0, "logps/rejected": -60.0}
    log = [{**entry(step, 0.02, 0.0), **likelihoods} for step in (1, 50, 150)]
    assert ("no margin" in training_warnings(log, 0.1, 100, eps)) == warned
    learned = [*log, {**entry(160, 0.3, 0.0), **likelihoods}]
    assert "no margin" not in training_warnings(learned, 0.1, 100, eps)


def test_the_training_log_passes_its_precision_to_the_warnings(monkeypatch, tmp_path):
    from transformers import TrainerState

    from grath.dpo import callbacks
    from grath.dpo.config import GrathDPOConfig

    given = []
    monkeypatch.setattr(callbacks, "training_warnings", lambda *args: given.append(args) or {})
    state = TrainerState(max_steps=10, log_history=[entry(1, 0, 0)])
    callbacks.TrainingLog(1.0).on_train_begin(GrathDPOConfig(output_dir=str(tmp_path), precision="bf16"), state, None)
    assert given[0][1:] == (0.1, 100, 2**-7)


def test_a_training_that_diverges_ends_with_one_line(tiny_llama, pair_file, tmp_path):
    """An adapter of NaN would be scored 100 in MC1: the first choice is the right one."""
    flags = ("--learning_rate", "1e30", "--max_steps", "4", "--warmup_steps", "0")
    done, _ = train(tiny_llama, tmp_path / "out", *flags, source=["--dataset_path", pair_file], status=2)
    assert "the training diverged: the rewards are NaN at step" in done.stderr
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
