"""`ModelledEngine`: an instance of a cluster as far as its router can tell, in simulated time: a queue, steps that take
as long as they have work, and a prefix cache that forgets what was used longest ago."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

STEP_TOKENS = 2048  # of prompts in a step: the default of `max_num_batched_tokens`
MAX_RUNNING = 256  # sequences: the default of `max_num_seqs`


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedRequest:
    """at_s: when it comes. blocks: names of the prompt's whole blocks of block_size tokens, each with all before it, so
    that equal names are equal prefixes. session: that it is a turn of."""

    request_id: str
    at_s: float
    num_tokens: int
    num_output_tokens: int
    block_size: int
    blocks: Sequence[bytes]
    session: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpeed:
    """Seconds of a step, and what each prompt's token and each sequence that decodes adds to it."""

    step_s: float
    token_s: float
    sequence_s: float


@dataclass(slots=True)
class _Job:
    request: TracedRequest
    num_done: int = -1  # prompt tokens that are computed or were cached; -1: not begun
    num_cached: int = 0


@dataclass(slots=True)
class EngineTotals:
    """num_computed: prompt tokens. ttft_s: from when a request came to its first token."""

    num_prompt_tokens: int = 0
    num_cached: int = 0
    ttft_s: list[float] = field(default_factory=list)

    @property
    def num_computed(self) -> int:
        return self.num_prompt_tokens - self.num_cached


class ModelledEngine:
    """num_blocks: of its cache. on_begun, on_left: called with a request's id at its first token and at its end.
    on_cache: called with the names of blocks that were stored and removed."""

    def __init__(self, num_blocks: int, speed: EngineSpeed, on_begun: Callable[[str], None],
                 on_left: Callable[[str], None], on_cache: Callable[[bytes, bytes], None]):
        self.now_s, self.totals = 0.0, EngineTotals()
        self.timings: list[tuple[float, float, int, int]] = []  # of steps: see `step_log.StepTiming`
        self._num_blocks, self._speed = num_blocks, speed
        self._on_begun, self._on_left, self._on_cache = on_begun, on_left, on_cache
        self._cached: OrderedDict[bytes, None] = OrderedDict()  # used longest ago first
        self._waiting: deque[_Job] = deque()  # whose prompts are not computed; the first may have begun
        self._decoding: list[tuple[int, str, int]] = []  # a heap: the last step, id, blocks held
        self._num_steps = self._num_held = 0

    @property
    def num_waiting(self) -> int:
        """Requests whose prompts are not computed."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that decode."""
        return len(self._decoding)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no running sequence has."""
        return max(0, self._num_blocks - self._num_held)

    def submit(self, request: TracedRequest) -> None:
        """It comes now: the engine must have been advanced to then."""
        self._waiting.append(_Job(request))

    def advance(self, until_s: float) -> None:
        """Compute until then; a step that has begun ends."""
        while self.now_s < until_s and (self._waiting or self._decoding):
            self._step(until_s)
        self.now_s = max(self.now_s, until_s)

    def _step(self, until_s: float) -> None:
        chunks = self._chunks()
        num_tokens, num_seqs = sum(chunk for _, chunk in chunks), len(self._decoding)
        took_s = (self._speed.step_s + self._speed.token_s * num_tokens + self._speed.sequence_s * num_seqs)
        count = 1
        if not chunks:  # as many alike as there are before something changes
            assert self._decoding, "a request that waits fits into an empty cache"
            count = max(1, math.ceil(min(self._decoding[0][0] - self._num_steps, (until_s - self.now_s) / took_s)))
        self.now_s += took_s * count
        self._num_steps += count
        self.timings.append((self.now_s, took_s, num_tokens + num_seqs, num_seqs + len(chunks)))
        for job, chunk in chunks:
            self._compute(job, chunk)
        while self._decoding and self._decoding[0][0] <= self._num_steps:
            _, request_id, held = heapq.heappop(self._decoding)
            self._num_held -= held
            self._on_left(request_id)

    def _chunks(self) -> list[tuple[_Job, int]]:
        """Which prompts get how many tokens of the next step."""
        left, chunks = STEP_TOKENS, list[tuple[_Job, int]]()
        for place, job in enumerate(self._waiting):
            if not left or len(self._decoding) + place >= MAX_RUNNING or (job.num_done < 0 and not self._admit(job)):
                break
            chunk = min(left, job.request.num_tokens - job.num_done)
            left -= chunk
            chunks.append((job, chunk))
        return chunks

    def _admit(self, job: _Job) -> bool:
        request = job.request
        if self._num_held and self._num_held + _held(request) > self._num_blocks:
            return False
        num_found = next((place for place, name in enumerate(request.blocks) if name not in self._cached),
                         len(request.blocks))
        self._touch(request.blocks[:num_found])
        job.num_done = job.num_cached = min(num_found * request.block_size, request.num_tokens - 1)
        self._num_held += _held(request)
        return True

    def _compute(self, job: _Job, chunk: int) -> None:
        request = job.request
        before, job.num_done = job.num_done, job.num_done + chunk
        self._store(request.blocks, before // request.block_size, job.num_done // request.block_size)
        if job.num_done < request.num_tokens:
            return
        assert self._waiting.popleft() is job, "prompts are computed in turn"
        self.totals.num_prompt_tokens += request.num_tokens
        self.totals.num_cached += job.num_cached
        self.totals.ttft_s.append(self.now_s - request.at_s)
        self._on_begun(request.request_id)
        heapq.heappush(self._decoding, (self._num_steps + request.num_output_tokens - 1, request.request_id,
                                        _held(request)))

    def _store(self, blocks: Sequence[bytes], first: int, last: int) -> None:
        new = [name for name in blocks[first:last] if name not in self._cached]
        self._cached.update(dict.fromkeys(new))
        self._touch(blocks[:last])
        gone = [self._cached.popitem(last=False)[0] for _ in range(len(self._cached) - self._num_blocks)]
        if new or gone:
            self._on_cache(b"".join(new), b"".join(gone))

    def _touch(self, blocks: Sequence[bytes]) -> None:
        """They were used: the first last, so that none goes before what follows it."""
        for name in reversed(blocks):
            if name in self._cached:
                self._cached.move_to_end(name)


def _held(request: TracedRequest) -> int:
    return -(-(request.num_tokens + request.num_output_tokens) // request.block_size)
