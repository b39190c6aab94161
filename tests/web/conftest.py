"""A real Chromium, headless, in front of a real server.

`make browser` finds or installs one; where there is none these tests are skipped and say so.
The console's Content-Security-Policy forbids eval, so nothing here waits with a string of JavaScript.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.serving.scripted_model import write_checkpoint
from tests.serving.server_process import ServerProcess
from tests.web.browser import Tab, launched
from tests.web.scripts import SCRIPTS, TEMPLATE
from tools.get_browser import find_chromium

CHROMIUM = find_chromium()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CHROMIUM is None:
        mark = pytest.mark.skip(reason="no Chromium on this machine: `make browser` installs one")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(mark)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None
    with launched(CHROMIUM) as opened:
        yield opened


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with ServerProcess(log, "--max-model-len", "2048") as running:  # room for an answer that takes seconds
        yield running
        running.wait_idle()


@pytest.fixture(scope="package")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose model says what `tests/web/scripts.py` wants, when it is asked by `go(name)`."""
    folder = write_checkpoint(tmp_path_factory.mktemp("scripted"), SCRIPTS, TEMPLATE)
    with ServerProcess(folder / "log.txt", "--model", str(folder), "--served-model-name", "scripted",
                       "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3") as running:
        yield running
        running.wait_idle()


@pytest.fixture
def open_tab(browser: Browser, server: ServerProcess) -> Iterator[Tab]:
    """`open_tab(path, **context options)` gives a page; after the test all of them must have been well-behaved."""
    opener = Tab(browser, server.url)
    yield opener
    opener.close()


@pytest.fixture
def keyed_server(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path / "log.txt", "--api-key", "open sesame", key="open sesame") as running:
        yield running
