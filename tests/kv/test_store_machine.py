"""The whole store under random operations (`store_machine.py`), and a crash at every failpoint that it can reach."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.kv.store_machine import StoreMachine, play
from xllm.kv import failpoints

ROOT = Path(__file__).parents[2]
UNREACHED = {"disk.erased"}  # the tiers erase nothing: what is not good is not believed
POINTS = sorted(name for name in set(failpoints.NAMES) - UNREACHED if not name.startswith(("engine.", "transfer.")))


@pytest.mark.parametrize("start", range(0, 24, 6))
def test_random_operations(start, tmp_path):
    for seed in range(start, start + 6):
        play(seed, 250, tmp_path / str(seed))


NEEDED = ("crashes", "shut downs", "found again", "flushed", "hits", "copies", "saved", "loaded", "written", "read",
          "passed through", "lifted", "evicted from the device", "evicted from host", "evicted from disk", "swaps",
          "leases expired", "waits", "stalls", "aborted_waiters", "fetched", "damages", "misses", "broken",
          "disks lost", "put", "found in the store", "fetch moves", "in the store")  # fmt: skip


def test_they_reach_what_they_are_meant_to_reach(tmp_path):
    """Otherwise the test above proves little."""
    totals: Counter = Counter()
    for seed in range(100, 160):
        totals += play(seed, 500, tmp_path / str(seed), damage=True)
        if all(totals[name] for name in NEEDED):
            return
    raise AssertionError([name for name in NEEDED if not totals[name]])


@pytest.mark.parametrize("point", POINTS)
def test_a_crash_at_every_failpoint(point, tmp_path):
    for seed in range(40):
        machine = StoreMachine(seed, tmp_path / str(seed), damage=False, points=[point])
        while not machine.counts[f"crash at {point}"] and machine.num_done < 400:
            machine.play(40, rest=False)
        machine.play(40)
        machine.close()
        if machine.counts[f"crash at {point}"]:
            return
    raise AssertionError(f"{point} was never reached")


def test_the_nightly_run_plays_the_same_episodes(tmp_path):
    done = subprocess.run([sys.executable, "-m", "tests.kv.store_machine", "--operations", "300", "--seed", "3"],
                          cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)  # fmt: skip
    assert "300 operations in 1 episodes" in done.stdout
    assert f"saved {play(3, 300, tmp_path)['saved']}," in done.stdout
