"""`PairedCore`: two engines that look like one: a request begins at the first, and goes on at the second once its KV is
there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from xllm.client.merged_stats import merged_stats
from xllm.engine.core import EngineCore
from xllm.kv_offer import KVOffer
from xllm.request import FinishReason, OutputDelta, Request
from xllm.stats import EngineStats

LEASE_S = 60.0


class PairedCore:
    """What `InlineClient` calls of an `EngineCore`. num_moved: requests that went on at the second engine."""

    def __init__(self, first: EngineCore, second: EngineCore):
        self.cores = first, second
        self.num_moved = 0
        self._requests: dict[str, Request] = {}
        self._token_ids: dict[str, list[int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cores[0], name)

    def add(self, request: Request) -> None:
        offer = self.cores[1].expect(request, LEASE_S)
        self._requests[request.request_id], self._token_ids[request.request_id] = request, []
        self.cores[0].add(replace(request, offer=offer if isinstance(offer, KVOffer) else None))
        if isinstance(offer, KVOffer):
            self._requests[request.request_id] = replace(request, landing=offer.number)

    def abort(self, request_id: str) -> None:
        for core in self.cores:
            core.abort(request_id)

    def has_work(self) -> bool:
        return any(core.has_work() for core in self.cores)

    def step(self) -> list[OutputDelta]:
        first, second = self.cores
        found = []
        for delta in first.step() if first.has_work() else ():
            self._token_ids[delta.request_id] += delta.token_ids
            if delta.finish_reason is FinishReason.HANDED_OVER:
                self.num_moved += 1
                second.add(replace(self._requests[delta.request_id],
                                   generated_token_ids=tuple(self._token_ids[delta.request_id])))
            else:
                found.append(delta)
        if second.has_work():
            return found + second.step()
        second.tick()  # KV may be landing
        return found

    def stats(self) -> EngineStats:
        return merged_stats([core.stats() for core in self.cores])
