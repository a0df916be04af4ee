"""Servers of the tiny model."""

import pytest
from stand_in.inference_server import InferenceServer
from support import RESPONSE

from grath.serving import client, completions


@pytest.fixture
def serve(tiny_llama):
    """A function that starts a server of the tiny model; every server ends with the test."""
    servers = []

    def start(**options):
        server = InferenceServer(**{"model": tiny_llama, "answer": lambda ids: RESPONSE, **options})
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
