"""Which signals end a process in order, and which at once."""

from __future__ import annotations

import signal

import pytest

from serving.commands.signals import ECHO, FIRST, SECOND, SECOND_AFTER_S, EndSignals


@pytest.mark.parametrize(("signum", "later_s"), [(signal.SIGTERM, 1.5), (signal.SIGINT, 0.5)])
def test_a_burst_counts_once_and_a_later_signal_means_at_once(signum: signal.Signals, later_s: float) -> None:
    now = 100.0
    signals = EndSignals(lambda: now)
    assert signals.note(signum) is FIRST
    for after_s in (0.0, 0.003, later_s - 0.01):
        now = 100.0 + after_s
        assert signals.note(signum) is ECHO
    now = 100.0 + later_s
    assert signals.note(signum) is SECOND
    assert later_s == SECOND_AFTER_S[signum]


def test_a_service_manager_that_follows_the_terminal() -> None:
    now = 5.0
    signals = EndSignals(lambda: now)
    assert [signals.note(signal.SIGINT), signals.note(signal.SIGTERM)] == [FIRST, ECHO]
    now = 6.0
    assert signals.note(signal.SIGTERM) is ECHO
    assert signals.note(signal.SIGINT) is SECOND
