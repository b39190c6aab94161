from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serving.recorded_tools import SCRIPTS, TEMPLATE
from tests.serving.scripted_model import write_checkpoint
from tests.serving.server_process import ServerProcess


@pytest.fixture(scope="session")
def showing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose chat template shows all that a chat can hold: tools, calls and results."""
    folder = write_checkpoint(tmp_path_factory.mktemp("showing"), SCRIPTS, TEMPLATE)
    with ServerProcess(folder / "log.txt", str(folder), "--served-model-name", "showing") as running:
        yield running
        running.wait_idle()
