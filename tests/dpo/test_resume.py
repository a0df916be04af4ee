"""The output folder: its files, which folders are refused, and resuming after an interruption."""

import os
import shutil
import subprocess
import sys

import pytest
from support import PROJECT, asking, call_here, change_json, pair, wait_for, write_rows
from trainings import command, difference, interrupt, refusal, train

from grath.dpo.checkpoints import last_checkpoint


def test_files_next_to_the_adapter(first_iteration):
    output, done, record = first_iteration
    assert [line["step"] for line in record["log"]] == [1, 2, 3, 3]
    assert [line["epoch"] for line in record["log"]] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert {"loss", "entropy", "rewards/margins", "rewards/accuracies", "logps/chosen"} <= record["log"][0].keys()
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")
    assert record["files"].keys() == {"adapter_model.safetensors", "adapter_config.json"}
    assert {"model.safetensors", "tokenizer.json"} <= record["inputs"]["model"]["base"].keys()
    assert record["inputs"]["pairs"] and record["inputs"]["effective_batch"] == 4 and record["inputs"]["beta"] == 0.1
    assert record["versions"]["trl"] and record["starts"] == 1 and record["seconds"] > 0
    assert record["settings"]["train_sampling_strategy"] == "group_by_length" and record["pairs"]["kept"] == 12
    assert "margin=" in done.stderr and "accuracy=" in done.stderr
    # At this learning rate every chosen answer is preferred within three steps.
    (warning,) = record["warnings"]
    assert warning.startswith("every chosen answer is preferred already") and f"Warning: {warning}" in done.stdout


