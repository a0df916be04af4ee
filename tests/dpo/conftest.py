"""Fixtures of the DPO tests."""

import pytest
from training import train


@pytest.fixture(scope="session")
def first_iteration(tiny_llama, pair_file, tmp_path_factory):
    """The first iteration on `tiny_llama`, rolling: (folder, the finished process, the record). Read-only."""
    output = tmp_path_factory.mktemp("iteration1") / "model"
    return output, *train(tiny_llama, output, source=("--dataset_path", pair_file))
