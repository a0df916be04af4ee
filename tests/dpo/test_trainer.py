"""The trainer: log-probabilities, shared prompts, order of the pairs, memory, and its benchmark."""

import sys

import pytest
from support import PROJECT, call, pair, weights, write_rows
from training import train


@pytest.fixture(scope="module", params=["rolling", "fixed"])
def trainer(request, first_iteration, pair_file, tmp_path_factory):
    """A trainer of the second iteration before its first step."""
    from grath.dpo.config import GrathDPOConfig
    from grath.dpo.dataset import filter_pairs, tokenize_pairs
    from grath.dpo.trainer import GrathDPOTrainer
    from grath.modeling.chat import template_for
    from grath.modeling.loading import load_model, load_tokenizer
    from grath.pairs.files import read_pairs

    tokenizer = load_tokenizer(first_iteration[0])
    dataset, _ = filter_pairs(tokenize_pairs(read_pairs(pair_file), tokenizer, template_for(tokenizer, "auto")), 1024)
    return GrathDPOTrainer(
        model=load_model(first_iteration[0], "fp32", trainable=True),
        args=GrathDPOConfig(output_dir=str(tmp_path_factory.mktemp("t")), precision="fp32", max_steps=2),
        train_dataset=dataset,
        processing_class=tokenizer,
        reference=request.param,
    )


def test_reference_log_probabilities_come_from_the_reference(trainer, first_iteration):
    import torch

    from grath.modeling.loading import load_model

    # The fixed reference is the base alone, loaded again; the rolling one is the base with the incoming adapter.
    name = first_iteration[0] if trainer.reference == "rolling" else first_iteration[2]["base_model"]
    reference = load_model(name, "fp32").eval()
    for row in trainer.train_dataset:
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


def test_the_adapter_on_a_quantized_base_is_not_rounded(tiny_llama, pair_file, tmp_path):
    from peft import get_peft_model_state_dict

    from grath.dpo.config import GrathDPOConfig
    from grath.dpo.dataset import filter_pairs, tokenize_pairs
    from grath.dpo.trainer import GrathDPOTrainer
    from grath.modeling.chat import template_for
    from grath.modeling.loading import load_model, load_tokenizer
    from grath.pairs.files import read_pairs

    train(tiny_llama, tmp_path / "1", "--precision", "nf4", source=("--dataset_path", pair_file))
    tokenizer = load_tokenizer(tmp_path / "1")
    trainer = GrathDPOTrainer(
        model=load_model(tmp_path / "1", "nf4", trainable=True),
        args=GrathDPOConfig(output_dir=str(tmp_path / "2"), precision="nf4", max_steps=1),
        train_dataset=filter_pairs(
            tokenize_pairs(read_pairs(pair_file), tokenizer, template_for(tokenizer, "auto")), 1024
        )[0],
        processing_class=tokenizer,
        reference="rolling",
    )
    # A checkpoint is loaded to this process's device, not to the first GPU.
    assert trainer.model.load_adapter.keywords == {"torch_device": str(trainer.accelerator.device)}
    held, saved = get_peft_model_state_dict(trainer.model), weights(tmp_path / "1")
    assert held.keys() == saved.keys()
    assert all((held[name] == saved[name]).all() for name in saved)


def test_other_losses_use_trls_code(tiny_llama, pair_file, tmp_path):
    flags = ("--loss_type", "ipo", "--train_sampling_strategy", "random")
    _, record = train(tiny_llama, tmp_path / "m", *flags, source=("--dataset_path", pair_file))
    assert record["log"][0]["loss"] == pytest.approx(25, abs=1e-3)  # (0 - 1 / (2 beta))^2


def test_the_reference_is_evaluated_on_the_pairs_of_the_steps_only(tiny_llama, pair_file, tmp_path, monkeypatch):
    from grath.dpo.trainer import GrathDPOTrainer

    original, evaluated = GrathDPOTrainer.compute_ref_log_probs, []

    def compute_ref_log_probs(self, model, inputs):
        evaluated.append(len(inputs["input_ids"]) // 2)
        return original(self, model, inputs)

    monkeypatch.setattr(GrathDPOTrainer, "compute_ref_log_probs", compute_ref_log_probs)
    logs = {}
    for precompute in ("true", "false"):
        flags = ("--max_steps", "2", "--precompute_ref_log_probs", precompute)
        _, record = train(tiny_llama, tmp_path / precompute, *flags, source=("--dataset_path", pair_file))
        logs[precompute] = [(line["loss"], line["rewards/margins"]) for line in record["log"][:2]]
        if precompute == "true":
            assert sum(evaluated) == 8  # of 12
    assert logs["true"] == [pytest.approx(line, abs=1e-4) for line in logs["false"]]


def test_the_sampler_gets_every_epoch(trainer, monkeypatch):
    from trl import DPOTrainer

    monkeypatch.setattr(DPOTrainer, "_run_epoch", lambda self, **kwargs: kwargs["epoch"])
    sampler = trainer._get_train_sampler()
    assert trainer._run_epoch(epoch=3) == sampler.epoch == 3


def test_the_order_of_the_pairs_depends_on_the_data_seed(trainer, monkeypatch):
    orders = [list(trainer._get_train_sampler())]
    monkeypatch.setattr(trainer.args, "data_seed", 5)
    orders.append(list(trainer._get_train_sampler()))
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_the_loss_curve_does_not_depend_on_the_pairs_per_forward_pass(tiny_llama, tmp_path):
    """In fp32, also in the last step of an epoch, which has fewer pairs. Other pairs in a step give another curve."""
    pairs = [
        pair(f"What is {i}?" + " Say it." * (i % 7), f"It is {i}.", "Nobody knows." * (1 + i % 3)) for i in range(39)
    ]
    source = ("--dataset_path", write_rows(tmp_path / "pairs.json", pairs))
    curves = {}
    for batch, accumulation in ((4, 4), (16, 1), (8, 1)):
        flags = ("--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation)
        flags += ("--max_steps", "8", "--learning_rate", "1e-3")
        _, record = train(tiny_llama, tmp_path / f"{batch}", *flags, source=source)
        curves[batch] = [line["loss"] for line in record["log"] if "loss" in line]
    assert len(curves[16]) == 8 and curves[4] == pytest.approx(curves[16], rel=1e-5)
    assert curves[8] != pytest.approx(curves[16], rel=1e-3)


def test_each_step_has_pairs_of_similar_length():
    from grath.dpo.sampler import LengthGroupedSampler

    lengths = [(37 * i) % 100 for i in range(1600)]
    sampler = LengthGroupedSampler(lengths, 16, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[1]) == list(range(1600))
    spreads = [
        max(lengths[i] for i in step) - min(lengths[i] for i in step)
        for step in (orders[0][at : at + 16] for at in range(0, 1600, 16))
    ]
    assert sum(spreads) / len(spreads) < 10


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
