from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serving.server_process import ServerProcess


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("server") / "log.txt") as running:
        yield running
        running.wait_idle()
