"""Which connection goes when there are too many, and logs that strangers cannot fill."""

from __future__ import annotations

import logging
from collections import Counter

from serving.api.connections import FULL, KEPT_PLACES, Connections
from serving.config import ConnectionSettings
from serving.observe.log_rate import OncePerSecond


class FakePeer:
    def __init__(self) -> None:
        self.ended: list[str] = []

    def end(self, reason: str) -> None:
        self.ended.append(reason)


def full(num_open: int) -> tuple[Connections, list[FakePeer]]:
    connections = Connections(ConnectionSettings(max_connections=num_open), Counter())
    peers = [FakePeer() for _ in range(num_open)]
    assert all(connections.enter(peer) for peer in peers)
    return connections, peers


def test_the_one_that_waited_longest_goes() -> None:
    connections, peers = full(3)
    connections.note_head(peers[0], False)  # it asks for something
    assert connections.enter(FakePeer())
    assert [peer.ended for peer in peers] == [[], [FULL], []]
    connections.note_head(peers[0], True)  # it waits again, and others have waited longer
    assert connections.enter(FakePeer())
    assert [peer.ended for peer in peers] == [[], [FULL], [FULL]]


def test_where_all_are_busy_a_few_places_are_kept() -> None:
    connections, peers = full(3)
    for peer in peers:
        connections.note_head(peer, False)
    kept = [FakePeer() for _ in range(KEPT_PLACES)]
    for peer in kept:
        assert not connections.enter(peer)
        connections.note_head(peer, False)
    last = FakePeer()
    assert not connections.enter(last)
    assert last.ended == [FULL] and not any(peer.ended for peer in peers + kept)


def test_a_peer_that_left_is_no_longer_counted() -> None:
    connections, peers = full(2)
    connections.leave(peers[0])
    connections.note_head(peers[0], True)  # a late word
    assert connections.enter(FakePeer())
    assert not peers[0].ended and not peers[1].ended


def test_heads_get_less_time_the_fuller_it_is() -> None:
    connections, _ = full(100)
    assert connections.head_timeout_s() == 1.0
    empty = Connections(ConnectionSettings(max_connections=100), Counter())
    times = []
    for _ in range(100):
        times.append(empty.head_timeout_s())
        empty.enter(FakePeer())
    assert times[:50] == [20.0] * 50 and times == sorted(times, reverse=True) and times[75] < 11


def test_an_error_that_comes_by_the_thousand() -> None:
    now = 0.0
    bounded = OncePerSecond(clock=lambda: now)

    def shown(message: str) -> str | None:
        record = logging.LogRecord("asyncio", logging.ERROR, "", 1, message, (), None)
        return record.getMessage() if bounded.filter(record) else None

    assert shown("no more files") == "no more files"
    assert [shown("no more files") for _ in range(1000)] == [None] * 1000
    assert shown("something else") == "something else"
    now = 1.0
    assert shown("no more files") == "no more files (and 1000 more alike)"
    now = 2.5
    assert shown("no more files") == "no more files"
