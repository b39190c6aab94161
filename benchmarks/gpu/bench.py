"""`Bench`: what a section is given: the device, the profile, the time left, and where its rows go."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.device import Device, Timing
from benchmarks.gpu.profile import Profile
from benchmarks.gpu.results import ABSENT, FAILED, OK, SKIPPED, ResultFile
from benchmarks.gpu.roofline import Ceilings, Work


class SkippedForTime(Exception):
    """The deadline is too near for what was to be done."""


class DeviceLost(Exception):
    """After an illegal access every call of this process to its GPU fails; another process may use it."""


class Bench:
    """until_s: when this section shall be done, on the `time.time()` clock, which processes share. scratch: a folder
    that goes away. out: one that is kept, for few and small files."""

    def __init__(self, device: Device, profile: Profile, results: ResultFile, *, until_s: float, scratch: Path,
                 out: Path):
        self.device, self.profile, self.results = device, profile, results
        self.until_s, self.scratch, self.out = until_s, scratch, out
        self.section = ""

    @property
    def left_s(self) -> float:
        return self.until_s - time.time()

    @property
    def ceilings(self) -> Ceilings | None:
        """What `ceilings` measured here; None: it has not run."""
        found = self.results.data["ceilings"]
        return Ceilings(found["bandwidth"], found["rate"]) if "bandwidth" in found and "rate" in found else None

    @property
    def floor_ceilings(self) -> Ceilings:
        """What floors are computed with: the fixed ones of the device, else the measured ones. Raises ValueError."""
        ceilings = self.device.fixed_ceilings() or self.ceilings
        if ceilings is None:
            raise ValueError("floors on this device need its measured ceilings: run the section 'ceilings' first")
        return ceilings

    def row(self, id: str, *, timing: Timing | None = None, work: Work | None = None, status: str = OK,
            cfg: dict[str, Any] | None = None, ceilings: Ceilings | None = None, **facts: Any) -> dict[str, Any]:
        """Add a row. pct_bw, pct_tf: the work's bytes and operations over the time, in percent of these ceilings, or
        the measured ones; err: a check's error."""
        row: dict[str, Any] = {"section": self.section, "id": id, "status": status,
                               "commit": self.results.data.get("commit"), "cfg": cfg or {}}  # fmt: skip
        if timing is not None:
            row |= {"us": timing.us, "us_again": list(timing.again_us), "us_spread": timing.spread_us,
                    "samples": timing.samples}  # fmt: skip
        if work is not None:
            row |= {"bytes": work.bytes, "flops": work.flops}
            ceilings = ceilings or self.ceilings
            if timing is not None and ceilings is not None:
                row |= self._shares(work, timing, ceilings)
        row |= {key: finite(value) for key, value in facts.items()}
        self.results.add(row)
        return row

    def _shares(self, work: Work, timing: Timing, ceilings: Ceilings) -> dict[str, Any]:
        seconds = timing.us * 1e-6
        return {"pct_bw": 100 * work.bytes / seconds / ceilings.bandwidth,
                "pct_tf": 100 * work.flops / seconds / ceilings.rate, "floor_us": work.seconds(ceilings) * 1e6,
                "ceilings": {"bw": ceilings.bandwidth, "tf": ceilings.rate}}  # fmt: skip

    def check(self, id: str, passed: bool, *, why: str = "", **facts: Any) -> bool:
        """Add a row that says whether something is right."""
        self.row(id, status=OK if passed else FAILED, check=True, why="" if passed else why, **facts)
        return passed

    def absent(self, id: str, why: str) -> None:
        self.row(id, status=ABSENT, why=why)

    def require(self, seconds: float) -> None:
        """Raise SkippedForTime unless that much is left."""
        if self.left_s < seconds:
            raise SkippedForTime(f"needs {seconds:.0f} s, {max(self.left_s, 0):.0f} s are left")

    def attempt(self, id: str, seconds: float, call: Callable[..., object], *arguments: Any) -> None:
        """Call it. What goes wrong becomes a row of that id, and so does what does not fit the deadline. One that has a
        row already (of a process that lost the device) is not called again.

        Raises DeviceLost if the device is of no use any more.
        """
        if any(row["id"] == id and row["section"] == self.section for row in self.results.rows):
            return
        try:
            self.require(seconds)
            call(*arguments)
        except SkippedForTime as reason:
            self.row(id, status=SKIPPED, why=str(reason))
        except DeviceLost:
            raise
        except Exception as error:
            self.row(id, status=FAILED, check=True, why=f"{type(error).__name__}: {error}"[:2000],
                     traceback=traceback.format_exc()[-8000:])
            if not self.device.is_usable():
                raise DeviceLost(f"{id}: {error}"[:500]) from error
            self.device.release_memory()


def finite(value: Any) -> Any:
    """JSON has no NaN and no inf: they become words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value
