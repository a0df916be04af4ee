"""Stage 3 at the command line: which model is the reference, the paper's defaults, the sources of pairs."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from conftest import HUB, PROJECT, call, call_here, needs_hub, pair, rows, weights, write_rows

STEPS = ["--max_steps", "3", "--warmup_steps", "0", "--learning_rate", "1e-2", "--logging_steps", "1"]
LAUNCH = ["accelerate", "launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
          "--dynamo_backend", "no"]  # fmt: skip
SMALL = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--precision", "fp32"]


def train(model, output, *flags, source=("--dataset_path",), status=0, cwd=None):
    done = call_here(
        "dpo.py", *source, "--model_name_or_path", model, "--output_dir", output, "--seed", "0", *STEPS, *SMALL,
        *flags, status=status, **({"cwd": cwd} if cwd else {}),
    )  # fmt: skip
    return done, read_training(output) if status == 0 else None


def read_training(output):
    """The record of a training, with its log."""
    return {**json.loads((output / "grath.json").read_text()), "log": rows(output / "training_log.jsonl")}


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
    assert config["target_modules"] == ["k_proj", "q_proj", "v_proj"]
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


def test_finished_output_is_left_alone(first_round, tiny_llama, pair_file, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in first_round[0].rglob("*")}
    source = ("--dataset_path", pair_file)
    done, _ = train(tiny_llama, first_round[0], source=source)
    assert "holds this training, finished" in done.stdout
    done, _ = train(tiny_llama, first_round[0], "--beta", "0.2", source=source, status=2)
    assert "holds a training with another beta (0.1, not 0.2)" in done.stderr
    others = write_rows(tmp_path / "pairs.json", [pair("q", "a", "b")])
    done, _ = train(tiny_llama, first_round[0], source=("--dataset_path", others), status=2)
    assert "another pair_file_sha256" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in first_round[0].rglob("*")} == before


def test_a_kill_before_the_first_checkpoint_blocks_nothing(tiny_llama, pair_file, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / ".grath.json.x.tmp").write_text("{")
    (tmp_path / "m" / "README.md").write_text("a model card")
    train(tiny_llama, tmp_path / "m", source=("--dataset_path", pair_file))
    flags = ("--overwrite_output_dir", "--resume_from_checkpoint", tmp_path / "m" / "checkpoint-3")
    done, _ = train(tiny_llama, tmp_path / "m", *flags, source=("--dataset_path", pair_file), status=2)
    assert "removes the checkpoints" in done.stderr
    # Other batches that make the same step are the same training.
    flags = ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1")
    done, _ = train(tiny_llama, tmp_path / "m", *flags, source=("--dataset_path", pair_file))
    assert "holds this training, finished" in done.stdout


def test_a_strangers_folder_is_not_touched(tiny_llama, pair_file, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.txt").write_text("mine")
    source = ("--dataset_path", pair_file)
    done, _ = train(tiny_llama, tmp_path / "m", source=source, status=2)
    assert "is not empty and holds no training of this program" in done.stderr
    done, _ = train(tiny_llama, tiny_llama, "--overwrite_output_dir", source=source, status=2)
    assert "is the model that the training starts from" in done.stderr
    shutil.copytree(tiny_llama, tmp_path / "whole")
    done, _ = train(tiny_llama, tmp_path / "whole", "--overwrite_output_dir", source=source, status=2)
    assert "holds a whole model" in done.stderr
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["thesis.txt"]


def test_a_killed_training_goes_on_from_its_last_complete_checkpoint(tiny_llama, pair_file, tmp_path):
    command = [
        "--dataset_path", pair_file, "--model_name_or_path", tiny_llama, "--seed", "0", *SMALL, "--max_steps", "60",
        "--warmup_steps", "0", "--learning_rate", "1e-3", "--logging_steps", "1", "--save_steps", "7",
    ]  # fmt: skip
    call_here("dpo.py", *command, "--output_dir", tmp_path / "undisturbed")
    killed = tmp_path / "killed"
    with subprocess.Popen(
        [sys.executable, PROJECT / "dpo.py", *command, "--output_dir", killed],
        env={**os.environ, "PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1"}, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        while not (killed / "checkpoint-14" / "trainer_state.json").exists():
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    assert not (killed / "adapter_model.safetensors").exists()
    # A later checkpoint that was cut off in the middle of a file is passed over.
    complete = max(killed.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    half = killed / "checkpoint-56"
    shutil.copytree(complete, half)
    state = json.loads((half / "trainer_state.json").read_text()) | {"global_step": 56}
    (half / "trainer_state.json").write_text(json.dumps(state))
    (half / "optimizer.pt").write_bytes((half / "optimizer.pt").read_bytes()[:-200])
    done = call_here("dpo.py", *command, "--output_dir", killed)
    assert "Going on from" in done.stdout and "checkpoint-56" not in done.stdout
    assert read_training(killed)["went_on_from"]
    for ours, theirs in zip(weights(killed).values(), weights(tmp_path / "undisturbed").values(), strict=True):
        assert (ours - theirs).abs().max() < 1e-6
    logs = [
        [entry.get("loss") for entry in read_training(tmp_path / name)["log"]] for name in ("killed", "undisturbed")
    ]
    assert logs[0][:-1] == pytest.approx(logs[1][:-1], abs=1e-5)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"])
def test_a_cut_checkpoint_is_not_complete(tiny_llama, pair_file, tmp_path, file):
    from grath.checkpoints import last_checkpoint

    train(tiny_llama, tmp_path / "m", "--save_steps", "1", source=("--dataset_path", pair_file))
    assert last_checkpoint(tmp_path / "m").endswith("checkpoint-3")
    content = (tmp_path / "m" / "checkpoint-3" / file).read_bytes()
    (tmp_path / "m" / "checkpoint-3" / file).write_bytes(content[: len(content) // 2])
    assert last_checkpoint(tmp_path / "m").endswith("checkpoint-2")
    shutil.rmtree(tmp_path / "m" / "checkpoint-2")
    (tmp_path / "m" / "checkpoint-1" / file).unlink()
    assert (last_checkpoint(tmp_path / "m") is None) == (file not in ("optimizer.pt", "rng_state.pth"))


def test_another_rank_than_the_incoming_adapters_is_refused(first_round, pair_file, tmp_path):
    source = ("--dataset_path", pair_file)
    done, _ = train(first_round[0], tmp_path / "m", "--lora_r", "4", source=source, status=2)
    assert "the adapter that comes in has r 8, not 4" in done.stderr
    assert not (tmp_path / "m").exists()


def test_a_trainer_that_cannot_be_built_leaves_the_old_output(first_round, tiny_llama, pair_file, tmp_path):
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
    assert record["pairs"] == {"read": 4, "identical": 1, "too_long": 1, "kept": 2}
    done, _ = train(tiny_llama, tmp_path / "n", "--max_length", "8", source=source, status=2)
    assert "no pair is left to train on" in done.stderr
    assert not (tmp_path / "n").exists()


@needs_hub
@pytest.mark.parametrize("name", ["ai2_arc/ARC-Challenge", "truthful_qa"])
def test_keyed_sets_by_name(tiny_llama, tmp_path, name):
    flags = [
        "--dataset_name", name, "--model_name_or_path", tiny_llama, "--output_dir", tmp_path / "m", "--seed", "0",
        *SMALL, "--num_sample", "5", "--max_steps", "1",
    ]  # fmt: skip
    if name == "truthful_qa":
        done = call_here("dpo.py", *flags, cwd=HUB)
    else:
        done = call(*LAUNCH, PROJECT / "dpo.py", *flags, cwd=HUB)
    record = json.loads((tmp_path / "m" / "grath.json").read_text())
    assert record["pairs"]["kept"] == 5
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
    # All weights of the adapter are used at every step.
    assert config.ddp_find_unused_parameters is False
    assert GrathDPOConfig(output_dir="unused", ddp_find_unused_parameters=True).ddp_find_unused_parameters


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


def test_two_processes_train_the_same(tiny_llama, pair_file, tmp_path):
    source, steps = ("--dataset_path", pair_file), ("--max_steps", "7")  # more than two epochs
    _, single = train(tiny_llama, tmp_path / "1", *steps, source=source)
    two = [*LAUNCH[:3], "2", *LAUNCH[4:], "--multi_gpu", "--num_cpu_threads_per_process", "1"]
    done = call(
        *two, PROJECT / "dpo.py", *source, "--model_name_or_path", tiny_llama, "--output_dir", tmp_path / "m",
        "--seed", "0", *STEPS, *SMALL, *steps, "--gradient_accumulation_steps", "1",
    )  # fmt: skip
    assert "7 steps of 4 pairs, 2 process(es)" in done.stdout
    assert "The paper trains with 16 pairs a step, not 4" in done.stdout
    for ours, theirs in zip(read_training(tmp_path / "m")["log"][:7], single["log"][:7], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["rewards/margins"] == pytest.approx(theirs["rewards/margins"], abs=1e-3)
    for ours, theirs in zip(weights(tmp_path / "m").values(), weights(tmp_path / "1").values(), strict=True):
        assert (ours - theirs).abs().max() < 1e-3


@pytest.mark.parametrize(("batch", "processes", "expected"), [(4, 1, 4), (4, 2, 2), (8, 2, 1), (4, 8, 1), (16, 1, 1)])
def test_accumulation_keeps_the_papers_batch(batch, processes, expected):
    from grath.cli import papers_accumulation

    assert papers_accumulation(batch, processes) == expected


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_margins_with_a_quantised_base(tiny_llama, pair_file, tmp_path, precision, caplog):
    flags = ("--precision", precision, "--reference")
    source = ("--dataset_path", pair_file)
    done, first = train(tiny_llama, tmp_path / "1", *flags, "rolling", source=source)
    assert "MatMul8bitLt" not in done.stderr + caplog.text
    _, rolling = train(tmp_path / "1", tmp_path / "2", *flags, "rolling", source=source)
    _, fixed = train(tmp_path / "1", tmp_path / "3", *flags, "fixed", source=source)
    # In int8, activations are rounded by the largest of their batch, so the margin is 0 to that rounding.
    rounding = {"nf4": 1e-3, "int8": 5e-2}[precision]
    assert {str(weight.dtype) for weight in weights(tmp_path / "2").values()} == {"torch.float32"}
    assert abs(margin(first)) < rounding and abs(margin(rolling)) < rounding
    assert margin(fixed) > 0.5 * margin(first, 2) > 0.1


def test_the_adapter_on_a_quantised_base_is_not_rounded(tiny_llama, pair_file, tmp_path):
    from peft import get_peft_model_state_dict

    from grath.chat import template_for
    from grath.models import load_model, load_tokenizer
    from grath.pairs import read_pairs
    from grath.settings import GrathDPOConfig
    from grath.trainer import GrathDPOTrainer, keep_trainable, tokenise

    train(tiny_llama, tmp_path / "1", "--precision", "nf4", source=("--dataset_path", pair_file))
    tokenizer = load_tokenizer(tmp_path / "1")
    trainer = GrathDPOTrainer(
        model=load_model(tmp_path / "1", "nf4", trainable=True),
        args=GrathDPOConfig(output_dir=str(tmp_path / "2"), precision="nf4", max_steps=1),
        train_dataset=keep_trainable(tokenise(read_pairs(pair_file), tokenizer, template_for(tokenizer, "auto")), 1024)[
            0
        ],
        processing_class=tokenizer,
        reference="rolling",
    )
    # A checkpoint is read to this process's own device, not to the first GPU.
    assert trainer.model.load_adapter.keywords == {"torch_device": str(trainer.accelerator.device)}
    held, saved = get_peft_model_state_dict(trainer.model), weights(tmp_path / "1")
    assert held.keys() == saved.keys()
    assert all((held[name] == saved[name]).all() for name in saved)


def test_other_losses_go_through_trl(tiny_llama, pair_file, tmp_path):
    flags = ("--loss_type", "ipo", "--train_sampling_strategy", "random")
    _, record = train(tiny_llama, tmp_path / "m", *flags, source=("--dataset_path", pair_file))
    assert record["log"][0]["loss"] == pytest.approx(25, abs=1e-3)  # (0 - 1 / (2 beta))^2


@pytest.fixture(scope="module", params=["rolling", "fixed"])
def trainer(request, first_round, pair_file, tmp_path_factory):
    """A trainer of the second round, before its first step, and its tokenised pairs."""
    from grath.chat import template_for
    from grath.models import load_model, load_tokenizer
    from grath.pairs import read_pairs
    from grath.settings import GrathDPOConfig
    from grath.trainer import GrathDPOTrainer, keep_trainable, tokenise

    tokenizer = load_tokenizer(first_round[0])
    dataset, _ = keep_trainable(tokenise(read_pairs(pair_file), tokenizer, template_for(tokenizer, "auto")), 1024)
    return GrathDPOTrainer(
        model=load_model(first_round[0], "fp32", trainable=True),
        args=GrathDPOConfig(output_dir=str(tmp_path_factory.mktemp("t")), precision="fp32", max_steps=2),
        train_dataset=dataset,
        processing_class=tokenizer,
        reference=request.param,
    )


def test_reference_log_probabilities_are_those_of_the_reference(trainer, first_round):
    import torch

    from grath.models import load_model

    # The fixed reference is the base alone, loaded anew; the rolling one is the base with the incoming adapter.
    name = first_round[0] if trainer.reference == "rolling" else first_round[2]["base_model"]
    reference = load_model(name, "fp32").eval()
    for row in trainer.train_dataset:
        for side in ("chosen", "rejected"):
            prompt, answer = row["prompt_ids"], row[f"{side}_ids"]
            with torch.no_grad():
                scores = reference(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = scores.gather(1, torch.tensor(answer)[:, None]).sum().item()
            assert row[f"ref_{side}_logps"] == pytest.approx(expected, abs=1e-4)


def held_by(thing):
    """The tensors that an object holds, directly or through what it holds."""
    import gc
    import types

    import torch

    tensors, seen, waiting = [], set(), [thing]
    while waiting:
        found = waiting.pop()
        # Classes, modules and a function's globals lead to all that this process has.
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


def test_one_copy_of_the_base_is_held(trainer):
    embedding = trainer.model.get_base_model().get_input_embeddings().weight
    own = {p.data_ptr() for p in trainer.model.parameters() if p.shape == embedding.shape}
    held = {tensor.data_ptr() for tensor in held_by(trainer) if tensor.shape == embedding.shape}
    assert embedding.data_ptr() in own and held == own
    assert trainer.ref_model is None
    assert not [name for name, _ in trainer.model.named_parameters() if ".ref." in name]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_shared_prompt_is_computed_once_with_equal_results(family):
    import torch
    from test_shared_prefix import tiny

    from grath.trainer import _share_prompts

    torch.manual_seed(1)
    backbone = tiny(family).model
    seen = []
    backbone.layers[0].register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    lengths = [(20, 5, 9), (3, 14, 2), (11, 1, 1), (1, 6, 8)]  # prompt, chosen, rejected
    pairs = [[torch.randint(1, 60, (n,)) for n in row] for row in lengths]
    pairs[2][2] = pairs[2][1]  # equal sequences
    sequences = [torch.cat((p, a)) for side in (1, 2) for p, a in ((row[0], row[side]) for row in pairs)]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True)
    with torch.no_grad():
        plain = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        shared = _share_prompts(backbone.forward)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    torch.testing.assert_close(shared[mask.bool()], plain[mask.bool()], atol=1e-5, rtol=1e-4)
    assert seen[1][0] * seen[1][1] < 0.75 * seen[0][0] * seen[0][1]


def test_every_epoch_reaches_the_sampler(trainer, monkeypatch):
    from trl import DPOTrainer

    monkeypatch.setattr(DPOTrainer, "_run_epoch", lambda self, **kwargs: kwargs["epoch"])
    sampler = trainer._get_train_sampler()
    assert trainer._run_epoch(epoch=3) == sampler.epoch == 3


def test_pairs_of_a_step_are_of_like_length():
    from grath.trainer import LengthGrouped

    lengths = [(37 * i) % 100 for i in range(1600)]
    sampler = LengthGrouped(lengths, 16, seed=3)
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
def test_warnings_in_words(log, words):
    from grath.checkpoints import warnings_of

    found = list(warnings_of(log, 0.1, warmup_steps=100).values())
    assert found == [] if words is None else len(found) == 1 and found[0].startswith(words)


@pytest.mark.parametrize(("precision", "warned"), [("fp32", False), ("bf16", True), ("nf4", True), ("fp16", False)])
def test_nothing_learnt_is_judged_by_the_precision(precision, warned, tmp_path):
    """A policy that has learnt nothing has a margin of the rounding, for the reference was batched otherwise."""
    from grath.checkpoints import rounding, warnings_of
    from grath.settings import GrathDPOConfig

    eps = rounding(GrathDPOConfig(output_dir=str(tmp_path), precision=precision))
    likelihoods = {"logps/chosen": -70.0, "logps/rejected": -60.0}
    log = [{**entry(step, 0.02, 0.0), **likelihoods} for step in (1, 50, 150)]
    assert ("no margin" in warnings_of(log, 0.1, 100, eps)) == warned
    learnt = [*log, {**entry(160, 0.3, 0.0), **likelihoods}]
    assert "no margin" not in warnings_of(learnt, 0.1, 100, eps)


def test_the_training_hands_its_precision_to_the_warnings(monkeypatch, tmp_path):
    from types import SimpleNamespace

    from grath import checkpoints
    from grath.settings import GrathDPOConfig

    given = []
    monkeypatch.setattr(checkpoints, "warnings_of", lambda *args: given.append(args) or {})
    state = SimpleNamespace(max_steps=10, log_history=[entry(1, 0, 0)], is_world_process_zero=True)
    checkpoints.TrainingLog().on_train_begin(GrathDPOConfig(output_dir=str(tmp_path), precision="bf16"), state, None)
    assert given[0][1:] == (0.1, 100, 2**-7)


def test_what_lies_beside_the_adapter(first_round, tiny_llama, pair_file):
    output, done, record = first_round
    assert [line["step"] for line in record["log"]] == [1, 2, 3, 3]
    assert {"loss", "rewards/margins", "rewards/accuracies", "logps/chosen"} <= record["log"][0].keys()
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")
    assert record["pair_file_sha256"] and record["adapter_sha256"] and record["seconds"] > 0
    assert record["base_model"] == str(tiny_llama) and record["incoming_adapter"] is None
    assert record["versions"]["trl"] and record["settings"]["beta"] == 0.1
    assert record["pairs"]["kept"] == 12
    assert "margin=" in done.stderr and "accuracy=" in done.stderr
    # At this learning rate every pair is preferred within the three steps.
    assert "Warning: every chosen answer is preferred already" in done.stdout
    assert [warning.partition(" (")[0] for warning in record["warnings"]] == [
        "every chosen answer is preferred already"
    ]


def test_export_is_a_model_as_any_other(first_round, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from grath.models import load_model

    out = tmp_path / "merged model"
    done = call(sys.executable, "-m", "grath.export", first_round[0], out, "--precision", "fp32")
    assert done.stdout.splitlines()[-1].startswith(f"Wrote {out}")
    ids = AutoTokenizer.from_pretrained(out)("Is ice cold?", return_tensors="pt").input_ids
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(out)(ids).logits
        adapted = load_model(first_round[0], "fp32").eval()(ids).logits
        base = load_model(first_round[2]["base_model"], "fp32").eval()(ids).logits
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
    assert (merged - base).abs().max() > 1e-2
    done = call(sys.executable, "-m", "grath.export", first_round[0], out, status=2)
    assert "is there already" in done.stderr
    done = call(sys.executable, "-m", "grath.export", out, tmp_path / "n", status=2)
    assert "is no LoRA adapter's folder" in done.stderr


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_export_notices_a_tampered_merge(first_round, tmp_path, monkeypatch, precision):
    from peft import PeftModel

    from grath import export
    from grath.cli import UserError

    monkeypatch.setattr(sys, "argv", ["export", str(first_round[0]), str(tmp_path / "out"), "--precision", precision])
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    with pytest.raises(UserError, match="nothing was saved"):
        export.main()
    assert not list(tmp_path.iterdir())


def test_accelerates_configurations():
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    configs = {path.stem: load_config_from_file(str(path)) for path in (PROJECT / "accelerate_configs").glob("*.yaml")}
    assert configs["fsdp"].fsdp_config["fsdp_version"] == 2
    assert configs["deepspeed_zero2"].deepspeed_config["zero_stage"] == 2
    assert configs["deepspeed_zero2"].deepspeed_config["gradient_accumulation_steps"] == "auto"
    assert {name: config.distributed_type for name, config in configs.items()} == {
        "one_gpu": DistributedType.NO,
        "data_parallel": DistributedType.MULTI_GPU,
        "fsdp": DistributedType.FSDP,
        "deepspeed_zero2": DistributedType.DEEPSPEED,
    }


def test_a_training_by_a_configuration_file(tiny_llama, pair_file, tmp_path):
    """The loop's trainings are by the file for one GPU."""
    call(
        "accelerate", "launch", "--config_file", PROJECT / "accelerate_configs" / "data_parallel.yaml",
        "--num_processes", "2", PROJECT / "dpo.py", "--dataset_path", pair_file, "--model_name_or_path", tiny_llama,
        "--output_dir", tmp_path / "m", "--seed", "0", *STEPS, *SMALL, "--max_steps", "1",
    )  # fmt: skip
    assert read_training(tmp_path / "m")["processes"] == 2


@pytest.mark.parametrize(("dtype", "ways"), [("fp32", ["trl", "second_model", "ours"]), ("bf16", ["ours"])])
def test_the_training_benchmark(tiny_llama, pair_file, dtype, ways):
    done = call(
        sys.executable, PROJECT / "benchmarks" / "training.py", "--model", tiny_llama, "--dataset_path", pair_file,
        "--steps", "2", "--dtype", dtype, "--same_order", "--ways", *ways,
    )  # fmt: skip
    table = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()[2:]}
    assert list(table) == ways
    # Of a loss of about 0.7, printed to six decimals.
    assert all(float(row[-1]) < 1e-4 for row in table.values())