def test_finished_output_is_not_changed(first_iteration, tiny_llama, pair_file, tmp_path):
    output = first_iteration[0]
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    # Another batch size with the same effective batch is the same training.
    for sizes in ((), ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1")):
        assert "contains this training, finished" in train(tiny_llama, output, *sizes, source=pair_file)[0].stdout
    others = write_rows(tmp_path / "pairs.json", [pair("q", "a", "b")])
    for flags, named in [
        (("--beta", "0.2"), "beta 0.1, not 0.2: "),
        (("--reference", "fixed"), "reference rolling, not fixed: "),
        (("--dataset_path", others), "pairs "),
        (("--tokenizer_name", tiny_llama), "tokenizer "),
    ]:
        error = refusal(tiny_llama, output, *flags, source=pair_file)
        assert f"{output} was made with {named}" in error and "--overwrite_output_dir" in error
    # Nor by a trainer that cannot be made.
    refusal(tiny_llama, output, "--sync_ref_model", "true", "--overwrite_output_dir", source=pair_file)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


@pytest.mark.parametrize("state", ["finished", "interrupted"])
def test_another_base_is_refused(first_iteration, tiny_llama, pair_file, tmp_path, state):
    output = tmp_path / "m"
    shutil.copytree(first_iteration[0], output) if state == "finished" else interrupt(first_iteration[0], output, 3)
    for file in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        shutil.copytree(tiny_llama, tmp_path / file)
        content = (tmp_path / file / file).read_bytes()
        (tmp_path / file / file).write_bytes(content + b" ")
        assert f"was made with model base {file} " in refusal(tmp_path / file, output, source=pair_file)
    # In another folder it is the same base.
    (tmp_path / file / file).write_bytes(content)
    done, _ = train(tmp_path / file, output, source=pair_file)
    assert ("contains this training, finished" if state == "finished" else "Resuming from") in done.stdout


def test_an_edited_adapter_is_refused(first_iteration, tiny_llama, pair_file, tmp_path):
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        output = shutil.copytree(first_iteration[0], tmp_path / file)
        (output / file).write_bytes((output / file).read_bytes() + b" ")
        before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
        edited = f"{output / file} is not the file that was written: "
        assert f"{edited}choose another --output_dir" in refusal(tiny_llama, output, source=pair_file)
        assert f"{edited}train the adapter again" in refusal(output, tmp_path / "next", source=pair_file)
        assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_starts_that_are_refused(first_iteration, tiny_llama, pair_file, tmp_path):
    finished, checkpoint = first_iteration[0], first_iteration[0] / "checkpoint-1"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    shutil.copytree(tiny_llama, tmp_path / "whole")
    os.mkfifo(tmp_path / "pipe")
    overwrite, resume = "--overwrite_output_dir", "--resume_from_checkpoint"
    for model, output, flags, message in [
        (tiny_llama, tmp_path / "mine", (), "is not empty and contains no training of dpo.py"),
        (tiny_llama, tiny_llama, (overwrite,), "is the model that the training starts from"),
        (tiny_llama, tmp_path / "whole", (overwrite,), "contains a full model"),
        (tiny_llama, finished, (overwrite, resume, checkpoint), "removes the checkpoints"),
        (tiny_llama, tmp_path / "new", (resume, tmp_path), f"{tmp_path} is not a complete checkpoint"),
        (tiny_llama, tmp_path / "new", (resume, checkpoint, "--beta", "0.3"), f"{checkpoint} was made with beta 0.1"),
        # Pairs that would be recorded by the hash of nothing.
        (tiny_llama, tmp_path / "new", ("--dataset_path", tmp_path / "pipe"), "pipe is not a regular file"),
    ]:
        assert message in refusal(model, output, *flags, source=pair_file)
    assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_killed_training_resumes_with_other_pairs_per_forward_pass(seventeen, tiny_llama, tmp_path):
    """In the middle of an epoch, and with a step of 4 that crosses the ends of 17 pairs."""
    flags, whole, record = seventeen
    killed = tmp_path / "killed"
    start = [sys.executable, PROJECT / "dpo.py", *command(tiny_llama, killed, *flags)]
    with subprocess.Popen(start, stderr=subprocess.DEVNULL) as process:
        # The next checkpoint begins after this one is complete.
        wait_for((killed / "checkpoint-6").exists, process)
        process.kill()
    assert not (killed / "adapter_model.safetensors").exists()
    sizes = ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--save_steps", "11")
    done, resumed = train(tiny_llama, killed, *sizes, source=flags)
    assert "Resuming from" in done.stdout
    assert (killed / "checkpoint-11").is_dir()  # not of the checkpoint's interval
    assert resumed["starts"] == 2 and resumed["warnings"] == record["warnings"]
    assert difference(killed, whole) < 1e-5
    losses = [[entry.get("loss") for entry in one["log"][:-1]] for one in (resumed, record)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_epochs(tiny_llama, pair_file, tmp_path):
    flags = ("--max_steps", "-1", "--num_train_epochs", "1.5", "--save_strategy", "epoch", "--loss_type", "ipo")
    done, record = train(tiny_llama, tmp_path / "m", *flags, "--logging_strategy", "epoch", source=pair_file)
    assert "5 steps of 4 pairs" in done.stdout
    assert record["log"][0]["loss"] == pytest.approx(25, abs=1e-3)  # (0 - 1 / (2 beta))^2
    assert [(line["step"], round(line["epoch"], 2)) for line in record["log"][:3]] == [(1, 0.33), (3, 1), (5, 1.67)]
    assert sorted(path.name for path in (tmp_path / "m").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-5"]


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"])
def test_a_truncated_checkpoint_is_skipped(first_iteration, tmp_path, file):
    shutil.copytree(first_iteration[0], tmp_path / "m")
    (tmp_path / "m" / "checkpoint-of-yesterday-9").mkdir()
    assert last_checkpoint(tmp_path / "m").endswith("checkpoint-3")
    content = (tmp_path / "m" / "checkpoint-3" / file).read_bytes()
    (tmp_path / "m" / "checkpoint-3" / file).write_bytes(content[: len(content) // 2])
    assert last_checkpoint(tmp_path / "m").endswith("checkpoint-2")
    shutil.rmtree(tmp_path / "m" / "checkpoint-2")
    (tmp_path / "m" / "checkpoint-1" / file).unlink()
    assert (last_checkpoint(tmp_path / "m") is None) == (file != "rng_state.pth")


def test_pairs_of_another_state_of_the_model_are_refused(tiny_llama, model, tmp_path):
    """The model was replaced after it wrote the pairs."""
    call_here(*asking(model, tmp_path, "--useFS"))
    change_json(model / "config.json", rms_norm_eps=1e-5)
    pairs = next(tmp_path.glob("p_*_useFS_True.json"))
    error = refusal(model, tmp_path / "d", source=pairs)
    assert "was made with base config.json " in error and "write the pairs again" in error
    train(tiny_llama, tmp_path / "d", source=pairs)  # another model may train on them
    (tmp_path / "x").mkdir()
    # The same model by another name, and new answers in a combined file.
    assert "write the pairs again" in refusal(tmp_path / "x" / ".." / "model", tmp_path / "e", source=pairs)
    shutil.copy(pairs, combined := pairs.with_name(f"{pairs.stem}_combined.json"))
    assert "write the pairs again" in refusal(model, tmp_path / "e", source=combined)
