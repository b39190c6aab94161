"""`ChildEnd`: waits for a process that this one started, and says how it ended, for lack of memory above all.

The kernel ends a process that takes more memory than there is by SIGKILL, without a message to it or to its parent.
What is known is how much memory it held shortly before, and how many such ends the kernel has counted.
"""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

LOOK_S = 0.25  # between two looks at the process's memory. Chosen: one small file in /proc is read each time
ROOT = Path("/")
ADVICE = ("lower --kv-cache-memory-bytes, --max-num-seqs or --max-num-batched-tokens, quantise the weights, or give it "
          "more memory")


class ChildEnd:
    """Make it when the process has just started. root: where `proc` and `sys` are found."""

    def __init__(self, process: subprocess.Popen[bytes], root: Path = ROOT):
        self._process, self._root = process, root
        self._kills = oom_kills(root)
        self.rss_bytes: int | None = None  # when it was last looked at

    def look(self) -> None:
        """Note how much memory the process holds."""
        if (rss_bytes := resident_bytes(self._process.pid, self._root)) is not None:
            self.rss_bytes = rss_bytes

    def wait(self) -> int:
        """Its exit code, once it has ended; memory is looked at meanwhile."""
        while True:
            self.look()
            try:
                return self._process.wait(LOOK_S)
            except subprocess.TimeoutExpired:
                pass

    def reason(self, code: int) -> str:
        """How the process ended, as the end of a sentence about it: "exited with code 3"."""
        if code >= 0:
            return f"exited with code {code}"
        if code != -signal.SIGKILL:
            return f"was killed by signal {-code}"
        held = f"it held {self.rss_bytes / 2**30:.2f} GiB" if self.rss_bytes else ""
        kills = oom_kills(self._root)
        if kills is None or self._kills is None:
            return _sentence("killed by signal 9, most likely by the system for lack of memory", held, ADVICE)
        counted = f"the kernel's count of such ends (oom_kill) rose from {self._kills} to {kills}"
        if kills > self._kills:
            return _sentence("killed by signal 9, most likely by the system for lack of memory", counted, held, ADVICE)
        return _sentence("killed by signal 9 from outside",
                         f"the kernel has counted no end for lack of memory (oom_kill is {kills})", held)


def _sentence(first: str, *more: str) -> str:
    *figures, last = [text for text in more if text]
    return f"was {first}: {', '.join(figures)}{'; ' if figures else ''}{last}"


def resident_bytes(pid: int, root: Path = ROOT) -> int | None:
    """Physical memory that a process holds; None: it has ended, or the system does not say."""
    try:
        lines = (root / f"proc/{pid}/status").read_text(errors="replace").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), None)
    except (OSError, ValueError):
        return None


def oom_kills(root: Path = ROOT) -> int | None:
    """How many processes the kernel has ended for lack of memory: of this process's control group, else of the
    machine; None if neither is told."""
    for file, mark in (*_group_counts(root), (root / "proc/vmstat", "oom_kill ")):
        try:
            for line in file.read_text().splitlines():
                if line.startswith(mark):
                    return int(line.split()[1])
        except (OSError, ValueError):
            continue
    return None


def _group_counts(root: Path) -> list[tuple[Path, str]]:
    """Where the counts of this process's group are, versions 1 and 2; inside a container it is the root."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        is_first = "memory" in controllers.split(",")
        if is_first or not controllers:
            mount = root / "sys/fs/cgroup" / ("memory" if is_first else "")
            name = "memory.oom_control" if is_first else "memory.events"
            found += [(mount / path.lstrip("/") / name, "oom_kill "), (mount / name, "oom_kill ")]
    return found
