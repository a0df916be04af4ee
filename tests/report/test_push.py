"""`grath.push`: what is uploaded, and what the model card says, against a stand-in for the hub's client."""

from unittest import mock

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError
from made_runs import put_pairs, put_record, put_run
from support import call_here

NAME = "someone/truthful"


@pytest.fixture
def uploads(monkeypatch):
    """What was uploaded: a list of (repository, private, folder, patterns)."""
    found = []

    class Api:
        def __init__(self, **options):
            self.private = None

        def create_repo(self, name, private, exist_ok):
            assert exist_ok
            if name == "nobody/x":
                raise HfHubHTTPError("401 Client Error: log in\nmore", response=mock.MagicMock())
            self.private = private
            return f"https://hub/{name}"

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            found.append((repo_id, self.private, folder_path, allow_patterns))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return found


def made_adapter(run, **record):
    """A run of an adapter on a base of the hub, with scores of M_0 and M_1."""
    put_run(run, {0: [0.0, 1.0, 0.0, 0.0], 1: [1.0, 1.0, 0.0, 0.0]})
    put_pairs(
        run,
        0,
        [("q", "a", "b")],
        data_name="allenai/ai2_arc",
        subdata_name="ARC-Challenge",
        split="train",
        data_path=None,
    )
    (adapter,) = run.glob("models/iter_1_*")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (adapter / name).write_text("{}")
    files = [adapter / "adapter_model.safetensors", adapter / "adapter_config.json"]
    content = {"base_model": "meta-llama/Llama-2-7b-chat-hf", "incoming_adapter": None, "pairs": {"read": 1, "kept": 1}}
    settings = {"max_steps": 7, "beta": 0.1, "output_dir": str(run), "dataset_name": None}
    put_record(adapter / "grath.json", files, settings=settings, **content | record)
    return adapter


def test_an_adapter_is_pushed_with_a_card_of_its_run(tmp_path, uploads):
    adapter = made_adapter(tmp_path / "run_seed_0")
    done = call_here("grath.push", adapter, NAME, "--private")
    assert f"Pushed {adapter} to https://hub/{NAME}" in done.stdout
    ((name, private, folder, patterns),) = uploads
    assert (name, private, folder) == (NAME, True, adapter)
    assert "README.md" in patterns and "grath.json" not in patterns
    text = (adapter / "README.md").read_text()
    _, metadata, page = text.split("---\n", 2)
    metadata = yaml.safe_load(metadata)
    assert metadata["base_model"] == "meta-llama/Llama-2-7b-chat-hf" and metadata["library_name"] == "peft"
    assert metadata["base_model_relation"] == "adapter" and metadata["datasets"] == ["allenai/ai2_arc"]
    metrics = metadata["model-index"][0]["results"][0]
    assert metrics["metrics"][0]["value"] == 50.0 and metrics["dataset"]["type"] == "truthfulqa/truthful_qa"
    assert "| M_1        | 50.00 (+25.00 [" in page and "lm-evaluation-harness 0.4.13" in page
    assert "| dpo max_steps " in page and "Commit: abc1234" in page and str(tmp_path) not in text


def test_an_adapter_without_a_run_has_a_card_without_scores(tmp_path, uploads):
    adapter = made_adapter(tmp_path / "run_seed_0")
    alone = adapter.rename(tmp_path / "adapter")
    call_here("grath.push", alone, NAME)
    page = (alone / "README.md").read_text()
    assert len(uploads) == 1 and "## Scores" not in page and "| dpo max_steps " in page and "7" in page


def test_a_merged_model_is_pushed_whole(tmp_path, uploads):
    base, merged = tmp_path / "base", tmp_path / "merged"
    base.mkdir()
    adapter = made_adapter(tmp_path / "run_seed_0", base_model=str(base))
    refused = call_here("grath.push", adapter, NAME, status=2)
    assert "python -m grath.export" in refused.stderr and not (adapter / "README.md").exists()
    assert "is no model folder" in call_here("grath.push", adapter, NAME, "--merged", merged, status=2).stderr
    merged.mkdir()
    (merged / "config.json").write_text("{}")
    call_here("grath.push", adapter, NAME, "--merged", merged)
    assert uploads == [(NAME, False, merged, None)]
    text = (merged / "README.md").read_text()
    assert "library_name: transformers" in text and "\nbase_model:" not in text and str(tmp_path) not in text


def test_what_cannot_be_pushed_is_one_line(tmp_path, uploads):
    adapter = made_adapter(tmp_path / "run_seed_0")
    done = call_here("grath.push", adapter, "nobody/x", status=2)
    assert "cannot push to nobody/x: 401 Client Error: log in" in done.stderr and len(done.stderr.splitlines()) == 1
    (adapter / "adapter_config.json").write_text('{"edited": 1}')
    assert "is not the file that was written" in call_here("grath.push", adapter, NAME, status=2).stderr
    assert "no finished training" in call_here("grath.push", tmp_path, NAME, status=2).stderr
    assert not uploads
