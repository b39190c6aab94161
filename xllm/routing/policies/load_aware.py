"""`load_aware`: to where there is most room, in the KV cache and in the queue.

As xllm-service's cache-aware score without its first term: usage of the cache plus the queue over the longest one
(research of its source: `cache_aware_routing.cpp`), with what was sent since the instance last spoke counted in.
"""

from __future__ import annotations

import numpy as np

from xllm.routing.fleet_snapshot import Decision, FleetSnapshot, RoutedCall
from xllm.routing.ranking import decided

# As many requests that wait weigh as much as a cache that is full. Chosen: the default of `max_num_seqs`, a batch.
FULL_QUEUE_REQUESTS = 256


def decide(snapshot: FleetSnapshot, call: RoutedCall) -> Decision:
    """The least load. Scores: the share of its cache that is used with the call there, and its queue over
    `FULL_QUEUE_REQUESTS`, added."""
    needed = np.maximum(0, call.num_tokens - snapshot.device_tokens)
    usage = 1.0 - (snapshot.free_tokens - needed) / np.maximum(1, snapshot.num_tokens)
    return decided(snapshot, call, usage + snapshot.num_queued / FULL_QUEUE_REQUESTS)
