"""Trainings that several tests read. No test changes their folders."""

import pytest
from support import pair, write_rows
from trainings import train


@pytest.fixture(scope="session")
def first_iteration(tiny_llama, pair_file, tmp_path_factory):
    """The first iteration on `tiny_llama`, rolling: (folder, the finished process, the record).

    It starts in a folder with what an early kill leaves, and has a checkpoint of each of its three steps.
    """
    output = tmp_path_factory.mktemp("iteration1") / "model"
    output.mkdir()
    (output / ".grath.json.x.tmp").write_text("{")
    (output / "README.md").write_text("a model card")
    return output, *train(tiny_llama, output, "--save_steps", "1", source=pair_file)


@pytest.fixture(scope="session")
def seventeen(tiny_llama, tmp_path_factory):
    """A training of twelve steps on 17 pairs, an epoch of which ends in a step: (its flags, folder, record)."""
    folder = tmp_path_factory.mktemp("seventeen")
    pairs = [
        pair(f"What is {i}?" + " Say it." * (i % 7), f"It is {i}.", "Nobody knows." * (1 + i % 3)) for i in range(17)
    ]
    source = ("--dataset_path", write_rows(folder / "pairs.json", pairs), "--max_steps", "12", "--save_steps", "2")
    return source, folder / "whole", train(tiny_llama, folder / "whole", source=source)[1]
