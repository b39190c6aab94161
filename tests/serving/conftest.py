from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.serving.server_process import ServerProcess


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for all tests that leave it as they found it."""
    with ServerProcess(tmp_path_factory.mktemp("server") / "log.txt") as running:
        yield running
        running.wait_idle()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with server.client() as opened:
        yield opened
