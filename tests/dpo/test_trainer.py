"""The trainer: log-probabilities of the reference, memory, and its benchmark."""

import gc
from types import SimpleNamespace

import pytest
import torch
from support import PROJECT, call_here
from trainings import STEPS, difference, make_trainer, read_training, train
from transformers import LlamaModel

from grath.dpo.config import GrathDPOConfig
from grath.modeling.loading import load_model


@pytest.mark.parametrize("reference", ["rolling", "fixed"])
def test_a_trainer_before_its_first_step(reference, first_iteration, pair_file, tmp_path):
    # The fixed reference is the base alone, loaded again; the rolling one is the base with the incoming adapter.
    name = first_iteration[0] if reference == "rolling" else first_iteration[2]["base_model"]
    expected = load_model(name, "fp32").eval()
    shape = expected.get_input_embeddings().weight.shape
    gc.collect()
    gc.freeze()
    trainer = make_trainer(first_iteration[0], pair_file, tmp_path, "fp32", reference)
    made = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    gc.unfreeze()
    # Policy and reference share one copy of the base.
    own = {weight.data_ptr() for weight in trainer.model.parameters() if weight.shape == shape}
    assert own and {tensor.data_ptr() for tensor in made if tensor.shape == shape} == own
    assert not [name for name, _ in trainer.model.named_parameters() if ".ref." in name]
    # A checkpoint is loaded to this process's device, not to the first GPU.
    assert trainer.model.load_adapter.keywords == {"torch_device": str(trainer.accelerator.device)}
    assert len(trainer.train_dataset) == 32  # two steps, of twelve pairs
    for row in trainer.train_dataset.select(range(12)):
        for side in ("chosen", "rejected"):
            prompt, answer = row["prompt_ids"], row[f"{side}_ids"]
            with torch.no_grad():
                scores = expected(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            log_prob = scores.gather(1, torch.tensor(answer)[:, None]).sum().item()
            assert row[f"ref_{side}_logps"] == pytest.approx(log_prob, abs=1e-4)


@pytest.fixture
def passes(monkeypatch):
    """The number of pairs in each forward pass of a test; more than `limit` at once do not fit."""
    original, found = LlamaModel.forward, SimpleNamespace(sizes=[], limit=1000)

    def forward(self, input_ids, **options):
        if len(input_ids) > found.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        found.sizes.append(len(input_ids))
        return original(self, input_ids=input_ids, **options)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    return found


def test_the_reference_is_evaluated_on_the_pairs_of_the_steps_only(tiny_llama, pair_file, tmp_path, passes):
    train(tiny_llama, tmp_path / "m", "--max_steps", "2", source=pair_file)
    assert passes.sizes == [8, 2, 2, 2, 2]  # of 12 pairs


def test_a_batch_that_does_not_fit_is_halved(tiny_llama, pair_file, tmp_path, passes, monkeypatch):
    def start(output, *flags, status=0):
        command = ["--dataset_path", pair_file, "--model_name_or_path", tiny_llama, "--output_dir", tmp_path / output]
        # Dropout draws from the random state, which the probe must leave as it is.
        options = ["--precision", "fp32", "--no_disable_dropout", "--max_steps", "1", "--seed", "0"]
        return call_here("dpo.py", *command, *STEPS, *options, *flags, status=status)

    small = ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4")
    start("small", *small, "--precompute_ref_batch_size", "4")
    original = GrathDPOConfig.__post_init__

    def post_init(self):  # as on a GPU
        original(self)
        self.probes_memory = True

    monkeypatch.setattr(GrathDPOConfig, "__post_init__", post_init)
    passes.sizes.clear()
    passes.limit = 4
    done = start("probed")
    assert "4 pairs per forward pass, as many as fit in memory, and 4 passes per step\n" in done.stdout
    assert passes.sizes == [4] * (3 + 1 + 4)  # the reference of twelve pairs, the probe, a step
    settings = read_training(tmp_path / "probed")["settings"]
    assert [settings[name.removeprefix("--")] for name in small[::2]] == [4, 4]
    assert difference(tmp_path / "probed", tmp_path / "small") == 0
    # The size is recorded, not compared.
    assert "contains this training, finished" in start("probed", *small).stdout
    passes.limit = 0
    assert "the memory is full" in start("none", "--precompute_ref_batch_size", "1", status=1).stderr


def test_training_benchmark(tiny_llama, pair_file, monkeypatch):
    monkeypatch.syspath_prepend(str(PROJECT / "benchmarks"))
    flags = ("--model", tiny_llama, "--dataset_path", pair_file, "--steps", "2", "--dtype", "fp32", "--same_order")
    done = call_here("training", *flags)
    table = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()[-3:]}
    assert list(table) == ["trl", "precomputed", "ours"]
    # The loss is about 0.7, printed with six decimals.
    assert all(float(row[-1]) < 1e-4 for row in table.values()), done.stdout
