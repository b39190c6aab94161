"""For all tests: no test fails because the machine is busy, and one server for those that leave it as it was."""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.serving.server_process import ServerProcess

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Modules and tests stay until the end, which Python need not find out anew whenever it looks for garbage: among
    all of them that takes half a second."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server without any flag for all tests that leave it as they found it."""
    from tests.serving.server_process import ServerProcess

    with ServerProcess(tmp_path_factory.mktemp("server") / "log.txt") as running:
        yield running
        running.wait_idle()
