"""The distance between correct and incorrect answers."""

import json

import numpy
import pytest
import torch
from made_runs import put_pairs
from support import call_here

from grath.distance import distance, probe
from grath.modeling.chat import answer_ids, template_for
from grath.modeling.loading import load_model, load_tokenizer


def test_distance_and_probe_of_synthetic_clusters():
    draw = numpy.random.default_rng(0)
    here, there = draw.normal(size=(200, 5)), draw.normal(size=(200, 5))
    assert distance(here, here) == 0 and distance(here, there) < 0.15 and 0.4 < probe(here, there) < 0.6
    there[:, 0] += 20
    # The standard deviation is 1 in each of five directions; the means are 20 apart.
    assert distance(here, there) == pytest.approx(20 / 5**0.5, rel=0.1) and probe(here, there) > 0.99


def test_distance_of_a_pair_file_in_file_and_report(tiny_llama, tmp_path):
    file = put_pairs(tmp_path, 0, [("r", "a", "b"), ("s", "a", "b")])
    command = ("grath.distance", file, "--model_name_or_path", tiny_llama)
    assert f"{file} has 2 pairs of different answers: at least 5 are needed" in call_here(*command, status=2).stderr
    rows = [(f"Is it {i}?", f"Yes, it is {i} indeed.", "No.") for i in range(7)]
    put_pairs(tmp_path, 0, [*rows, ("q", "same", "same")])
    done = call_here(*command, "--precision", "fp32", "--batch_size", "3")
    found = json.loads(file.with_suffix(".distance.json").read_text(encoding="utf-8"))
    assert found["precision"] == "fp32" and found["pairs"] == 7 and f"distance {found['distance']:.3f}" in done.stdout

    tokenizer, model = load_tokenizer(tiny_llama), load_model(tiny_llama, "fp32")
    template = template_for(tokenizer, "auto")

    def mean_hidden_state(question, answer):
        prompt, ids = answer_ids(tokenizer, [{"role": "user", "content": question}], answer, template)
        hidden = model(torch.tensor([[*prompt, *ids]]), output_hidden_states=True).hidden_states[-1]
        return hidden[0, len(prompt) :].mean(0).detach()

    sides = [torch.stack([mean_hidden_state(row[0], row[side]) for row in rows]).numpy() for side in (1, 2)]
    assert found["distance"] == pytest.approx(distance(*sides), rel=1e-4)
    call_here("grath.report", tmp_path)
    assert f"{found['distance']:.3f}" in (tmp_path / "report.md").read_text(encoding="utf-8")
