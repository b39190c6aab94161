"""`Seat`: which of an engine's processes this one is, and where they meet to share a model."""

from __future__ import annotations

from dataclasses import dataclass

from backends.backend import Backend
from xllm.errors import ConfigError
from xllm.parallel.groups import open_group
from xllm.parallel.parallel_context import ONE_RANK, ParallelContext

# For all ranks to come. Chosen: they start together, but each has to import torch and to look at the checkpoint.
MEET_S = 120.0
# For one exchange: the ranks compute the same step at the same time. Chosen: as long as a rank may be behind another
# with a step (`worker/processes.py:LATE_S`), and a little more.
EXCHANGE_S = 8.0


@dataclass(frozen=True, kw_only=True)
class Seat:
    """rank: from 0 on. store: where the ranks meet, as `open_group` has it; "": nowhere, it is alone."""

    rank: int = 0
    store: str = ""

    def join(self, backend: Backend, tp_size: int) -> ParallelContext:
        """Wait for the `tp_size` ranks that share the model; returns when all are there.

        Raises:
            ConfigError: ranks on such a device are not built.
            RuntimeError: they did not come in time.
        """
        if tp_size == 1:
            return ONE_RANK
        if not backend.computes_on_host:
            raise ConfigError(f"tensor_parallel_size {tp_size}: built for the CPU so far, and the device is "
                              f"{backend.name}: every rank would compute on the same card")
        return ParallelContext(tp=open_group(backend, rank=self.rank, size=tp_size, store=self.store,
                                             timeout_s=EXCHANGE_S, meet_s=MEET_S))


ALONE_SEAT = Seat()
