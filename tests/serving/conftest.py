from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.serving.server_process import ServerProcess


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with server.client() as opened:
        yield opened
