"""Instances of a cluster in this process, each an engine behind a gate, and the cluster's client over them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from tests.llm.conftest import SETTINGS
from tests.llm.gated import KEYS, GatedClient, WatchedLocal, gate_of
from tests.llm.test_remote import until
from xllm.client.call_watcher import CallWatcher
from xllm.client.cluster import ClusterClient
from xllm.client.cluster_call import ClusterCall
from xllm.client.engine_client import Stream
from xllm.config import EngineConfig
from xllm.engine.core import EngineCore
from xllm.request import FinishReason, OutputDelta, Request, SamplingParams, TokenLogprobs

CONFIG = EngineConfig.from_flat(**SETTINGS, max_num_seqs=4, max_waiting_requests=8, max_num_batched_tokens=64)
SHORT = (17, 4, 99, 1000, 17, 4)
NUM_TOKENS = 24
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


@dataclass
class Site:
    """An instance: an engine of this process behind a gate, and the cluster's connection to it."""

    name: str
    engine: WatchedLocal
    client: GatedClient
    role: str = "DEFAULT"

    def kill(self, reason: str = "it was hit") -> None:
        """As when its engine's process dies; what it had is gone."""
        self.engine._die(reason)
        self.client.gate._is_up()  # it looks at once, not at its next beat

    @property
    def request_ids(self) -> tuple[str, ...]:
        return self.engine.request_ids


@dataclass
class Cluster:
    client: ClusterClient
    sites: dict[str, Site] = field(default_factory=dict)

    async def add(self, name: str, engine: WatchedLocal, stack: contextlib.AsyncExitStack, *,
                  role: str = "DEFAULT") -> Site:
        gate = await stack.enter_async_context(gate_of(engine))
        client = GatedClient(gate.address, KEYS, name="master")
        client.engine, client.gate = engine, gate
        await client.connect()
        stack.callback(client.close)
        site = self.sites[name] = Site(name, engine, client, role)
        self.join(site)
        return site

    def join(self, site: Site) -> None:
        site.client.on_lost = lambda reason: self.client.leave(site.name, reason)
        self.client.join(site.name, site.client, role=site.role)

    async def back(self, site: Site) -> None:
        """It is started again: another incarnation."""
        await until(lambda: site.client.dead_reason is not None)
        site.engine.dead_reason = None
        await site.client.connect()
        self.join(site)

    def having(self, stream: Stream) -> Site:
        """The instance that a call is at."""
        assert isinstance(stream, ClusterCall) and stream.place is not None
        return self.sites[stream.place]


@contextlib.asynccontextmanager
async def three_sites(config: EngineConfig = CONFIG, watcher: CallWatcher | None = None) -> AsyncIterator[Cluster]:
    """A cluster of instances a, b and c."""
    engines = [WatchedLocal(EngineCore(config)) for _ in range(3)]
    async with contextlib.AsyncExitStack() as stack:
        found = Cluster(ClusterClient(watcher=watcher))
        for name, engine in zip("abc", engines, strict=True):
            await found.add(name, engine, stack)
        yield found
        await found.client.close()
    for engine in engines:
        engine.shutdown()


def make_request(name: str, sampling: SamplingParams = GREEDY, prompt: tuple[int, ...] = SHORT,
                 **fields) -> Request:
    return Request(request_id=name, prompt_token_ids=prompt, sampling=sampling, **fields)


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish_reasons: list[FinishReason] = field(default_factory=list)
    cached: int = 0


def answers(deltas: list[OutputDelta]) -> dict[str, Answer]:
    found: dict[str, Answer] = {}
    for delta in deltas:
        answer = found.setdefault(delta.request_id, Answer())
        assert not answer.finish_reasons, "nothing comes after the end"
        answer.token_ids += delta.token_ids
        answer.logprobs += delta.logprobs or []
        answer.prompt_logprobs += delta.prompt_logprobs or []
        answer.finish_reasons += [delta.finish_reason] if delta.finish_reason is not None else []
        answer.cached = max(answer.cached, delta.num_cached_tokens)
    return found


def same(found: Answer, expected: Answer) -> None:
    assert found.token_ids == expected.token_ids
    assert found.finish_reasons == expected.finish_reasons and len(found.finish_reasons) == 1
    for mine, other in ((found.logprobs, expected.logprobs), (found.prompt_logprobs, expected.prompt_logprobs)):
        assert [(e and (e.token_id, e.rank, e.top_ids)) for e in mine] == \
            [(e and (e.token_id, e.rank, e.top_ids)) for e in other]


def after(stream: Stream, num_tokens: int, act: Callable[[], object]) -> None:
    """Call `act` once so many tokens have come on the stream, in the turn in which they come."""
    seen = 0

    def note(request_id: str, number: int) -> None:
        nonlocal seen
        seen += number
        if seen >= num_tokens and note in stream.listeners:
            stream.listeners.remove(note)
            asyncio.get_running_loop().call_soon(act)

    stream.listeners.append(note)
