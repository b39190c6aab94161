"""`ClusterView`: what a master shows of its cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import chain
from typing import Any, TypeVar

from serving.security.paths import hide_paths
from xllm.client.cluster import ClusterClient
from xllm.client.cluster_members import MAX_EVENTS, ClusterEvent
from xllm.client.dispatch import Dispatch
from xllm.client.member_client import MemberClient

Timed = TypeVar("Timed", Dispatch, ClusterEvent)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberRow:
    """An instance. state: "active" if it takes requests, else in words. client: None unless it is connected."""

    name: str
    role: str
    state: str
    reason: str
    address: str
    client: MemberClient | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """Of a model's instances (engine), and of all of the master's models. store: where instances register, and how that
    is; None: they were named. leader(): the address of the master that leads; None: nobody. address: of this master.
    engines(): of all models."""

    engine: ClusterClient
    engines: Callable[[], Sequence[ClusterClient]]
    policy: str
    members: Callable[[], Sequence[MemberRow]]
    address: str
    store: Callable[[], str | None]
    leader: Callable[[], Awaitable[str | None]]

    async def shown(self) -> dict[str, Any]:
        """As JSON."""
        leader, engines = await self.leader(), self.engines()
        counts = [engine.counts for engine in engines]
        return {
            "master": self.address, "leader": leader, "is_leader": leader == self.address, "store": self.store(),
            "policy": self.policy, "open_requests": sum(len(engine.request_ids) for engine in engines),
            "members": [self._member(row) for row in self.members()],
            "totals": {"decisions": dict(sum((one.decisions for one in counts), Counter())),
                       "recovered": dict(sum((one.recovered for one in counts), Counter())),
                       "handovers": dict(sum((one.handovers for one in counts), Counter())),
                       "role_flips": dict(sum((Counter(engine.flips) for engine in engines), Counter())),
                       **{name: sum(getattr(one, name) for one in counts)
                          for name in ("retried", "given_up", "recomputed_tokens")}},
            "decisions": [_decision(one) for one in newest(engine.recent for engine in engines)],
            "events": [_event(one) for one in newest(engine.members.events for engine in engines)],
        }

    def _member(self, row: MemberRow) -> dict[str, Any]:
        found: dict[str, Any] = {"name": row.name, "role": row.role, "state": row.state,
                                 "reason": hide_paths(row.reason) or None, "address": row.address}
        if (client := row.client) is None or client.facts is None or client.model is None:
            return found
        stats = client.stats
        now = [member.role for engine in self.engines() if (member := engine.members.all.get(row.name)) is not None]
        return found | {
            "role": now[0] if now else row.role,  # which may be another one than it registered with
            "incarnation": client.incarnation, "started": _time(client.started_unix_s),
            "models": list(client.model.names), "adapters": list(client.adapters),
            "running": stats.num_running, "waiting": stats.num_waiting,
            "sent": sum(engine.num_sent(row.name) for engine in self.engines()),
            "silent_s": round(client.silent_for_s(), 3),
            "kv_usage": round(stats.kv_usage, 4), "kv_blocks": client.facts.num_blocks,
            "block_size": client.facts.config.cache.block_size,
            "cached_blocks": sum(engine.num_cached_blocks(row.name) for engine in self.engines()),
            "hit_rate": round(stats.prefix_hits_total / stats.prefix_queries_total, 4)
            if stats.prefix_queries_total else None,
        }


def newest(kinds: Iterable[Sequence[Timed]]) -> list[Timed]:
    """Of several logs, the newest entries first, as many as each holds."""
    return sorted(chain.from_iterable(kinds), key=lambda one: one.unix_s)[:-MAX_EVENTS - 1:-1]


def _decision(one: Dispatch) -> dict[str, Any]:
    decision = one.decision
    return {"time": _time(one.unix_s), "request_id": one.request_id, "sequences": one.num_requests,
            "tokens": one.num_tokens, "instance": decision.name, "reason": decision.reason,
            "scores": {name: round(score, 4) for name, score in decision.scores.items()},
            "cached_tokens": sum(decision.matched_tokens), "instances_lost": one.num_lost}


def _event(one: ClusterEvent) -> dict[str, Any]:
    return {"time": _time(one.unix_s), "event": one.kind, "instance": one.instance,
            "reason": hide_paths(one.text) or None}


def _time(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, timezone.utc).isoformat(timespec="milliseconds")
