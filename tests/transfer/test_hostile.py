"""A TCP window goes on, whatever strangers and broken senders send."""

from __future__ import annotations

import socket

import msgspec
import pytest
import zmq

from tests.transfer.receiving import KEY, LEASE_S, SIZE, take
from tests.transfer.senders import LocalSender, pattern
from xllm.transfer.put_wire import Enter, Entered, Introduce, Introduced, Put, Rejected, decode, encode
from xllm.transfer.tcp import SESSION_BYTES
from xllm.transfer.transport import Arrived, Ended
from xllm.transfer.transports import open_window


class RawSender:
    """Speaks the wire without the checks of `TcpPeer`."""

    def __init__(self, address: str):
        *_, control, bulk, _, incarnation = address.replace(":", "/").split("/")
        self.context = zmq.Context()
        self.control = self.context.socket(zmq.DEALER)
        self.control.connect(f"tcp://127.0.0.1:{control}")
        self.bulk = socket.create_connection(("127.0.0.1", int(bulk)))
        self.incarnation = bytes.fromhex(incarnation)

    def ask(self, data: bytes):
        self.control.send(data)
        assert self.control.poll(10_000)
        return decode(self.control.recv())

    def enter(self, number: int) -> bytes:
        answer = self.ask(encode(Introduce(self.incarnation, 1)))
        assert isinstance(answer, Introduced)
        self.bulk.sendall(answer.session)
        assert isinstance(self.ask(encode(Enter(number, KEY, 1.0, answer.session))), Entered)
        return answer.session

    def close(self) -> None:
        self.bulk.close()
        self.context.destroy(linger=0)


@pytest.fixture
def window():
    opened = open_window(["tcp"], SIZE)
    opened.grant(1, KEY, [(0, 100)], LEASE_S)
    opened.grant(2, KEY, [(200, 100)], LEASE_S)
    yield opened
    sender = LocalSender()  # it still serves
    sender.connect("good", opened.addresses)
    sender.put("good", 2, KEY.hex(), [(200, 100, 1)], "good")
    assert take(opened, 1) == [Arrived(2, b"good", 100)]
    assert opened.memory[200:300] == pattern(1, 100)
    assert not any(opened.memory[:200]) and not any(opened.memory[300:])
    sender.stop()
    opened.close()


@pytest.fixture
def raw(window):
    sender = RawSender(window.addresses[0])
    yield sender
    sender.close()


@pytest.mark.parametrize("data", [
    b"", b"\xff" * 100, msgspec.msgpack.encode({"type": "Nothing"}), encode(Put(1, b"", 0)),
    encode(Enter(1, KEY, float("nan"), b"guess")), encode(Introduce(b"another", 1)), encode(Introduced(b"")),
], ids=["empty", "no msgpack", "no type", "no session", "a guessed session", "another incarnation", "an answer"])
def test_messages_of_strangers(window, raw, data):
    assert isinstance(raw.ask(data), Rejected)
    raw.bulk.sendall(b"x" * SESSION_BYTES)  # no session's
    raw.bulk.settimeout(10)
    assert raw.bulk.recv(1) == b""


@pytest.mark.parametrize("pieces", [
    [(100, 1)], [(0, 101)], [(SIZE, 1)], [(-1, 1)], [(0, -1)], [(2**63, 1)], [(2**61, 2**61)],
], ids=str)
def test_puts_that_are_not_allowed(window, raw, pieces):
    """The sender is thrown out, and its grants end."""
    session = raw.enter(1)
    put = Put(1, b"x", sum(length for _, length in pieces), pieces, None, session)
    assert isinstance(raw.ask(encode(put)), Rejected)
    raw.close()
    assert [type(event) for event in take(window, 1)] == [Ended]


def test_a_sum_that_is_wrong(window, raw):
    session = raw.enter(1)
    assert isinstance(raw.ask(encode(Put(1, b"x", 5, [(0, 4)], None, session))), Rejected)
    [ended] = take(window, 1)
    assert ended == Ended(1, "its sender announced pieces that do not add up")


def test_a_wait_that_is_no_number_ends(window, raw):
    session = raw.enter(1)
    raw.control.send(encode(Enter(99, KEY, float("nan"), session)))
    assert isinstance(raw.ask(encode(Enter(98, KEY, 0.0, session))), Rejected)
    raw.close()
    assert take(window, 1) == [Ended(1, "its sender is gone")]
