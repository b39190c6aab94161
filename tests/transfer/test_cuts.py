"""Connections that are cut while a sender uses them, as the chaos run cuts them."""

from __future__ import annotations

import pytest

from tests.cluster.chaos.transfer_cut import cut_transfers
from tests.transfer.receiving import KEY, LEASE_S, take
from xllm.errors import TransferError
from xllm.transfer.transport import Arrived, Ended


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_what_was_begun_ends_and_another_connection_works(window, mortal):
    for number in (7, 8):
        window.grant(number, KEY, [(0, 1024)], LEASE_S)
    mortal.connect("a", window.addresses)
    mortal.put("a", 7, KEY.hex(), [(0, 10, 1)], "first")
    assert take(window, 1) == [Arrived(7, b"first", 10)]
    assert cut_transfers(mortal.child.pid) >= 1
    assert take(window, 1) == [Ended(7, "its sender is gone")]
    with pytest.raises(TransferError):
        mortal.finish("a", 7)
    mortal.connect("b", window.addresses)
    mortal.put("b", 8, KEY.hex(), [(0, 10, 2)], "other")
    assert take(window, 1) == [Arrived(8, b"other", 10)]
