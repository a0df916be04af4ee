"""`grath.push`: what is uploaded, and what the model card says, against a stand-in for the hub's client."""

import json
from unittest.mock import Mock

import huggingface_hub
import pytest
import yaml
from huggingface_hub import RepoUrl
from huggingface_hub.utils import filter_repo_objects
from made_runs import put_pairs, put_run
from support import call_here, change_json

from grath.common.files import sha256

NAME = "someone/truthful"


@pytest.fixture
def uploads(monkeypatch):
    """What was uploaded: (repository, name, content) of a file, and (repository, private, names) of a folder."""
    found, api = [], Mock()

    def upload_file(path_or_fileobj, path_in_repo, repo_id):
        found.append((repo_id, path_in_repo, json.loads(path_or_fileobj)))

    def upload_folder(repo_id, folder_path, allow_patterns, ignore_patterns):
        names = (str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file())
        kept = filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        found.append((repo_id, api.create_repo.call_args.kwargs["private"], sorted(kept)))

    api.create_repo.side_effect = lambda name, private, exist_ok: RepoUrl(f"https://huggingface.co/{name}")
    api.upload_file, api.upload_folder = upload_file, upload_folder
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **options: api)
    return found


def made_adapter(run, **record):
    """A run of an adapter on a base of the hub, with scores of M_0 and M_1."""
    put_run(run, {0: [0.0, 1.0, 0.0, 0.0], 1: [1.0, 1.0, 0.0, 0.0]}, max_steps=7)
    put_pairs(run, 0, [("q", "a", "b")])
    (adapter,) = run.glob("models/iter_1_*")
    (adapter / "checkpoint-4").mkdir()
    (adapter / "checkpoint-4" / "README.md").touch()
    (adapter / "README.md").write_text("tags:\n- generated_from_trainer\n# a model of None")
    files = [adapter / "adapter_model.safetensors", adapter / "adapter_config.json"]
    for file in files:
        file.write_text('{"base_model_name_or_path": "/home/me/secret", "r": 8}')
    change_json(adapter / "grath.json", files={file.name: sha256(file) for file in files}, **record)
    return adapter


def card_of(folder):
    """The metadata and the page of a card."""
    _, metadata, page = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), page


def test_an_adapter_is_pushed_with_a_card_of_its_run(tmp_path, uploads):
    adapter = made_adapter(tmp_path / "run_seed_0")
    done = call_here("grath.push", adapter, NAME, "--private")
    assert f"Pushed {adapter} to https://huggingface.co/{NAME}" in done.stdout
    config = {"base_model_name_or_path": "me/Llama-2-7b-chat-hf", "r": 8}
    names = ["README.md", "adapter_model.safetensors", "training_log.jsonl"]
    assert uploads == [(NAME, "adapter_config.json", config), (NAME, True, names)]
    metadata, page = card_of(adapter)
    assert metadata["base_model"] == "me/Llama-2-7b-chat-hf" and metadata["library_name"] == "peft"
    assert metadata["base_model_relation"] == "adapter"
    assert "each of 5 questions" in page and "This is the model of iteration 1." in page
    assert f'pipeline("text-generation", "{NAME}")' in page and "| pairs data_name " in page
    assert "| M_1        | 50.00 (+25.00 [" in page and "lm-evaluation-harness 0.4.13" in page
    assert "| dpo max_steps " in page and "Commit: def5678+, abc1234" in page and str(tmp_path) not in page
    # An edited card is kept.
    (adapter / "README.md").write_text("mine")
    call_here("grath.push", adapter, NAME)
    assert (adapter / "README.md").read_text() == "mine"


def test_cards_without_scores(tmp_path, uploads):
    """Of adapters without a run, and of one that was trained on TruthfulQA."""
    continued = made_adapter(tmp_path / "run_seed_0", incoming_adapter="me/old").rename(tmp_path / "continued")
    given = made_adapter(tmp_path / "run_seed_1", own_pairs=False).rename(tmp_path / "given")
    gold = made_adapter(tmp_path / "run_seed_2", settings={"dataset_name": "truthful_qa[:200]"})
    for adapter, said in {
        continued: "The training continued an earlier adapter.",
        given: "It was trained on the pairs of a given file.",
        gold: "It was trained on pairs of truthful_qa[:200], not on pairs of its own.",
    }.items():
        call_here("grath.push", adapter, NAME)
        page = card_of(adapter)[1]
        assert said in page and "## Scores" not in page


def test_a_merged_model_is_pushed_whole(tmp_path, uploads):
    merged = tmp_path / "merged"
    adapter = made_adapter(tmp_path / "run_seed_0", base_model=str(tmp_path / "base"))
    refused = call_here("grath.push", adapter, NAME, status=2)
    assert "python -m grath.export" in refused.stderr and not uploads
    merged.mkdir()
    for name in ("config.json", "model.safetensors", "other.bin"):
        (merged / name).write_text("{}")
    for content in (None, {"adapter_sha256": "0", "files": {}}):
        if content:
            (merged / "grath_merge.json").write_text(json.dumps(content))
        assert " merged: write it with" in call_here("grath.push", adapter, NAME, "--merged", merged, status=2).stderr
    merge = {"adapter_sha256": sha256(adapter / "adapter_model.safetensors"), "files": {"model.safetensors": "0"}}
    (merged / "grath_merge.json").write_text(json.dumps(merge))
    refused = call_here("grath.push", adapter, NAME, "--merged", merged, status=2)
    assert "model.safetensors is not the file that was written: merge the adapter again" in refused.stderr
    merge["files"]["model.safetensors"] = sha256(merged / "model.safetensors")
    (merged / "grath_merge.json").write_text(json.dumps(merge))
    (merged / "README.md").write_bytes(b"generated_from_trainer \xff")
    call_here("grath.push", adapter, NAME, "--merged", merged)
    assert uploads == [(NAME, False, ["README.md", "config.json", "model.safetensors"])]
    metadata, page = card_of(merged)
    assert metadata["library_name"] == "transformers" and "base_model" not in metadata
    assert "A fine-tuned model of base, " in page and str(tmp_path) not in page


def test_what_cannot_be_pushed_is_one_line(tmp_path):
    """The hub's own client is offline in all tests."""
    adapter = made_adapter(tmp_path / "run_seed_0")
    done = call_here("grath.push", adapter, NAME, status=2)
    assert f"cannot push to {NAME}: " in done.stderr and len(done.stderr.splitlines()) == 1
    (adapter / "adapter_config.json").write_text('{"edited": 1}')
    assert "is not the file that was written" in call_here("grath.push", adapter, NAME, status=2).stderr
    assert "no finished training" in call_here("grath.push", tmp_path, NAME, status=2).stderr
