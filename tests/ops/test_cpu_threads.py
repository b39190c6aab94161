"""How many threads compute: the decision, what it is made of, and that results do not show it."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from backends.cpu import threads
from backends.cpu.threads import (
    FIRST_WAIT_S,
    IDLE_WAIT_S,
    LONGEST_WAIT_S,
    TRIAL_S,
    WINDOW_S,
    Pace,
    RunDelays,
    Seen,
    ThreadControl,
    next_pace,
    set_torch_threads,
)

FREE, HELD = Seen(WINDOW_S, WINDOW_S, 0.0), Seen(WINDOW_S, WINDOW_S, 0.5 * WINDOW_S)


def windows(pace: Pace, seen: Seen, number: int, max_threads: int) -> list[int]:
    """The numbers of threads after each of so many windows."""
    found = []
    for _ in range(number):
        pace = next_pace(pace, seen, max_threads)
        found.append(pace.num_threads)
    return found


def test_alone_all_threads_stay() -> None:
    assert windows(Pace(4), FREE, 100, 4) == [4] * 100
    assert windows(Pace(4), Seen(1.0, 1.0, 0.1), 100, 4) == [4] * 100  # a little is always lost


@pytest.mark.parametrize(("lost", "left"), [(0.1, 8), (0.2, 7), (0.5, 7), (1.4, 7), (2.0, 6), (3.6, 4), (50.0, 1)])
def test_as_many_go_as_are_held_back(lost: float, left: int) -> None:
    assert next_pace(Pace(8), Seen(1.0, 1.0, lost), 8).num_threads == left


def test_one_thread_is_the_least_and_tries_nothing_while_it_is_held_back() -> None:
    assert windows(Pace(2), HELD, 1000, 2) == [1] * 1000


def test_trials_become_rare_while_they_fail() -> None:
    pace, time_s, trials = next_pace(Pace(2), HELD, 2), 0.0, []
    while time_s < 60.0:
        wall_s = TRIAL_S if pace.is_trial else WINDOW_S
        trials += [time_s] if pace.is_trial else []
        time_s += wall_s
        held = wall_s if pace.num_threads > 1 else 0.0
        pace = next_pace(pace, Seen(wall_s, wall_s, held), 2)
    gaps = np.diff(trials)
    assert trials[0] == pytest.approx(FIRST_WAIT_S, abs=2 * WINDOW_S)
    assert (gaps[1:] >= gaps[:-1] - WINDOW_S).all() and gaps[-1] == pytest.approx(LONGEST_WAIT_S, abs=2 * WINDOW_S)
    assert len(trials) * TRIAL_S / time_s < 0.01


def test_all_threads_come_back_soon_after_the_neighbours_left() -> None:
    pace, time_s = Pace(1, LONGEST_WAIT_S, LONGEST_WAIT_S), 0.0
    while pace.num_threads < 8:
        pace = next_pace(pace, FREE, 8)
        time_s += FREE.wall_s
    assert time_s <= LONGEST_WAIT_S + 10 * WINDOW_S
    for _ in range(int(LONGEST_WAIT_S / WINDOW_S)):
        pace = next_pace(pace, FREE, 8)
    assert pace.backoff_s == FIRST_WAIT_S  # what the next neighbour finds


def test_an_idle_core_is_tried_soon() -> None:
    pace, time_s = Pace(1, LONGEST_WAIT_S, LONGEST_WAIT_S), 0.0
    while pace.num_threads < 2:
        pace = next_pace(pace, Seen(WINDOW_S, WINDOW_S, 0.0, idle_cores=0.9), 2)
        time_s += WINDOW_S
    assert IDLE_WAIT_S <= time_s <= IDLE_WAIT_S + 2 * WINDOW_S


def test_a_window_without_work_says_nothing() -> None:
    pace = Pace(1, 0.01)
    assert next_pace(pace, Seen(100.0, 0.0, 0.0), 2) == pace


def test_times_are_read_thread_by_thread(tmp_path: Path) -> None:
    def write(**tasks: str) -> None:
        for name, text in tasks.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "schedstat").write_text(text)

    write(a="5000000000 1000000000 7", b="100 200 3")
    delays = RunDelays(tmp_path, tmp_path / "none")
    # d is seldom busy: it does not compute
    write(a="5300000000 1200000000 9", b="100000100 50000200 4", c="100000000 30000000 1", d="10000000 90000000 1")
    (tmp_path / "ended").mkdir()
    seen = delays.take()
    assert seen.idle_cores == 0
    assert delays.is_known
    assert (seen.busy_s, seen.held_s) == (pytest.approx(0.5), pytest.approx(0.28))
    assert delays.take().busy_s == 0.0


def test_idle_cores_are_those_that_this_process_may_use(tmp_path: Path) -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("no affinity here")
    own, ticks = min(os.sched_getaffinity(0)), os.sysconf("SC_CLK_TCK")
    cores = tmp_path / "stat"
    cores.write_text(f"cpu  1 2 3 9999 5\ncpu{own} 1 2 3 100 5 6\ncpu99999 1 2 3 9999 5 6\nintr 5 6\n\n")
    delays = RunDelays(tmp_path, cores)
    time.sleep(0.01)
    cores.write_text(f"cpu  1 2 3 99999 5\ncpu{own} 1 2 3 {100 + ticks} 5 6\ncpu99999 1 2 3 99999 5 6\nintr 5 6\n\n")
    seen = delays.take()
    assert seen.idle_cores * seen.wall_s == pytest.approx(1.0)


def test_a_system_that_does_not_tell_keeps_its_threads(tmp_path: Path) -> None:
    delays = RunDelays(tmp_path / "none")
    assert not delays.is_known
    applied: list[int] = []
    control = ThreadControl(3, applied.append, delays)
    control.step()
    control.step()
    assert control.num_threads == 3 and applied == [3]


def test_this_system_tells_what_this_process_did() -> None:
    delays = RunDelays()
    if not delays.is_known:
        pytest.skip("no schedstat here")
    end_s = time.thread_time() + 0.05
    while time.thread_time() < end_s:
        pass
    seen = delays.take()
    assert 0.04 < seen.busy_s <= seen.wall_s + 0.05 and seen.held_s >= 0


class Flapping(RunDelays):
    """In every second window another process had the cores."""

    is_known = True

    def __init__(self) -> None:
        self._turn = 0

    def take(self) -> Seen:
        self._turn += 1
        return Seen(10.0, 1.0, self._turn % 2)


def test_lowering_is_said_once_and_counted(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(threads, "WINDOW_S", 0.0)
    monkeypatch.setattr(threads, "TRIAL_S", 0.0)
    before = torch.get_num_threads()
    try:
        with caplog.at_level(logging.WARNING):
            control = ThreadControl(2, set_torch_threads, Flapping())
            found = []
            for _ in range(10):
                control.step()
                assert torch.get_num_threads() == control.num_threads
                found.append(control.num_threads)
    finally:
        torch.set_num_threads(before)
    assert set(found[:2]) == {1, 2} and control.lowered_total >= 1
    assert len([r for r in caplog.records if "keep the cores busy" in r.getMessage()]) == 1
