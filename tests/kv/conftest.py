"""Fixtures of the tests of the KV store."""

import pytest

from tests.kv.disk_helper import NUM_SLOTS, open_store, write
from tests.kv.held_view import OPENED


@pytest.fixture(autouse=True)
def close_shared_stores():
    """Their threads end with the test."""
    yield
    while OPENED:
        OPENED.pop().close()


@pytest.fixture
def filled(tmp_path):
    """A folder whose slot i holds block i."""
    store = open_store(tmp_path)
    for slot in range(NUM_SLOTS):
        write(store, slot, slot)
    store.close()
    return tmp_path
