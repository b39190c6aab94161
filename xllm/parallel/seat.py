"""`Seat`: which of an engine's processes this one is, and where they meet to share a model."""

from __future__ import annotations

from dataclasses import dataclass

from backends.backend import Backend
from backends.place import Place
from xllm import env
from xllm.errors import ConfigError
from xllm.parallel.groups import open_group
from xllm.parallel.parallel_context import ONE_RANK, ParallelContext

# For all ranks to come. Chosen: they start together, but each has to import torch and to look at the checkpoint.
MEET_S = 120.0
# For one exchange: the ranks compute the same step at the same time. Chosen: as long as a rank may be behind another
# with a step (`worker/processes.py:LATE_S`), and a little more.
EXCHANGE_S = 8.0
# HCCL's own limit, in whole seconds: below that of the group, so that its error comes first, which names the rank.
HCCL_EXCHANGE_S = 7
# vllm-ascend#13688: error 507009 at the capture, or a replay that never ends.
AIV_ADVICE = ("HCCL_OP_EXPANSION_MODE=AIV does not go with graphs whose attention is updated (error 507009, or replays "
              "that hang): unset it or set it to AI_CPU, or take --graph-mode off: eager steps may have it")


@dataclass(frozen=True, kw_only=True)
class Seat:
    """rank: from 0 on. store: where the ranks meet, as `open_group` has it; "": nowhere, it is alone."""

    rank: int = 0
    store: str = ""

    def place(self, num_here: int) -> Place:
        """Which of the machine's devices this rank computes on, one of `num_here` ranks there that share a model."""
        return Place(self.rank % num_here, num_here)

    def join(self, backend: Backend, tp_size: int, *, captures: bool) -> ParallelContext:
        """Wait for the `tp_size` ranks that share the model; returns when all are there. captures: steps will be
        captured as graphs of the device.

        Raises:
            ConfigError: the environment says how to exchange, and it does not go with graphs.
            RuntimeError: they did not come in time.
        """
        if tp_size == 1:
            return ONE_RANK
        if backend.collectives == "hccl":
            if captures and env.hccl_runs_on_vector_cores():
                raise ConfigError(AIV_ADVICE)
            env.bound_hccl(HCCL_EXCHANGE_S)
        return ParallelContext(tp=open_group(backend, rank=self.rank, size=tp_size, store=self.store,
                                             timeout_s=EXCHANGE_S, meet_s=MEET_S))


ALONE_SEAT = Seat()
