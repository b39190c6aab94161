"""Windows with several doors, and what is refused before anything is sent."""

from __future__ import annotations

import pytest

from tests.transfer.receiving import KEY, LEASE_S, SIZE, take
from tests.transfer.senders import LocalSender, pattern
from xllm.errors import ConfigError, TransferError
from xllm.transfer.put_wire import MAX_PIECES
from xllm.transfer.transport import Arrived, Ended
from xllm.transfer.transports import connect, open_window


def test_one_memory_with_several_doors(child):
    window = open_window(["tcp", "memory", "shm"], SIZE)
    assert [address.partition("://")[0] for address in window.addresses] == ["memory", "shm", "tcp"]
    for number, address in enumerate(window.addresses):
        window.grant(number, KEY, [(number * 100, 100)], LEASE_S)
        sender = child if number else LocalSender()
        sender.connect("a", [address])
        sender.put("a", number, KEY.hex(), [(number * 100, 100, number)], "x")
        assert take(window, 1) == [Arrived(number, b"x", 100)]
        assert window.memory[number * 100 :][:100] == pattern(number, 100)
        sender.stop()
        assert take(window, 1) == [Ended(number, "its sender left")]
    peer = connect(window.addresses)
    assert type(peer).__name__ == "InProcessPeer"
    peer.close()
    window.close()


def test_the_next_way_is_taken_where_the_best_is_not_there(child):
    window = open_window(["shm", "tcp"], SIZE)
    elsewhere = "shm://another-machine/0/" + "00" * 16
    window.grant(1, KEY, [(0, 100)], LEASE_S)
    child.connect("a", [elsewhere, window.addresses[1]])
    child.put("a", 1, KEY.hex(), [(0, 10, 1)], "x")
    assert take(window, 1) == [Arrived(1, b"x", 10)]
    child.stop()
    window.close()


@pytest.mark.parametrize(("names", "said"), [([], "got none"), (["shm", "mail"], "got shm, mail")])
def test_transports_that_there_are_not(names, said):
    with pytest.raises(ConfigError, match=said):
        open_window(names, SIZE)


@pytest.mark.parametrize(("arguments", "said"), [
    ((1, b"short", [(0, 1)], 1.0), "at least 16 bytes, got 5"), ((1, KEY, [(SIZE, 1)], 1.0), f"1 bytes at {SIZE}"),
    ((1, KEY, [(-1, 1)], 1.0), "1 bytes at -1"), ((1, KEY, [(5, -1)], 1.0), "-1 bytes at 5"),
    ((9, KEY, [(0, 1)], 1.0), "grant 9 is in use"), ((-1, KEY, [(0, 1)], 1.0), "grant -1 is in use, over or negative"),
])
def test_grants_that_are_wrong(window, arguments, said):
    window.grant(9, KEY, [(0, 1)], LEASE_S)
    with pytest.raises(ValueError, match=said):
        window.grant(*arguments)


def test_what_no_put_may_have(window, sender):
    window.grant(1, KEY, [(0, 1)], LEASE_S)
    sender.connect("a", window.addresses)
    with pytest.raises(TransferError, match="a put has 65536 pieces"):
        sender.put("a", 1, KEY.hex(), [(0, 0, 0)] * (MAX_PIECES + 1), "")
    with pytest.raises(TransferError, match="a note of 65536 bytes"):
        sender.put("a", 1, KEY.hex(), [], "x" * 65_537)
