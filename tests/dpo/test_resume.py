"""The output folder: its files, which folders are refused, and resuming after an interruption."""

import json
import shutil
import subprocess
import sys
import time

import pytest
from support import PROJECT, call_here, pair, weights, write_rows
from training import SMALL, interrupt, read_training, train


def test_files_next_to_the_adapter(first_iteration, tiny_llama, pair_file):
    output, done, record = first_iteration
    assert [line["step"] for line in record["log"]] == [1, 2, 3, 3]
    assert [line["epoch"] for line in record["log"]] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert {"loss", "entropy", "rewards/margins", "rewards/accuracies", "logps/chosen"} <= record["log"][0].keys()
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")
    assert record["files"].keys() == {"adapter_model.safetensors", "adapter_config.json"}
    assert {"model.safetensors", "tokenizer.json"} <= record["inputs"]["model"]["base"].keys()
    assert record["inputs"]["pairs"] and record["inputs"]["effective_batch"] == 4 and record["inputs"]["beta"] == 0.1
    assert record["base_model"] == str(tiny_llama) and record["incoming_adapter"] is None
    assert record["versions"]["trl"] and record["starts"] == 1 and record["seconds"] > 0
    assert record["settings"]["train_sampling_strategy"] == "group_by_length"
    assert record["pairs"]["kept"] == 12
    assert "margin=" in done.stderr and "accuracy=" in done.stderr
    # At this learning rate every chosen answer is preferred within three steps.
    assert "Warning: every chosen answer is preferred already" in done.stdout
    assert [warning.partition(" (")[0] for warning in record["warnings"]] == [
        "every chosen answer is preferred already"
    ]


def test_finished_output_is_not_changed(first_iteration, tiny_llama, pair_file, tmp_path):
    output, source = first_iteration[0], ("--dataset_path", pair_file)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    done, _ = train(tiny_llama, output, source=source)
    assert "contains this training, finished" in done.stdout
    others = write_rows(tmp_path / "pairs.json", [pair("q", "a", "b")])
    for flags, difference in [
        (("--beta", "0.2"), "beta 0.1, not 0.2: "),
        (("--reference", "fixed"), "reference rolling, not fixed: "),
        (("--dataset_path", others), "pairs "),
        (("--tokenizer_name", tiny_llama), "tokenizer "),
    ]:
        done, _ = train(tiny_llama, output, *flags, source=source, status=2)
        assert f"{output} was made with {difference}" in done.stderr and "--overwrite_output_dir" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


@pytest.mark.parametrize("state", ["finished", "interrupted"])
def test_another_base_is_refused(first_iteration, tiny_llama, pair_file, tmp_path, state):
    output = tmp_path / "m"
    shutil.copytree(first_iteration[0], output) if state == "finished" else interrupt(first_iteration[0], output, 3)
    source = ("--dataset_path", pair_file)
    for file in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        shutil.copytree(tiny_llama, tmp_path / file)
        content = (tmp_path / file / file).read_bytes()
        (tmp_path / file / file).write_bytes(content + b" ")
        done, _ = train(tmp_path / file, output, source=source, status=2)
        assert f"was made with model base {file} " in done.stderr
    # In another folder it is the same base.
    (tmp_path / file / file).write_bytes(content)
    done, _ = train(tmp_path / file, output, source=source)
    assert ("contains this training, finished" if state == "finished" else "Resuming from") in done.stdout


def test_an_edited_adapter_is_refused(first_iteration, tiny_llama, pair_file, tmp_path):
    source = ("--dataset_path", pair_file)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        output = tmp_path / file
        shutil.copytree(first_iteration[0], output)
        (output / file).write_bytes((output / file).read_bytes() + b" ")
        done, _ = train(tiny_llama, output, source=source, status=2)
        assert f"{output / file} is not the file that was written: choose another --output_dir" in done.stderr
        done, _ = train(output, tmp_path / "next", source=source, status=2)
        assert f"{output / file} is not the file that was written: train the adapter again" in done.stderr


