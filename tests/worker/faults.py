"""Arms the faults of `faulty_rank.py` from a test, and looks at what they leave behind."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

FAULT_SITE = Path(__file__).parent / "fault_site"
VARIABLE = "XLLM_TEST_FAULT"


class Faults:
    """path: of the file that arms one. Every process with this path in its environment is one of the test's."""

    def __init__(self, path: Path):
        self.path = path
        self.taken = path.with_name(path.name + ".done")

    def arm(self, fault: str) -> None:
        """fault: POINT.ACTION:RANK."""
        self.taken.unlink(missing_ok=True)
        self.path.with_name(self.path.name + ".slow").unlink(missing_ok=True)
        whole = self.path.with_name(self.path.name + ".new")
        whole.write_text(fault)
        whole.rename(self.path)

    @property
    def at_s(self) -> float:
        """When the fault happened, as `time.time()` has it."""
        return float(self.taken.read_text())

    def processes(self) -> list[psutil.Process]:
        """Those that are ranks, also where nobody is their parent any more."""
        found = []
        for process in psutil.process_iter():
            try:
                if (process.environ().get(VARIABLE) == str(self.path) and process.status() != psutil.STATUS_ZOMBIE
                        and any("faulty_rank" in word for word in process.cmdline())):
                    found.append(process)
            except psutil.Error:
                continue
        return found


def leavings(folder: Path) -> set[str]:
    """Folders of sockets below `folder`, and shared memory of this user."""
    shared = {path.name for path in Path("/dev/shm").iterdir() if path.stat().st_uid == os.getuid()}
    return shared | {path.name for path in folder.glob("xllm-*")}
