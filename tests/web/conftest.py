"""A real Chromium, headless, in front of a real server.

The browser is the machine's own (`make browser` installs one); where there is none these tests are skipped and say so.
The console's Content-Security-Policy forbids eval, so nothing here waits with a string of JavaScript.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.scripted_model import write_checkpoint
from tests.serving.server_process import ServerProcess
from tests.web.browser import Tab
from tests.web.scripts import SCRIPTS, TEMPLATE

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CHROMIUM is None:
        mark = pytest.mark.skip(reason="no Chromium on this machine: `make browser` installs one")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(mark)


@pytest.fixture(scope="session")
def browser() -> Iterator[playwright_api.Browser]:
    with playwright_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with ServerProcess(log, "--max-model-len", "2048") as running:  # room for an answer that takes seconds
        yield running
        running.wait_idle()


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose model says what `tests/web/scripts.py` wants, when it is asked by `go(name)`."""
    folder = write_checkpoint(tmp_path_factory.mktemp("scripted"), SCRIPTS, TEMPLATE)
    with ServerProcess(folder / "log.txt", "--model", str(folder), "--served-model-name", "scripted",
                       "--max-model-len", "4096", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3") as running:
        yield running
        running.wait_idle()


@pytest.fixture
def open_tab(browser: playwright_api.Browser, server: ServerProcess) -> Iterator[Tab]:
    """`open_tab(path, **context options)` gives a page; after the test all of them must have been well-behaved."""
    opener = Tab(browser, server.url)
    yield opener
    opener.close()


@pytest.fixture
def keyed_server(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path / "log.txt", "--api-key", "open sesame", key="open sesame") as running:
        yield running
