"""A disk that is full, and names that are hard to handle."""

import pytest
from fault_injection import ASK, SCORE, TRAIN, copy_without, hit_and_restart, point, same_as
from support import BUNDLED, call

pytestmark = pytest.mark.faults

# No file of the process grows beyond `limit` bytes from this point on.
FULL_DISK = {
    "the record of pairs": point(ASK, "open", r"/\.iter1_\w+\.json\.record\.json", limit=0),
    "the responses": point(ASK, "open", r"\.responses\.", limit=0),
    "the pair file": point(ASK, "open", r"/\.iter1_\w+\.json\.\w+\.tmp$", limit=0),
    "the combined file": point("combine_new", "open", r"_combined\.json", limit=0),
    "the training's record": point(TRAIN, "open", r"/\.grath\.json", limit=0),
    "a checkpoint's adapter": point(TRAIN, "os.mkdir", r"checkpoint-2$", limit=1000),
    "a checkpoint's other files": point(TRAIN, "os.mkdir", r"checkpoint-4$", limit=25_000),
    "the log": point(TRAIN, "open", r"/\.training_log\.jsonl", limit=0),
    "the training's plot": point(TRAIN, "open", r"/\.training\.png\.\w+\.tmp$", limit=0),
    "the adapter": point(TRAIN, "os.mkdir", r"/\.partial$", limit=1000),
    "the settings of the scores": point(SCORE, "open", r"/\.settings\.json", limit=0),
    "the scores": point(SCORE, "open", r"/\.grath_mc1\.json", limit=0),
    "the answers": point(SCORE, "open", r"/\.samples\.jsonl", limit=0),
    "the report": point("grath.report", "open", r"/\.report\.md", limit=0),
}


def test_a_full_disk_at_every_writing_stage(llama_run, tmp_path):
    undisturbed, settings, _ = llama_run
    copy_without(undisturbed, tmp_path, 2)

    def one_line(run, name, output):
        assert "Traceback" not in output, f"{name}\n{output}"
        errors = [line for line in output.splitlines() if ": error: " in line]
        assert len(errors) == 2, f"{name}: {errors}"  # the stage's, and the loop's
        # torch's writer, of a checkpoint's other files, does not say why it failed.
        said = "no space is left" if name == "a checkpoint's other files" else "raise it (ulimit -f)"
        assert said in errors[0], errors

    run = hit_and_restart(FULL_DISK, settings, tmp_path, expected=1, each=one_line)
    same_as(run, undisturbed)


def test_names_are_names_and_secrets_stay_out(tiny_llama, tmp_path):
    name = "a \"b\" 'c' $(touch pwned) `touch pwned` ;*\nend"
    (tmp_path / "a - 'question' $HOME.jsonl").write_bytes(BUNDLED.read_bytes())
    env = {
        "MODEL_NAME_OR_PATH": str(tiny_llama), "RUN_NAME": name, "RUNS_DIR": "runs - $(touch pwned)", "ITERATIONS": "1",
        "DATA_PATH": "a - 'question' $HOME.jsonl", "NUM_QUERY": "2", "MAX_STEPS": "1", "TASKS": "grath_mc1\ngrath_mc2",
        "LIMIT": "2", "HF_TOKEN": "hf_secretsecretsecret", "WANDB_API_KEY": "secretsecretsecret",
    }  # fmt: skip
    done = call("run_llama2.sh", cwd=tmp_path, env=env)
    run = tmp_path / "runs - $(touch pwned)" / f"{name}_seed_0"
    assert (run / "report.md").is_file()
    assert {file.name for file in run.glob("results/iter_1/grath*")} == {"grath_mc1.json", "grath_mc2.json"}
    assert len(list(run.glob("models/*/adapter_model.safetensors"))) == 1
    assert not list(tmp_path.rglob("pwned"))
    assert "secretsecret" not in done.stdout + done.stderr
    assert not [path for path in run.rglob("*") if path.is_file() and b"secretsecret" in path.read_bytes()]
