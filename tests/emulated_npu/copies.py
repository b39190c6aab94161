"""`copy_` between host and device: what is waited for, what is queued, and what a capture forbids."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.emulated_npu import runtime
from tests.emulated_npu.kernels import Launcher, current_stream
from tests.emulated_npu.tasks import Kernel
from tests.emulated_npu.tensors import host, is_npu, range_of


class Copier:
    def __init__(self, launcher: Launcher):
        self.launcher, self.machine = launcher, launcher.machine
        self.on_device = launcher.kernel(torch.ops.aten.copy_.default)

    def copy_(self, to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if is_npu(to) and (is_npu(source) or (source.dim() == 0 == to.dim() and False)):
            self.on_device(to, source, non_blocking)
            return to
        device, on_host = (to, source) if is_npu(to) else (source, to)
        stream = current_stream(device.device)
        if self.machine.is_recording(stream) and stream in self.machine.captures:
            self._refuse()
        if non_blocking and self._is_direct(device, on_host):
            self._queue(to, source, stream)
        else:
            self._wait(to, source, stream)
        return to

    def _is_direct(self, device: Tensor, on_host: Tensor) -> bool:
        """Whether the device reads or writes the host's memory by itself, later."""
        num_bytes = on_host.numel() * on_host.element_size()
        if not on_host.is_contiguous() or on_host.dtype != device.dtype or not num_bytes:
            return False
        return bool(runtime.library().emulated_npu_is_pinned(on_host.data_ptr(), num_bytes))

    def _queue(self, to: Tensor, source: Tensor, stream: int) -> None:
        device = to if is_npu(to) else source
        # The host's tensor is kept: torch_npu's pinned allocator, too, waits for the stream before it reuses it.
        aliases = (host(to), source) if is_npu(to) else (to, host(source))
        if self.machine.is_plain(stream):
            aliases[0].copy_(aliases[1])
        else:
            self.machine.submit(stream, Kernel("copy", lambda: aliases[0].copy_(aliases[1]), [range_of(device)]))

    def _wait(self, to: Tensor, source: Tensor, stream: int) -> None:
        self.launcher.forbidden()
        self.launcher.wait(stream)
        (host(to) if is_npu(to) else to).copy_(host(source) if is_npu(source) else source)

    def _refuse(self) -> None:
        """A copy between host and device in a capture."""
        self.launcher.forbidden()
        raise runtime.AclError(runtime.CAPTURE_MODE)


def replace_copy(launcher: Launcher) -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL")
    library.impl("copy_", Copier(launcher).copy_, "PrivateUse1", allow_override=True)
    return library
