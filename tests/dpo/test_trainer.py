"""The trainer: log-probabilities of the reference, memory, and its benchmark."""

import sys

import pytest
from support import PROJECT, call, call_here, weights
from training import STEPS, read_training, train


def make_trainer(model, pairs, output, precision, reference):
    """A trainer that continues an adapter, before its first step."""
    from grath.dpo.config import GrathDPOConfig
    from grath.dpo.dataset import tokenize_pairs
    from grath.dpo.trainer import GrathDPOTrainer
    from grath.modeling.chat import template_for
    from grath.modeling.loading import load_model, load_tokenizer
    from grath.pairs.files import read_pairs

    tokenizer = load_tokenizer(model)
    return GrathDPOTrainer(
        model=load_model(model, precision, trainable=True),
        args=GrathDPOConfig(output_dir=str(output), precision=precision, max_steps=2),
        train_dataset=tokenize_pairs(read_pairs(pairs), tokenizer, template_for(tokenizer, "auto")),
        processing_class=tokenizer,
        reference=reference,
    )


@pytest.fixture(scope="module", params=["rolling", "fixed"])
def trainer(request, first_iteration, pair_file, tmp_path_factory):
    """A trainer of the second iteration before its first step."""
    return make_trainer(first_iteration[0], pair_file, tmp_path_factory.mktemp("t"), "fp32", request.param)


def test_reference_log_probabilities_come_from_the_reference(trainer, first_iteration):
    import torch

    from grath.modeling.loading import load_model

    # The fixed reference is the base alone, loaded again; the rolling one is the base with the incoming adapter.
    name = first_iteration[0] if trainer.reference == "rolling" else first_iteration[2]["base_model"]
    reference = load_model(name, "fp32").eval()
    assert len(trainer.train_dataset) == 32  # two steps, of twelve pairs
    for row in trainer.train_dataset.select(range(12)):
        for side in ("chosen", "rejected"):
            prompt, answer = row["prompt_ids"], row[f"{side}_ids"]
            with torch.no_grad():
                scores = reference(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = scores.gather(1, torch.tensor(answer)[:, None]).sum().item()
            assert row[f"ref_{side}_logps"] == pytest.approx(expected, abs=1e-4)


def tensors_of(thing):
    """Return the tensors that an object refers to, directly or indirectly."""
    import gc
    import types

    import torch

    tensors, seen, waiting = [], set(), [thing]
    while waiting:
        found = waiting.pop()
        # Classes, modules and a function's globals lead to every object of the process.
        if id(found) in seen or isinstance(found, type | types.ModuleType):
            continue
        seen.add(id(found))
        if isinstance(found, torch.Tensor):
            tensors.append(found)
        elif isinstance(found, types.FunctionType):
            waiting += [*(found.__closure__ or ()), found.__defaults__, found.__dict__]
            continue
        waiting += gc.get_referents(found)
    return tensors


def test_the_base_exists_once_in_memory(trainer):
    embedding = trainer.model.get_base_model().get_input_embeddings().weight
    own = {p.data_ptr() for p in trainer.model.parameters() if p.shape == embedding.shape}
    held = {tensor.data_ptr() for tensor in tensors_of(trainer) if tensor.shape == embedding.shape}
    assert embedding.data_ptr() in own and held == own
    assert trainer.ref_model is None
    assert not [name for name, _ in trainer.model.named_parameters() if ".ref." in name]


def test_the_adapter_on_a_quantized_base_is_not_rounded(first_iteration, pair_file, tmp_path):
    from peft import get_peft_model_state_dict

    trainer = make_trainer(first_iteration[0], pair_file, tmp_path, "nf4", "rolling")
    # A checkpoint is loaded to this process's device, not to the first GPU.
    assert trainer.model.load_adapter.keywords == {"torch_device": str(trainer.accelerator.device)}
    held, saved = get_peft_model_state_dict(trainer.model), weights(first_iteration[0])
    assert held.keys() == saved.keys()
    assert all((held[name] == saved[name]).all() for name in saved)


def test_other_losses_use_trls_code(tiny_llama, pair_file, tmp_path):
    flags = ("--loss_type", "ipo", "--train_sampling_strategy", "random", "--max_steps", "1")
    _, record = train(tiny_llama, tmp_path / "m", *flags, source=("--dataset_path", pair_file))
    assert record["log"][0]["loss"] == pytest.approx(25, abs=1e-3)  # (0 - 1 / (2 beta))^2


@pytest.fixture
def passes(monkeypatch):
    """The number of pairs in each forward pass of the tests; more than `passes.limit` at once do not fit."""
    from transformers import LlamaModel

    class Passes(list):
        limit = 1000

    original, found = LlamaModel.forward, Passes()

    def forward(self, input_ids, **options):
        import torch

        if len(input_ids) > found.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        found.append(len(input_ids))
        return original(self, input_ids=input_ids, **options)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    return found


def test_the_reference_is_evaluated_on_the_pairs_of_the_steps_only(tiny_llama, pair_file, tmp_path, passes):
    train(tiny_llama, tmp_path / "m", "--max_steps", "2", source=("--dataset_path", pair_file))
    assert passes == [8, 2, 2, 2, 2]  # of 12 pairs


def test_a_batch_that_does_not_fit_is_halved(tiny_llama, pair_file, tmp_path, passes, monkeypatch):
    from grath.dpo.config import GrathDPOConfig

    def start(output, *flags, status=0):
        command = ["--dataset_path", pair_file, "--model_name_or_path", tiny_llama, "--output_dir", tmp_path / output]
        # Dropout draws from the random state, which the probe must leave as it is.
        options = ["--precision", "fp32", "--no_disable_dropout", "--max_steps", "2", "--seed", "0"]
        return call_here("dpo.py", *command, *STEPS, *options, *flags, status=status)

    small = ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "8")
    start("small", *small, "--precompute_ref_batch_size", "2")
    original = GrathDPOConfig.__post_init__

    def post_init(self):  # as on a GPU
        original(self)
        self.probes_memory = True

    monkeypatch.setattr(GrathDPOConfig, "__post_init__", post_init)
    passes.clear()
    passes.limit = 2
    done = start("probed")
    assert "2 pairs per forward pass, as many as the memory takes, and 8 passes per step\n" in done.stdout
    assert passes == [2] * (6 + 1 + 16)  # the reference of twelve pairs, the probe, two steps
    settings = read_training(tmp_path / "probed")["settings"]
    assert [settings[name.removeprefix("--")] for name in small[::2]] == [2, 8]
    for ours, theirs in zip(weights(tmp_path / "probed").values(), weights(tmp_path / "small").values(), strict=True):
        assert (ours == theirs).all()
    # The size is recorded, not compared.
    assert "contains this training, finished" in start("probed", *small).stdout
    passes.limit = 0
    assert "the memory is full" in start("none", status=1).stderr


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "ways"), [("fp32", ["trl", "second_model", "ours"]), ("bf16", ["ours"])])
def test_training_benchmark(tiny_llama, pair_file, dtype, ways):
    done = call(
        sys.executable, PROJECT / "benchmarks" / "training.py", "--model", tiny_llama, "--dataset_path", pair_file,
        "--steps", "2", "--dtype", dtype, "--same_order", "--ways", *ways,
    )  # fmt: skip
    table = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()[2:]}
    assert list(table) == ways
    # The loss is about 0.7, printed with six decimals.
    assert all(float(row[-1]) < 1e-4 for row in table.values())
