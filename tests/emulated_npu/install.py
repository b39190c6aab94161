"""Puts the emulator under torch_npu in this process: called once, right after torch_npu was imported."""

from __future__ import annotations

import atexit
from typing import TYPE_CHECKING

from tests.emulated_npu import runtime

if TYPE_CHECKING:
    from tests.emulated_npu.machine import Machine

kept: list[object] = []


def install() -> None:
    if kept:
        return
    from tests.emulated_npu.copies import replace_copy
    from tests.emulated_npu.empties import replace_empty
    from tests.emulated_npu.kernels import Launcher, replace_aten
    from tests.emulated_npu.machine import Machine
    from tests.emulated_npu.operators import replace_npu
    from tests.emulated_npu.requests import Requests

    machine = Machine()
    launcher = Launcher(machine)
    kept.extend(
        (
            machine,
            launcher,
            replace_aten(launcher),
            replace_copy(launcher),
            replace_empty(launcher),
            *replace_npu(launcher),
        )
    )
    runtime.set_hook(Requests(machine).answer)
    atexit.register(runtime.library().emulated_npu_close)


def machine() -> Machine:
    """The machine of this process, for tests that look at it or set its order."""
    return kept[0]  # type: ignore[return-value]
