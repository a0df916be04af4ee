"""Servers of the tiny model."""

import pytest
from stand_in.inference_server import InferenceServer
from support import CORRECT, INCORRECT

from grath.serving import client, completions


def own_answer(server):
    """An answer for every question: a response that belongs to another prompt is another one."""

    def answer(ids):
        question = server.tokenizer.decode(ids).split("Question: ")[-1].split(" [/INST]")[0]
        return f"Question: {question}\nCorrect answer: {CORRECT} {question}\nIncorrect answer: {INCORRECT}"

    return answer


@pytest.fixture
def serve(tiny_llama):
    """A function that starts a server of the tiny model; every server ends with the test."""
    servers = []

    def start(**options):
        server = InferenceServer(**{"model": tiny_llama, **options})
        server.answer = server.answer or own_answer(server)
        servers.append(server.__enter__())
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def quick(monkeypatch):
    """Requests that fail are sent again at once."""
    monkeypatch.setattr(completions, "FIRST_WAIT", 0.005)
    monkeypatch.setattr(client, "FIRST_WAIT", 0.005)
