"""The output folder: its files, which folders are refused, and resuming after an interruption."""

import json
import shutil
import subprocess
import sys
import time

import pytest
from support import PROJECT, call_here, pair, weights, write_rows
from training import SMALL, read_training, train


def test_files_next_to_the_adapter(first_iteration, tiny_llama, pair_file):
    output, done, record = first_iteration
    assert [line["step"] for line in record["log"]] == [1, 2, 3, 3]
    assert {"loss", "rewards/margins", "rewards/accuracies", "logps/chosen"} <= record["log"][0].keys()
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")
    assert record["pair_file_sha256"] and record["adapter_sha256"] and record["seconds"] > 0
    assert record["base_model"] == str(tiny_llama) and record["incoming_adapter"] is None
    assert record["versions"]["trl"] and record["settings"]["beta"] == 0.1
    assert record["pairs"]["kept"] == 12
    assert "margin=" in done.stderr and "accuracy=" in done.stderr
    # At this learning rate every chosen answer is preferred within three steps.
    assert "Warning: every chosen answer is preferred already" in done.stdout
    assert [warning.partition(" (")[0] for warning in record["warnings"]] == [
        "every chosen answer is preferred already"
    ]


def test_finished_output_is_not_changed(first_iteration, tiny_llama, pair_file, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in first_iteration[0].rglob("*")}
    source = ("--dataset_path", pair_file)
    done, _ = train(tiny_llama, first_iteration[0], source=source)
    assert "contains this training, finished" in done.stdout
    done, _ = train(tiny_llama, first_iteration[0], "--beta", "0.2", source=source, status=2)
    assert "contains a training with another beta (0.1, not 0.2)" in done.stderr
    others = write_rows(tmp_path / "pairs.json", [pair("q", "a", "b")])
    done, _ = train(tiny_llama, first_iteration[0], source=("--dataset_path", others), status=2)
    assert "another pair_file_sha256" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in first_iteration[0].rglob("*")} == before


def test_files_of_an_early_kill_are_ignored(tiny_llama, pair_file, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / ".grath.json.x.tmp").write_text("{")
    (tmp_path / "m" / "README.md").write_text("a model card")
    train(tiny_llama, tmp_path / "m", source=("--dataset_path", pair_file))
    flags = ("--overwrite_output_dir", "--resume_from_checkpoint", tmp_path / "m" / "checkpoint-3")
    done, _ = train(tiny_llama, tmp_path / "m", *flags, source=("--dataset_path", pair_file), status=2)
    assert "removes the checkpoints" in done.stderr
    for checkpoint in (tmp_path / "none", tmp_path / "m"):
        flags = ("--resume_from_checkpoint", checkpoint)
        done, _ = train(tiny_llama, tmp_path / "new", *flags, source=("--dataset_path", pair_file), status=2)
        assert f"{checkpoint} is no complete checkpoint" in done.stderr and not (tmp_path / "new").exists()
    # Another batch size with the same effective batch is the same training.
    flags = ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1")
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


def test_an_interrupted_training_resumes_with_other_pairs_per_forward_pass(tiny_llama, pair_file, tmp_path):
    source, flags = ("--dataset_path", pair_file), ("--max_steps", "7", "--save_steps", "4")
    train(tiny_llama, tmp_path / "whole", *flags, source=source)
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    # As if it had been interrupted after step 4, in the middle of an epoch of three steps.
    shutil.rmtree(tmp_path / "half" / "checkpoint-7")
    (tmp_path / "half" / "adapter_model.safetensors").unlink()
    flags += ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1")
    done, record = train(tiny_llama, tmp_path / "half", *flags, "--save_steps", "6", source=source)
    assert (tmp_path / "half" / "checkpoint-6").is_dir()  # not of the checkpoint's interval
    assert record["resumed_from"].endswith("checkpoint-4") and "Resuming from" in done.stdout
    for ours, theirs in zip(weights(tmp_path / "half").values(), weights(tmp_path / "whole").values(), strict=True):
        assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"])
def test_a_truncated_checkpoint_is_skipped(tiny_llama, pair_file, tmp_path, file):
    from grath.dpo.checkpoints import last_checkpoint

    train(tiny_llama, tmp_path / "m", "--save_steps", "1", source=("--dataset_path", pair_file))
    assert last_checkpoint(tmp_path / "m").endswith("checkpoint-3")
    content = (tmp_path / "m" / "checkpoint-3" / file).read_bytes()
    (tmp_path / "m" / "checkpoint-3" / file).write_bytes(content[: len(content) // 2])
    assert last_checkpoint(tmp_path / "m").endswith("checkpoint-2")
    shutil.rmtree(tmp_path / "m" / "checkpoint-2")
    (tmp_path / "m" / "checkpoint-1" / file).unlink()
    assert (last_checkpoint(tmp_path / "m") is None) == (file not in ("optimizer.pt", "rng_state.pth"))


def test_a_regular_expression_of_target_modules_is_kept(tmp_path):
    from types import SimpleNamespace

    from grath.dpo.checkpoints import save_adapter

    modules = r".*\.(q|v)_proj"

    def save_model(folder):
        (tmp_path / ".partial").mkdir()
        (tmp_path / ".partial" / "adapter_config.json").write_text(json.dumps({"target_modules": modules}))
        (tmp_path / ".partial" / "adapter_model.safetensors").write_bytes(b"")

    save_adapter(
        SimpleNamespace(
            args=SimpleNamespace(output_dir=tmp_path), drop_ref_adapter=lambda: None, save_model=save_model,
            accelerator=SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None),
        ),
        {},
    )  # fmt: skip
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == modules


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
