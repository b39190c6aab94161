"""Windows, and senders in this process or another."""

from __future__ import annotations

import pytest

from tests.transfer.receiving import SIZE
from tests.transfer.senders import LocalSender, RemoteSender
from xllm.transfer.transports import NAMES, open_window


@pytest.fixture(params=NAMES)
def transport(request):
    return request.param


@pytest.fixture(scope="module")
def child():
    """One for all tests: a process takes longer to start than a test takes."""
    sender = RemoteSender()
    yield sender
    sender.end()


@pytest.fixture
def mortal():
    """A sender that a test kills."""
    sender = RemoteSender()
    yield sender
    sender.child.kill()
    sender.child.wait()
    sender.child.stdin.close()
    sender.child.stdout.close()


@pytest.fixture
def sender(transport, request):
    chosen = LocalSender() if transport == "memory" else request.getfixturevalue("child")
    yield chosen
    chosen.stop()


@pytest.fixture
def window(transport):
    opened = open_window([transport], SIZE)
    yield opened
    opened.close()
