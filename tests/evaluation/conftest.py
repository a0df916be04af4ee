import pytest
from support import call_here


@pytest.fixture(scope="session")
def scored_once(tiny_llama, made_once):
    """A folder of scores of three questions, with sample answers and logged questions. Never changed."""
    flags = ("--tasks", "grath_mc1", "grath_mc2", "--limit", 3, "--samples", "--log_samples")
    return made_once("scores", lambda folder: call_here("grath.evaluation", tiny_llama, folder, *flags))
