"""`grath.export`: merge an adapter into its base."""

import json

import pytest
import torch
from filelock import FileLock
from peft import PeftModel
from support import call_here
from transformers import AutoModelForCausalLM, AutoTokenizer

from grath.common.files import sha256
from grath.modeling.loading import load_model


def test_export_writes_an_ordinary_model(first_iteration, tmp_path):
    out = tmp_path / "merged model"
    done = call_here("grath.export", first_iteration[0], out, "--precision", "fp32")
    assert done.stdout.splitlines()[-1].startswith(f"Wrote {out}")
    merge = json.loads((out / "grath_merge.json").read_text())
    assert merge == {
        "adapter_sha256": sha256(first_iteration[0] / "adapter_model.safetensors"),
        "precision": "fp32",
        "files": {"model.safetensors": sha256(out / "model.safetensors")},
    }
    ids = AutoTokenizer.from_pretrained(out)("Is ice cold?", return_tensors="pt").input_ids
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(out)(ids).logits
        adapted = load_model(first_iteration[0], "fp32").eval()(ids).logits
        base = load_model(first_iteration[2]["base_model"], "fp32").eval()(ids).logits
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
    assert (merged - base).abs().max() > 1e-2
    assert "exists already" in call_here("grath.export", first_iteration[0], out, status=2).stderr
    assert "is not a LoRA adapter folder" in call_here("grath.export", out, tmp_path / "n", status=2).stderr


def test_an_export_has_one_writer_and_leaves_nothing_of_a_killed_one(first_iteration, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "weights").touch()
    with FileLock(tmp_path / ".out.lock"):
        done = call_here("grath.export", first_iteration[0], tmp_path / "out", status=2)
    assert f"another process is writing {tmp_path / 'out'}" in done.stderr
    call_here("grath.export", first_iteration[0], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not (tmp_path / "out" / "weights").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_export_detects_a_wrong_merge(first_iteration, tmp_path, monkeypatch, precision):
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    done = call_here("grath.export", first_iteration[0], tmp_path / "out", "--precision", precision, status=2)
    assert "nothing was saved" in done.stderr and not list(tmp_path.iterdir())
