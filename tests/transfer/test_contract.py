"""What every transport promises (`xllm/transfer/transport.py`), with senders in processes of their own."""

from __future__ import annotations

import os
import threading

import pytest

from tests.transfer.receiving import KEY, LEASE_S, SIZE, put_until_refused, take
from tests.transfer.senders import LocalSender, pattern
from xllm.errors import TransferError
from xllm.kv import failpoints
from xllm.transfer.transport import Arrived, Ended
from xllm.transfer.transports import open_window


def test_a_put_lands_and_its_note_comes_after_the_bytes(window, sender):
    window.grant(7, KEY, [(100, 5000)], LEASE_S)
    sender.connect("a", window.addresses)
    sender.put("a", 7, KEY.hex(), [(100, 3000, 1), (4000, 1100, 2)], "layer 0")
    assert take(window, 1) == [Arrived(7, b"layer 0", 4100)]
    assert window.memory[100:3100] == pattern(1, 3000)
    assert window.memory[4000:5100] == pattern(2, 1100)
    assert not any(window.memory[:100]) and not any(window.memory[3100:4000]) and not any(window.memory[5100:])
    sender.finish("a", 7)
    assert take(window, 1) == [Ended(7, "")]


def test_many_pieces_and_many_puts_in_order(window, sender):
    window.grant(1, KEY, [(start, 512) for start in range(0, SIZE, 1024)], LEASE_S)
    sender.connect("a", window.addresses)
    for half in range(2):
        sender.put("a", 1, KEY.hex(), [(start + 256 * half, 256, start % 251) for start in range(0, SIZE, 1024)],
                   f"half {half}")
    sender.put("a", 1, KEY.hex(), [], "only a note")
    sender.put("a", 1, KEY.hex(), [(0, 0, 0)], "")
    sender.finish("a", 1)
    quarter = SIZE // 4
    assert take(window, 5) == [Arrived(1, b"half 0", quarter), Arrived(1, b"half 1", quarter),
                               Arrived(1, b"only a note", 0), Arrived(1, b"", 0), Ended(1, "")]
    for start in range(0, SIZE, 1024):
        assert window.memory[start : start + 1024] == pattern(start % 251, 256) * 2 + bytes(512)


def test_a_big_put(transport, sender):
    window = open_window([transport], 32 << 20)
    window.grant(1, KEY, [(0, 32 << 20)], LEASE_S)
    sender.connect("a", window.addresses)
    sender.put("a", 1, KEY.hex(), [(0, 16 << 20, 3), (16 << 20, 16 << 20, 4)], "all")
    assert take(window, 1) == [Arrived(1, b"all", 32 << 20)]
    assert window.memory[: 16 << 20] == pattern(3, 16 << 20)
    assert window.memory[16 << 20 :] == pattern(4, 16 << 20)
    window.close()


@pytest.mark.parametrize(("pieces", "outside"), [
    ([(99, 10, 1)], "10 bytes at 99"), ([(190, 11, 1)], "11 bytes at 190"), ([(250, 1, 1)], "1 bytes at 250"),
    ([(100, 10, 1), (SIZE, 1, 1)], f"1 bytes at {SIZE}"), ([(-1, 2, 1)], "2 bytes at -1"),
])
def test_bytes_outside_the_grant_are_not_written(window, sender, pieces, outside):
    window.grant(7, KEY, [(100, 100), (300, 100)], LEASE_S)
    sender.connect("a", window.addresses)
    with pytest.raises(TransferError, match=f"grant 7 does not allow {outside}"):
        sender.put("a", 7, KEY.hex(), pieces, "x")
    sender.put("a", 7, KEY.hex(), [(300, 100, 1)], "within")
    assert take(window, 1) == [Arrived(7, b"within", 100)]
    assert not any(window.memory[:300])


def test_another_key(window, sender):
    window.grant(7, KEY, [(0, 100)], LEASE_S)
    sender.connect("a", window.addresses)
    for _ in range(2):
        with pytest.raises(TransferError, match="grant 7 has another key"):
            sender.put("a", 7, bytes(32).hex(), [(0, 10, 1)], "x")
    sender.put("a", 7, KEY.hex(), [(0, 10, 1)], "good")
    with pytest.raises(TransferError, match="grant 7 has another key"):
        sender.put("a", 7, bytes(32).hex(), [(0, 10, 9)], "x")
    assert take(window, 1) == [Arrived(7, b"good", 10)]
    assert window.memory[:10] == pattern(1, 10)


