"""`ParallelContext`: the groups of ranks that a model is spread over."""

from __future__ import annotations

from dataclasses import dataclass

from xllm.parallel.groups import ALONE, Group
from xllm.parallel.shard import Shard


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """Handed down the constructors of a model, never global. A group has this process's rank, the size and the
    collectives; a group of one does nothing.

    tp: shares heads, matrices and vocabulary. dp: holds replicas, each with requests of its own. ep: shares experts.
    """

    tp: Group = ALONE
    dp: Group = ALONE
    ep: Group = ALONE

    def tp_shard(self, axis: int) -> Shard:
        """This rank's part of a tensor that is split along an axis."""
        return Shard(axis, self.tp.rank, self.tp.size)


ONE_RANK = ParallelContext()
