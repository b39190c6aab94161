"""How a process of ours ended: real children, and the kernel's counts as its files have them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from xllm.child_end import ChildEnd, oom_kills, resident_bytes

HOLDS = "import sys; held = bytearray(b'x') * (96 << 20); print(len(held), flush=True); sys.stdin.read()"
LIKELY = "was killed by signal 9, most likely by the system for lack of memory: "


def end_of(root: Path | None = None, *, meanwhile: Callable[[], object] = lambda: None,
           signum: signal.Signals = signal.SIGKILL) -> str:
    """What is said of a child that holds 96 MiB and is ended by a signal. root: see `ChildEnd`."""
    with subprocess.Popen([sys.executable, "-c", HOLDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline()
        if root is not None:  # what is said of memory is real, what is counted is not
            (root / f"proc/{child.pid}").mkdir(parents=True)
            (root / f"proc/{child.pid}/status").write_text(Path(f"/proc/{child.pid}/status").read_text())
        end = ChildEnd(child) if root is None else ChildEnd(child, root)
        end.look()
        assert end.rss_bytes is not None and 96 <= end.rss_bytes / 2**20 < 160
        meanwhile()
        child.send_signal(signum)
        return end.reason(end.wait())


def machine(root: Path, groups: str) -> Path:
    """A folder for the files that Linux would show, with the groups of this process."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    return root


EVENTS = "low 0\nhigh 0\nmax 12\noom 1\noom_kill {}\noom_group_kill 0\n"


@pytest.mark.parametrize(("groups", "file", "content"), [
    ("0::/user/app\n", "sys/fs/cgroup/user/app/memory.events", EVENTS),
    ("0::/seen/from/outside\n", "sys/fs/cgroup/memory.events", EVENTS),
    ("4:memory:/pod\n1:cpu:/pod\n0::/\n", "sys/fs/cgroup/memory/pod/memory.oom_control",
     "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"),
    ("0::/\n", "proc/vmstat", "nr_free_pages 7\noom_kill {}\n"),
], ids=["v2", "container", "v1", "machine"])
def test_a_kill_for_lack_of_memory_is_named_with_its_figures(tmp_path: Path, groups: str, file: str,
                                                             content: str) -> None:
    root = machine(tmp_path, groups)
    counts = root / file
    counts.parent.mkdir(parents=True, exist_ok=True)
    counts.write_text(content.format(2))
    assert oom_kills(root) == 2
    said = end_of(root, meanwhile=lambda: counts.write_text(content.format(3)))
    assert said.startswith(LIKELY + "the kernel's count of such ends (oom_kill) rose from 2 to 3, it held 0.")
    assert "--kv-cache-memory-bytes" in said
    said = end_of(root)
    assert said.startswith("was killed by signal 9 from outside: the kernel has counted no end for lack of memory "
                           "(oom_kill is 3); it held 0.1")


def test_where_nothing_is_counted(tmp_path: Path) -> None:
    assert end_of(machine(tmp_path, "")).startswith(LIKELY + "it held 0.1")


def test_this_machine() -> None:
    assert end_of().startswith("was killed by signal 9")
    assert end_of(signum=signal.SIGTERM) == "was killed by signal 15"
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as child:
        end = ChildEnd(child)
        assert end.reason(end.wait()) == "exited with code 3"
    assert resident_bytes(child.pid) is None