def test_another_incarnation(window, sender):
    stale = window.addresses[0][:-4] + ("beef" if not window.addresses[0].endswith("beef") else "cafe")
    with pytest.raises(TransferError, match="no way to the window"):
        sender.connect("a", [stale], timeout_s=2.0)
    with pytest.raises(TransferError, match="no transport of that name"):
        sender.connect("a", ["pigeon://x"])
    with pytest.raises(TransferError, match="it has no address"):
        sender.connect("a", [])


def test_a_grant_that_is_not_known_is_waited_for_a_bounded_time(window, sender):
    sender.connect("a", window.addresses, timeout_s=0.1)
    with pytest.raises(TransferError, match="grant 7 is not known at the window"):
        sender.put("a", 7, KEY.hex(), [(0, 10, 1)], "x")


def test_a_sender_that_is_faster_than_the_grant(window, transport, child):
    late = threading.Timer(0.05, lambda: window.grant(7, KEY, [(0, 100)], LEASE_S))
    sender = LocalSender() if transport == "memory" else child
    sender.connect("a", window.addresses)
    late.start()
    sender.put("a", 7, KEY.hex(), [(0, 10, 1)], "x")
    late.join()
    assert take(window, 1) == [Arrived(7, b"x", 10)]
    sender.stop()


def test_a_lease_that_is_over(window, sender):
    sender.connect("a", window.addresses)
    window.grant(7, KEY, [(0, 100)], 0.3)
    window.grant(8, KEY, [(0, 100)], 0.0)
    assert take(window, 1) == [Ended(8, "its lease is over")]
    sender.put("a", 7, KEY.hex(), [(0, 10, 1)], "x")
    assert take(window, 2) == [Arrived(7, b"x", 10), Ended(7, "its lease is over")]
    for number in (7, 8):
        with pytest.raises(TransferError, match=f"grant {number} is over"):
            put_until_refused(sender, number)
    assert window.memory[:10] == pattern(1, 10)
    assert window.take(0) == []


@pytest.mark.parametrize("point", ["transfer.put_begun", "transfer.put_half"])
def test_a_revoked_grant_ends_when_nothing_is_written_any_more(window, sender, point):
    window.grant(7, KEY, [(0, SIZE)], LEASE_S)
    sender.connect("a", window.addresses)
    sender.put("a", 7, KEY.hex(), [(0, 10, 1)], "first")
    sender.hold(point)
    sender.begin_put("a", 7, KEY.hex(), [(start, 1024, 5) for start in range(0, SIZE, 1024)], "never")
    assert take(window, 1) == [Arrived(7, b"first", 10)]
    window.revoke(7)
    early = window.take(0.05)
    if early:  # where the window writes itself, it need not wait for the sender
        after = bytes(window.memory)
    sender.go_on(point)
    if not early:
        assert take(window, 1) == [Ended(7, "it was revoked")]
        after = bytes(window.memory)
    with pytest.raises(TransferError, match="grant 7 is over"):
        put_until_refused(sender, 7)
    assert bytes(window.memory) == after
    assert window.take(0) == []
    window.revoke(7)
    window.revoke(99)
    window.grant(8, KEY, [(0, SIZE)], LEASE_S)  # the way is as good as before
    sender.put("a", 8, KEY.hex(), [(0, 10, 2)], "next")
    assert take(window, 1) == [Arrived(8, b"next", 10)]


def test_a_sender_that_leaves_with_grants_open(window, sender):
    window.grant(7, KEY, [(0, 100)], LEASE_S)
    sender.connect("a", window.addresses)
    sender.put("a", 7, KEY.hex(), [(0, 10, 1)], "x")
    sender.close("a")
    assert take(window, 2) == [Arrived(7, b"x", 10), Ended(7, "its sender left")]


def test_a_window_that_is_closed(window, sender):
    window.grant(7, KEY, [(0, 100)], LEASE_S)
    sender.connect("a", window.addresses, timeout_s=1.0)
    sender.put("a", 7, KEY.hex(), [(0, 10, 1)], "x")
    assert take(window, 1) == [Arrived(7, b"x", 10)]
    memory = window.memory
    window.close()
    window.close()
    with pytest.raises(TransferError):
        sender.put("a", 7, KEY.hex(), [(0, 10, 1)], "x")
    with pytest.raises(TransferError):
        sender.finish("a", 7)
    with pytest.raises(TransferError):
        sender.connect("b", window.addresses, timeout_s=0.5)
    assert memory[:10] == pattern(1, 10)  # readable as long as somebody has it