def test_files_of_an_early_kill_are_ignored(tiny_llama, pair_file, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / ".grath.json.x.tmp").write_text("{")
    (tmp_path / "m" / "README.md").write_text("a model card")
    train(tiny_llama, tmp_path / "m", "--max_steps", "1", source=("--dataset_path", pair_file))
    flags = ("--overwrite_output_dir", "--resume_from_checkpoint", tmp_path / "m" / "checkpoint-1")
    done, _ = train(tiny_llama, tmp_path / "m", *flags, source=("--dataset_path", pair_file), status=2)
    assert "removes the checkpoints" in done.stderr
    for checkpoint in (tmp_path / "none", tmp_path / "m"):
        flags = ("--resume_from_checkpoint", checkpoint)
        done, _ = train(tiny_llama, tmp_path / "new", *flags, source=("--dataset_path", pair_file), status=2)
        assert f"{checkpoint} is no complete checkpoint" in done.stderr and not (tmp_path / "new").exists()
    # Another batch size with the same effective batch is the same training.
    flags = ("--max_steps", "1", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1")
    done, _ = train(tiny_llama, tmp_path / "m", *flags, source=("--dataset_path", pair_file))
    assert "contains this training, finished" in done.stdout


def test_a_foreign_folder_is_refused(tiny_llama, pair_file, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.txt").write_text("mine")
    source = ("--dataset_path", pair_file)
    done, _ = train(tiny_llama, tmp_path / "m", source=source, status=2)
    assert "is not empty and contains no training of dpo.py" in done.stderr
    done, _ = train(tiny_llama, tiny_llama, "--overwrite_output_dir", source=source, status=2)
    assert "is the model that the training starts from" in done.stderr
    shutil.copytree(tiny_llama, tmp_path / "whole")
    done, _ = train(tiny_llama, tmp_path / "whole", "--overwrite_output_dir", source=source, status=2)
    assert "contains a full model" in done.stderr
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["thesis.txt"]


def test_a_killed_training_resumes_from_its_last_complete_checkpoint(tiny_llama, pair_file, tmp_path):
    command = [
        "--dataset_path", pair_file, "--model_name_or_path", tiny_llama, "--seed", "0", *SMALL, "--max_steps", "60",
        "--warmup_steps", "0", "--learning_rate", "1e-3", "--logging_steps", "1", "--save_steps", "7",
    ]  # fmt: skip
    call_here("dpo.py", *command, "--output_dir", tmp_path / "uninterrupted")
    killed = tmp_path / "killed"
    with subprocess.Popen(
        [sys.executable, PROJECT / "dpo.py", *command, "--output_dir", killed],
        stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        # The next checkpoint begins after this one is complete.
        while not (killed / "checkpoint-21").exists():
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    assert not (killed / "adapter_model.safetensors").exists()
    # A later checkpoint with a truncated file is skipped.
    half = killed / "checkpoint-56"
    shutil.copytree(killed / "checkpoint-14", half)
    state = json.loads((half / "trainer_state.json").read_text()) | {"global_step": 56}
    (half / "trainer_state.json").write_text(json.dumps(state))
    (half / "optimizer.pt").write_bytes((half / "optimizer.pt").read_bytes()[:-200])
    done = call_here("dpo.py", *command, "--output_dir", killed)
    assert "Resuming from" in done.stdout and "checkpoint-56" not in done.stdout
    assert read_training(killed)["resumed_from"]
    for ours, theirs in zip(weights(killed).values(), weights(tmp_path / "uninterrupted").values(), strict=True):
        assert (ours - theirs).abs().max() < 1e-6
    logs = [
        [entry.get("loss") for entry in read_training(tmp_path / name)["log"]] for name in ("killed", "uninterrupted")
    ]
    assert logs[0][:-1] == pytest.approx(logs[1][:-1], abs=1e-5)


def test_an_interrupted_training_resumes_with_other_pairs_per_forward_pass(tiny_llama, tmp_path):
    """In the middle of an epoch, and with a step of 4 that crosses the ends of 13 pairs."""
    pairs = [pair(f"What is {i}?" + " Say it." * (i % 7), f"It is {i}.", "Nobody." * (1 + i % 3)) for i in range(13)]
    source = ("--dataset_path", write_rows(tmp_path / "pairs.json", pairs))
    flags = ("--max_steps", "9", "--save_steps", "4")
    _, whole = train(tiny_llama, tmp_path / "whole", *flags, source=source)
    interrupt(tmp_path / "whole", tmp_path / "half", 4)
    sizes = ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1")
    done, record = train(tiny_llama, tmp_path / "half", *flags, *sizes, "--save_steps", "7", source=source)
    assert (tmp_path / "half" / "checkpoint-7").is_dir()  # not of the checkpoint's interval
    assert record["resumed_from"].endswith("checkpoint-4") and "Resuming from" in done.stdout
    assert record["starts"] == 2 and record["seconds"] > whole["seconds"]
    for ours, theirs in zip(weights(tmp_path / "half").values(), weights(tmp_path / "whole").values(), strict=True):
        assert (ours - theirs).abs().max() < 1e-5
    # Killed between the last checkpoint and the adapter.
    interrupt(tmp_path / "whole", tmp_path / "last", 9)
    _, record = train(tiny_llama, tmp_path / "last", *flags, source=source)
    assert record["resumed_from"].endswith("checkpoint-9")
    name = "adapter_model.safetensors"
    assert (tmp_path / "last" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_epochs(tiny_llama, pair_file, tmp_path):
    flags = (
        "--max_steps",
        "-1",
        "--num_train_epochs",
        "1.5",
        "--save_strategy",
        "epoch",
        "--logging_strategy",
        "epoch",
    )
    done, record = train(tiny_llama, tmp_path / "m", *flags, source=("--dataset_path", pair_file))
    assert "5 steps of 4 pairs" in done.stdout
    assert [(line["step"], round(line["epoch"], 2)) for line in record["log"][:3]] == [(1, 0.33), (3, 1), (5, 1.67)]
    assert sorted(path.name for path in (tmp_path / "m").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-5"]


@pytest.fixture(scope="module")
def checkpoints(tiny_llama, pair_file, tmp_path_factory):
    """A training with a checkpoint of each of its three steps. Read-only."""
    output = tmp_path_factory.mktemp("checkpoints") / "m"
    train(tiny_llama, output, "--save_steps", "1", source=("--dataset_path", pair_file))
    return output


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"])
def test_a_truncated_checkpoint_is_skipped(checkpoints, tmp_path, file):
    from grath.dpo.checkpoints import last_checkpoint

    shutil.copytree(checkpoints, tmp_path / "m")
    assert last_checkpoint(tmp_path / "m").endswith("checkpoint-3")
    content = (tmp_path / "m" / "checkpoint-3" / file).read_bytes()
    (tmp_path / "m" / "checkpoint-3" / file).write_bytes(content[: len(content) // 2])
    assert last_checkpoint(tmp_path / "m").endswith("checkpoint-2")
    shutil.rmtree(tmp_path / "m" / "checkpoint-2")
    (tmp_path / "m" / "checkpoint-1" / file).unlink()
    assert (last_checkpoint(tmp_path / "m") is None) == (file not in ("optimizer.pt", "rng_state.pth"))


def test_a_regular_expression_of_target_modules_is_kept(first_iteration, pair_file, tmp_path):
    adapter = tmp_path / "adapter"
    interrupt(first_iteration[0], adapter, 3)
    shutil.copy(first_iteration[0] / "adapter_model.safetensors", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"target_modules": r".*\.(q|k|v)_proj"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    train(adapter, tmp_path / "m", "--max_steps", "1", source=("--dataset_path", pair_file))
    assert json.loads((tmp_path / "m" / "adapter_config.json").read_text())["target_modules"] == r".*\.(q|k|v)_proj"


def test_another_rank_than_the_incoming_adapter_is_refused(first_iteration, pair_file, tmp_path):
    source = ("--dataset_path", pair_file)
    done, _ = train(first_iteration[0], tmp_path / "m", "--lora_r", "4", source=source, status=2)
    assert "the incoming adapter has r 8, not 4" in done.stderr
    assert not (tmp_path / "m").exists()


def test_a_failed_trainer_construction_keeps_the_old_output(first_iteration, tiny_llama, pair_file, tmp_path):
    output = tmp_path / "m"
    shutil.copytree(first_iteration[0], output)
    before = sorted(output.rglob("*"))
    flags = ("--sync_ref_model", "true", "--overwrite_output_dir")
    train(tiny_llama, output, *flags, source=("--dataset_path", pair_file), status=2)
    assert sorted(output.rglob("*")) == before
