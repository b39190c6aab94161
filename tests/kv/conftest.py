"""Fixtures of the tests of the KV store."""

import pytest

from tests.kv.disk_helper import NUM_SLOTS, open_store, write


@pytest.fixture
def filled(tmp_path):
    """A folder whose slot i holds block i."""
    store = open_store(tmp_path)
    for slot in range(NUM_SLOTS):
        write(store, slot, slot)
    store.close()
    return tmp_path