def test_grants_beside_each_other(window, sender):
    half = SIZE // 2
    window.grant(1, KEY, [(0, half)], LEASE_S)
    window.grant(2, KEY[::-1], [(half, half)], LEASE_S)
    sender.connect("a", window.addresses)
    for part in range(4):
        sender.put("a", 1, KEY.hex(), [(part * half // 4, half // 4, part)], str(part))
        sender.put("a", 2, KEY[::-1].hex(), [(half + part * half // 4, half // 4, 100 + part)], str(part))
    sender.finish("a", 2)
    sender.finish("a", 1)
    found = take(window, 10)
    for number in (1, 2):
        assert [event for event in found if event.number == number] == [
            *(Arrived(number, str(part).encode(), half // 4) for part in range(4)), Ended(number, "")]
    for part in range(4):
        assert window.memory[part * half // 4 : (part + 1) * half // 4] == pattern(part, half // 4)
        assert window.memory[half + part * half // 4 :][: half // 4] == pattern(100 + part, half // 4)


def test_two_senders_of_one_grant(window, sender):
    """It is over when both have finished it, and broken when one is lost."""
    for number in (1, 2):
        window.grant(number, KEY, [(0, 200)], LEASE_S)
    for name in "ab":
        sender.connect(name, window.addresses, num_senders=2)
    sender.put("a", 1, KEY.hex(), [(0, 100, 1)], "a")
    sender.finish("a", 1)
    assert take(window, 1) == [Arrived(1, b"a", 100)]
    sender.put("b", 1, KEY.hex(), [(100, 100, 2)], "b")
    sender.finish("b", 1)
    assert take(window, 2) == [Arrived(1, b"b", 100), Ended(1, "")]
    assert window.memory[:200] == pattern(1, 100) + pattern(2, 100)
    for name in "ab":
        sender.put(name, 2, KEY.hex(), [(0, 10, 3)], name)
    assert len(take(window, 2)) == 2
    sender.close("a")
    assert take(window, 1) == [Ended(2, "its sender left")]
    with pytest.raises(TransferError, match="grant 2 is over"):
        sender.finish("b", 2)
    window.grant(3, KEY, [(0, 200)], LEASE_S)
    sender.connect("c", window.addresses)
    sender.put("b", 3, KEY.hex(), [(0, 10, 3)], "b")
    with pytest.raises(TransferError, match="grant 3 has 2 senders, and this one says 1"):
        sender.put("c", 3, KEY.hex(), [(0, 10, 3)], "c")


def test_what_was_not_begun_is_not_finished(window, sender):
    sender.connect("a", window.addresses)
    with pytest.raises(TransferError, match="nothing was put into grant 7 from here"):
        sender.finish("a", 7)


def test_many_ranges(transport, sender):
    """More than one message of shared memory takes."""
    window = open_window([transport], 20_000 * 16)
    window.grant(1, KEY, [(16 * i, 8) for i in range(20_000)], LEASE_S)
    sender.connect("a", window.addresses)
    sender.put("a", 1, KEY.hex(), [(16 * 19_999, 8, 3)], "last")
    assert take(window, 1) == [Arrived(1, b"last", 8)]
    with pytest.raises(TransferError, match="does not allow"):
        sender.put("a", 1, KEY.hex(), [(16 * 19_999 + 8, 8, 3)], "beside")
    window.close()


def test_nothing_is_left_open(transport, child):
    sender = LocalSender() if transport == "memory" else child
    before: list[list[int]] = []
    for _ in range(4):
        window = open_window([transport], SIZE)
        window.grant(1, KEY, [(0, SIZE)], LEASE_S)
        sender.connect("a", window.addresses)
        sender.put("a", 1, KEY.hex(), [(0, SIZE, 1)], "x")
        sender.finish("a", 1)
        sender.close("a")
        with pytest.raises(TransferError):
            sender.connect("b", [window.addresses[0][:-2]], timeout_s=0.2)
        window.close()
        del window
        mine = [len(os.listdir("/proc/self/fd")), threading.active_count(), num_mappings()]
        before.append(mine + sender.left_open())
    assert before[1:] == before[:1] * 3


def num_mappings() -> int:
    with open("/proc/self/maps") as maps:
        return sum("xllm-window" in line for line in maps)


def test_nothing_stays_armed():
    assert failpoints.armed is None
