"""Outputs that are missing, cut or altered are noticed before they are used, and made again."""

import json
import shutil

import pytest
from fault_injection import WITHOUT_SCORES, copy_without, same_as, same_scores, start

from grath.pipeline.manifest import damaged_outputs, find, hashes
from grath.pipeline.stage import outputs_up_to_date

pytestmark = pytest.mark.faults


def delete(path):
    path.unlink()


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def alter_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


KINDS = {
    delete: "is missing",
    cut_in_half: "has changed since it was written",
    alter_a_byte: "has changed since it was written",
}


@pytest.fixture
def copied(llama_run, tmp_path):
    """A copy of the undisturbed run, and its manifest."""
    copy_without(llama_run[0], tmp_path)
    run = tmp_path / "llama2_seed_0"
    return run, json.loads((run / "manifest.json").read_text())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_damaged_output_is_named_and_goes_with_what_was_made_last(kind, copied, capsys):
    run, manifest = copied
    count = 0
    for entry in manifest["stages"]:
        assert outputs_up_to_date(run, entry, entry["inputs"], list(entry["outputs"]), entry.get("data", {}))
        for name in entry["outputs"]:
            path, kept = run / name, run.parent / "kept"
            shutil.copytree(path.parent, kept)
            kind(path)
            assert damaged_outputs(run, entry, list(entry["outputs"])) == [(name, KINDS[kind])]
            capsys.readouterr()
            outputs = dict(entry["outputs"])
            assert not outputs_up_to_date(run, entry, entry["inputs"], list(outputs), {})
            assert name not in entry["outputs"]
            entry["outputs"] = outputs
            assert f"{entry['title']}: running again, because {path} {KINDS[kind]}" in capsys.readouterr().out
            assert not path.exists()
            assert not (path.parent / "adapter_model.safetensors").exists()
            shutil.rmtree(path.parent, ignore_errors=True)
            kept.rename(path.parent)
            count += 1
    assert count == 22


def test_what_was_made_from_something_else_is_made_again(copied, capsys):
    run, manifest = copied
    for number, name in ((1, "dpo"), (2, "combine"), (2, "scores")):
        entry = find(manifest, number, name)
        changed = next(iter(entry["inputs"]))
        inputs = {**entry["inputs"], changed: "0" * 64}
        outputs = list(entry["outputs"])
        assert not outputs_up_to_date(run, entry, inputs, outputs, {})
        assert f"running again, because {changed} has changed" in capsys.readouterr().out
        assert not [output for output in outputs if (run / output).exists()]
    assert not list(run.glob("models/iter_1_*"))  # and its checkpoints are gone


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_damaged_run_is_made_whole(kind, llama_run, copied):
    undisturbed, settings, _ = llama_run
    run, manifest = copied
    damaged = [("data", "iter0_*.json"), ("data", "*_combined.json"), ("models/iter_1_*", "adapter_model.safetensors")]
    damaged += [("models/iter_2_*", "grath.json")]
    if kind is cut_in_half:  # the scores take long: once
        damaged += [("results/iter_0", "grath_mc2.json"), ("results/iter_1", "samples.jsonl")]
    else:
        settings = {**settings, **WITHOUT_SCORES}
    files = [next(run.glob(f"{folder}/{file}")) for folder, file in damaged]
    before = {name: (run / name).stat().st_mtime_ns for entry in manifest["stages"] for name in entry["outputs"]}
    for file in files:
        kind(file)
    status, output = start(settings, run.parent)
    assert status == 0, output[-3000:]
    assert [f"running again, because {file} {KINDS[kind]}" in output for file in files] == [True] * len(files)
    same_as(run, undisturbed)
    same_scores(run, undisturbed)
    # What was whole, and made from bytes that came out the same again, is left alone.
    whole = [name for name in before if name.startswith("data/iter1") and "_combined" not in name]
    whole += [name for name in before if name.startswith("results/iter_2")]
    assert {name: (run / name).stat().st_mtime_ns for name in whole} == {name: before[name] for name in whole}


def test_an_input_that_has_changed_stops_the_run(llama_run, copied, tmp_path):
    _, settings, _ = llama_run
    questions = tmp_path / "questions.jsonl"
    shutil.copy(settings["DATA_PATH"], questions)
    run, manifest = copied
    manifest["settings"]["DATA_PATH"] = str(questions)
    known = hashes(run, [questions])
    manifest["inputs"] |= known
    del manifest["inputs"]["data/questions.jsonl"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    questions.write_text(questions.read_text() + "\n")
    status, output = start({**settings, "DATA_PATH": str(questions)}, run.parent)
    assert status == 2
    assert f"questions.jsonl has changed since the run in {run} was started: set another RUN_NAME, or FRESH=1" in output
