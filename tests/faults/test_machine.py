"""A machine that fails: no room, no rights, no memory, two starts at once; and names that are hard to handle."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import BUNDLED, call
from hitting import ASK, TRAIN, WITHOUT_SCORES, copy_without, hit_and_restart, point, same_as, start

FULL = "raise the limit (ulimit -f)"


def full(program, event, path, limit=0):
    """No file of the process grows beyond `limit` bytes from this point on."""
    return point(program, event, path, limit=limit)


FULL_DISK = {
    "the manifest": full("supervise begin", "open", r"/\.manifest\.json"),
    "the replies": full(ASK, "open", r"\.replies\.0$"),
    "the pair file": full(ASK, "open", r"/\.iter1_\w+\.json\.\w+\.tmp$"),
    "the combined file": full("combine_new", "open", r"_combined\.json"),
    "the training's record": full(TRAIN, "open", r"/\.grath\.json"),
    "a checkpoint's adapter": full(TRAIN, "os.mkdir", r"checkpoint-2$", limit=1000),
    "a checkpoint's other files": full(TRAIN, "os.mkdir", r"checkpoint-4$", limit=25_000),
    "the log": full(TRAIN, "open", r"/\.training_log\.jsonl"),
    "the training's plot": full(TRAIN, "open", r"/\.training\.png\.partial"),
    "the adapter": full(TRAIN, "os.mkdir", r"/\.partial$", limit=1000),
    "the harness's results": full("grath.harness run", "open", r"results_.*\.json$"),
    "the scores": full("grath.harness split", "open", r"/\.grath_mc1\.json"),
    "the answers": full("grath.samples", "open", r"/\.samples\.jsonl"),
    "the report": full("grath.report", "open", r"/\.report\.md"),
}


@pytest.mark.faults
def test_a_full_disk_at_every_writing_stage(llama_run, tmp_path):
    undisturbed, settings, _ = llama_run
    copy_without(undisturbed, tmp_path, 2)

    def one_line(run, name, output):
        if name == "the end":
            return
        assert "Traceback" not in output, f"{name}\n{output}"
        errors = [line for line in output.splitlines() if ": error: " in line]
        assert len(errors) == (1 if name in ("the manifest", "the report") else 2), f"{name}: {errors}"
        # torch's writer does not say why it failed, and the harness does not say that it did.
        silent = ("a checkpoint's other files", "the harness's results")
        assert ("no space is left" if name in silent else FULL) in errors[0], errors

    run = hit_and_restart(FULL_DISK, settings, tmp_path, expected=1, each=one_line)
    same_as(run, undisturbed)


@pytest.mark.faults
@pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0 if shutil.which("unshare") else True,
    reason="no file system can be mounted here",
)
def test_a_small_file_system(llama_run, tmp_path):
    undisturbed, settings, _ = llama_run
    (tmp_path / "disk").mkdir()
    script = (
        'mount -t tmpfs -o size=160k none "$RUNS_DIR"; "$0"; echo "status $?"; '
        'mount -o remount,size=20m none "$RUNS_DIR"; "$0"; echo "status $?"; cp -a "$RUNS_DIR"/llama2_seed_0 "$1"'
    )
    env = {**settings, **WITHOUT_SCORES, "RUNS_DIR": str(tmp_path / "disk")}
    loop = str(BUNDLED.parent.parent / "run_llama2.sh")
    done = call("unshare", "-m", "bash", "-c", script, loop, tmp_path / "copy", env=env)
    assert re.findall(r"^status (\d)", done.stdout, re.MULTILINE) == ["1", "0"]
    assert "no space is left on the disk: free some and start the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    same_as(tmp_path / "copy", undisturbed)


def test_two_starts_at_once(llama_run, tmp_path):
    _, settings, _ = llama_run
    settings = {**settings, **WITHOUT_SCORES}
    held = point(ASK, "open", r"\.replies\.0$", signal="SIGCONT")  # which only stops this process for a minute
    found = []
    first = threading.Thread(target=lambda: found.append(start(settings, tmp_path, held)))
    first.start()
    lock = tmp_path / ".llama2_seed_0.lock"
    deadline = time.monotonic() + 60
    while not (tmp_path / "llama2_seed_0" / "manifest.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    holder = int(re.match(r"process (\d+) on ", lock.read_text())[1])
    status, output = start(settings, tmp_path)
    assert status == 2
    last = output.splitlines()[-1]
    assert re.search(rf"llama2_seed_0 is in use by process {holder} on \S+ since 20\S+: wait for it, or", last)
    os.kill(holder, signal.SIGTERM)
    first.join()
    assert found[0][0] == 128 + signal.SIGTERM
    assert lock.exists() and not list(tmp_path.rglob("*.tmp"))


def test_a_lock_whose_owner_is_dead_is_taken_over(llama_run, tmp_path):
    undisturbed, settings, _ = llama_run
    copy_without(undisturbed, tmp_path)
    lock = tmp_path / ".llama2_seed_0.lock"
    lock.write_text("process 1 on elsewhere since 2020-01-01\n")
    hold = "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, 2); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold, lock], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        status, output = start(settings, tmp_path)
        assert status == 2 and "is in use by process 1 on elsewhere since 2020-01-01: wait for it" in output
        holder.kill()
    status, output = start(settings, tmp_path)
    assert status == 0, output
    assert "elsewhere" not in lock.read_text()


@pytest.mark.faults
def test_names_are_names_and_secrets_stay_out(tiny_llama, tmp_path):
    name = "a \"b\" 'c' $(touch pwned) `touch pwned` ;*\nend"
    (tmp_path / "-my 'questions' $HOME.jsonl").write_bytes(BUNDLED.read_bytes())
    env = {
        "MODEL_NAME_OR_PATH": str(tiny_llama), "RUN_NAME": name, "RUNS_DIR": "-runs $(touch pwned)", "ROUNDS": "1",
        "DATA_PATH": "-my 'questions' $HOME.jsonl", "NUM_QUERY": "2", "MAX_STEPS": "1", "TASKS": "grath_mc1\ngrath_mc2",
        "LIMIT": "2", "HF_TOKEN": "hf_secretsecretsecret", "WANDB_API_KEY": "secretsecretsecret",
    }  # fmt: skip
    done = call("run_llama2.sh", cwd=tmp_path, env=env)
    run = tmp_path / "-runs $(touch pwned)" / f"{name}_seed_0"
    assert (run / "report.md").is_file()
    assert {file.name for file in run.glob("results/iter_1/*.json")} == {"grath_mc1.json", "grath_mc2.json"}
    assert len(list(run.glob("models/*/adapter_model.safetensors"))) == 1
    assert not list(tmp_path.rglob("pwned"))
    assert "secretsecret" not in done.stdout + done.stderr
    assert not [path for path in run.rglob("*") if path.is_file() and b"secretsecret" in path.read_bytes()]


@pytest.mark.faults
def test_too_few_file_descriptors(tiny_llama, tmp_path):
    command = (
        'ulimit -n 5; exec python "$0" --model_name_or_path "$1" --save_prefix x --save_dir "$2" --data_path "$3" '
        "--num_query 2"
    )
    script = BUNDLED.parent.parent / "create_pair_responses.py"
    done = call("bash", "-c", command, script, tiny_llama, tmp_path / "out", BUNDLED, status=1)
    assert "too many files are open: raise the limit (ulimit -n 4096)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["/proc/runs", "FILE/runs"])
def test_a_folder_that_cannot_be_written(place, tiny_llama, tmp_path):
    (tmp_path / "file").write_text("")
    env = {"MODEL_NAME_OR_PATH": str(tiny_llama), "RUNS_DIR": place.replace("FILE", str(tmp_path / "file"))}
    done = call("run_llama2.sh", env=env, status=2)
    assert "cannot make the folder" in done.stderr
    assert done.stderr.count("\n") == 1
